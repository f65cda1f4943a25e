"""What a store says of itself without decoding anything: statistics, history, the quick check. No torch."""

import time
from pathlib import Path

from loramem import calibrations
from loramem.checks import problems
from loramem.files import size_bytes
from loramem.index import Index
from loramem.maintenance import shards, worth_compacting
from loramem.manifest import Manifest
from loramem.reports import Stats, VerifyReport, Version
from loramem.staging import ADAPTERS


def stats(store: Path, index: Index, manifest: Manifest) -> Stats:
    """Counts and sizes; the caller holds a snapshot of the index."""
    adapters, records, retired = list(index.adapters()), list(index.records()), index.retired()
    pending = index.pending_write()
    parameters = sum(adapter.parameters for adapter in adapters)
    cost_bits = sum(adapter.training["cost_bits"] for adapter in adapters)
    return Stats(
        base_model=manifest.base_model,
        law=_law(manifest),
        namespaces=len(index.namespaces()),
        records=len(records),
        tombstones=sum(index.tombstones().values()),
        adapters=len(adapters),
        ranks=sorted({adapter.rank for adapter in adapters}),
        parameters=parameters,
        answer_tokens=sum(record.answer_tokens for record in records),
        cost_bits=cost_bits,
        bits_per_parameter=cost_bits / parameters if parameters else 0.0,
        min_prob=min((record.min_prob for record in records), default=None),
        size_bytes=size_bytes(store),
        retired_adapters=len(retired),
        retired_bytes=sum(size_bytes(store / ADAPTERS / adapter) for adapter in retired),
        advice=_advice(index),
        unfinished_records=len(pending.records) if pending else 0,
    )


def history(index: Index, namespace: str, key: str) -> list[Version]:
    """What the key held and holds, oldest first; empty if it was never there."""
    found = [
        Version(**vars(version), in_weights=index.has_adapter(version.adapter))
        for version in index.versions(namespace, key, renamed=True).values()
    ]
    if (live := index.find(namespace, key)) is not None:
        kept = {name: vars(live)[name] for name in ("written_at", "adapter", "answer_tokens", "min_prob")}
        found.append(Version(namespace, key, **kept, ended_at=None, ended_by=None, successor=None, in_weights=True))
    return found


def quick_check(store: Path, index: Index) -> VerifyReport:
    """Structure and hashes."""
    started = time.monotonic()
    damaged = tuple(problems(store, index))
    return VerifyReport(index.count(), None, (), damaged, time.monotonic() - started)


def _advice(index: Index) -> str | None:
    groups = worth_compacting(index)
    if not groups:
        return None
    chosen = [shard for group in groups for shard in group]
    dead = sum(shard.dead for shard in chosen)
    return (
        f"Compaction would rewrite {sum(shard.records for shard in chosen)} records of {len(chosen)} of "
        f"{len(shards(index))} adapters"
        + (f", and leave {dead} deleted or replaced ones out." if dead else " into fewer.")
    )


def _law(manifest: Manifest) -> str | None:
    known = calibrations.load(manifest.fingerprint["weights"][:12])
    place = tuple(manifest.placement["modules"]), tuple(manifest.placement["layers"])
    return ", ".join(law.kind for law in known.laws if law.place == place) or None if known else None
