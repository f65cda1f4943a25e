"""What a store says of itself without decoding anything: statistics, history, the quick check. No torch."""

import time
from pathlib import Path

from loramem._util.files import size_bytes
from loramem._util.layout import ADAPTERS
from loramem.index.index import Index
from loramem.planning import calibration
from loramem.results import Stats, VerifyReport, Version
from loramem.store.compact import StoredShard, shards, worth_compacting
from loramem.store.integrity import problems
from loramem.store.manifest import Manifest


def stats(store: Path, index: Index, manifest: Manifest) -> Stats:
    """Counts and sizes, as the rows of the records say; the caller holds a snapshot of the index.

    No row of a record is held against its seal, or in memory, which grows with the number of adapters alone.
    """
    loads, retired = index.loads(), index.retired()
    present, questions = shards(index, loads), index.count_questions()
    parameters, cost_bits = sum(shard.parameters for shard in present), sum(shard.cost_bits for shard in present)
    return Stats(
        base_model=manifest.base_model,
        law=_law(manifest),
        namespaces=len(index.namespaces()),
        records=sum(load.records for load in loads.values()) - questions,
        questions=questions,
        tombstones=sum(index.tombstones().values()),
        adapters=len(present),
        ranks=sorted({shard.rank for shard in present}),
        parameters=parameters,
        answer_tokens=sum(load.answer_tokens for load in loads.values()),
        cost_bits=cost_bits,
        bits_per_parameter=cost_bits / parameters if parameters else 0.0,
        min_prob=min((load.min_prob for load in loads.values()), default=None),
        size_bytes=size_bytes(store),
        retired_adapters=len(retired),
        retired_bytes=sum(size_bytes(store / ADAPTERS / adapter) for adapter in retired),
        advice=_advice(present),
        unfinished_records=index.pending_count(),
    )


def history(index: Index, namespace: str, key: str) -> list[Version]:
    """What the key held and holds, oldest first; empty if it was never there."""
    found = [
        Version(
            **{name: value for name, value in vars(version).items() if name != "question_of"},
            in_weights=index.has_adapter(version.adapter),
        )
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


def _advice(present: list[StoredShard]) -> str | None:
    groups = worth_compacting(present)
    if not groups:
        return None
    chosen = [shard for group in groups for shard in group]
    dead = sum(shard.dead for shard in chosen)
    return (
        f"Compaction would rewrite {sum(shard.alive.records for shard in chosen)} records of {len(chosen)} of "
        f"{len(present)} adapters" + (f", and leave {dead} deleted or replaced ones out." if dead else " into fewer.")
    )


def _law(manifest: Manifest) -> str | None:
    known = calibration.load(manifest.fingerprint["weights"][:12])
    place = tuple(manifest.placement["modules"]), tuple(manifest.placement["layers"])
    return ", ".join(law.kind for law in known.laws if law.place == place) or None if known else None
