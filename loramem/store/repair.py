"""Damage undone where the store still knows the values: what an adapter or a row lost is trained again.

A value is trusted if it agrees with its salted digest, or if the row and the weights agree about it.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loramem._util.events import log_event
from loramem.errors import IntegrityError, LoramemError
from loramem.index.commits import Identity, commit_repair
from loramem.index.index import Index
from loramem.index.rows import StoredRecord, adapter_of, digest_of, record_of
from loramem.records.prompts import prompt_digest
from loramem.results import RepairReport
from loramem.store.compact import install, rewrite
from loramem.store.integrity import file_problems
from loramem.store.request import WriteRequest
from loramem.store.session import Session
from loramem.store.staging import clean

if TYPE_CHECKING:
    from loramem.training.progress import ProgressCallback


@dataclass(frozen=True)
class Damage:
    """What `repair` has to deal with."""

    records: Mapping[str, list[StoredRecord]]
    """Records to write anew, by the adapter their rows name."""
    values: Mapping[Identity, str]
    """Theirs, which the rows of a store without values never hold."""
    lost: list[StoredRecord]
    requests: Mapping[str, WriteRequest]
    """How each of these adapters was asked to be written, where that is known."""
    healthy: frozenset[str]
    missing: int
    """Records without a row."""


def repair(
    session: Session,
    *,
    drop_lost: bool = False,
    progress: "ProgressCallback | None" = None,
    executor: Executor | None = None,
) -> RepairReport:
    """Write every record of a damaged adapter, or with a damaged row, anew from its value, in one commit.

    Metadata of a damaged row, which nothing else knows, are kept as they are found; damaged rows of the history and of
    the journal are removed.

    Args:
        drop_lost: Delete the records whose value nobody knows any more.

    Raises:
        IntegrityError: SQLite cannot read index.db as a database; restore a backup.
        StubbornRecords: A record could not be certified again; nothing changed.
    """
    started, index = time.monotonic(), session.index
    _check_database(index)
    damage = assess(session)
    groups = [
        ([record for record in group if record.namespace == namespace], damage.requests.get(adapter, WriteRequest()))
        for adapter, group in damage.records.items()
        for namespace in sorted({record.namespace for record in group})
    ]
    wanted = [(group, request, damage.values) for group, request in groups]
    records, adapters = install(session, rewrite(session, wanted, progress, executor))
    commit_repair(index, records, adapters, [(r.namespace, r.key) for r in damage.lost] if drop_lost else [])
    log_event("repaired", records=len(records), lost=len(damage.lost), missing=damage.missing)
    clean(session.store, index)
    return RepairReport(
        repaired=len(records),
        adapters=len(damage.records),
        lost=tuple(record.key for record in damage.lost),
        missing=damage.missing,
        elapsed_s=time.monotonic() - started,
    )


def assess(session: Session) -> Damage:
    """Which records must be written anew, and which are lost."""
    index = session.index
    sealed = {row["id"]: adapter_of(row) for row, whole in index.every_row("adapters") if whole}
    retired = index.retired()
    healthy = frozenset(id for id, adapter in sealed.items() if not file_problems(session.store, adapter))
    rows = [(record_of(_readable(row)), whole) for row, whole in index.every_row("records")]
    affected = {record.adapter for record, whole in rows if not whole or record.adapter not in healthy}
    groups: dict[str, list[StoredRecord]] = {}
    lost, values = [], dict[Identity, str]()
    for record, whole in rows:
        if record.adapter in affected:
            value = _trusted(session, record, whole=whole, decodable=record.adapter in healthy)
            if value is None:
                lost.append(record)
                continue
            values[record.namespace, record.key] = value
            digest = digest_of(record.salt, record.namespace, record.key, value)  # perhaps what was damaged
            prompt = record.prompt if whole else None  # its flags have nothing else that they could be checked by
            groups.setdefault(record.adapter, []).append(replace(record, digest=digest, prompt=prompt))
    tombstones = index.tombstones()
    held = {adapter: sum(record.adapter == adapter for record, _ in rows) for adapter in sealed}
    missing = sum(
        max(0, adapter.proof.get("records", 0) - held[id] - tombstones.get(id, 0))
        for id, adapter in sealed.items()
        if id not in retired
    )
    requests = {id: WriteRequest.of_adapter(adapter.training) for id, adapter in sealed.items()}
    return Damage(groups, values, lost, requests, healthy, missing)


def _trusted(session: Session, record: StoredRecord, *, whole: bool, decodable: bool) -> str | None:
    """A value of the record that can be believed, None if there is none."""
    if record.value is not None and record.holds(record.value):
        return record.value
    if not decodable:
        return None
    for asked in [record] if whole else _ways_to_ask(session, record):
        try:
            ((_, value),) = session.reader.decode_any([asked])
        except LoramemError:
            continue
        if record.holds(value) or value == record.value:  # row and weights agree
            return value
    return None


def _ways_to_ask(session: Session, record: StoredRecord) -> Iterator[StoredRecord]:
    """A record of a damaged row with every prompt that it may have been trained with, and room for any value."""
    prompts: list[dict[str, Any] | None] = [None, {"own": True}]  # joined, and the chat template's
    ids = record.prompt.get("ids") if isinstance(record.prompt, dict) else None
    if isinstance(ids, list) and prompt_digest(ids) == record.prompt_sha256:
        prompts.insert(0, {"ids": ids})
    for prompt in prompts:
        asked = replace(record, prompt=prompt)
        tokens = session.base.max_tokens - len(session.reader.prompt_ids(asked)) - 2
        yield replace(asked, answer_tokens=max(1, tokens))  # their number may be what was damaged


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with text where damage left bytes, and without metadata or a prompt that are not JSON any more."""
    row = {
        name: column.decode(errors="replace") if isinstance(column, bytes) else column for name, column in row.items()
    }
    for changed in ({}, {"prompt": None}, {"metadata": "{}"}):
        try:
            record_of({**row, **changed})
        except IntegrityError:
            continue
        return {**row, **changed}
    return {**row, "metadata": "{}", "prompt": None}


def _check_database(index: Index) -> None:
    if problems := index.broken_pages():
        raise IntegrityError(
            f"{index.path} is damaged as a database ({problems[0]}): what its rows held cannot be told. Restore a "
            "backup.",
            what=index.path.name,
        )
