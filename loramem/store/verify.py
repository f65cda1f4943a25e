"""The full check: every file and row against its sha256, every record decoded from its adapter, also in the chats that
it was proved in."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice

from loramem.errors import BaseModelError, IntegrityError
from loramem.index.connection import sqlite_errors
from loramem.index.index import Index
from loramem.index.rows import StoredRecord, record_of
from loramem.index.temporary_table import TemporaryTable
from loramem.models.fingerprint import Fingerprint, fingerprint
from loramem.models.parameters import parameters_sha256
from loramem.results import VerifyReport
from loramem.store.integrity import problems
from loramem.store.read import cut_batches
from loramem.store.session import Session
from loramem.store.verify_progress import VerifyProgress, state_of
from loramem.training.jobs import DecodingBatch, DecodingJob, JobBase, releases
from loramem.workers.executors import completed
from loramem.workers.worker import run_decoding

Batch = list[StoredRecord]
Decoded = list[tuple[StoredRecord, str | None]] | IntegrityError
"""Of a batch, see `Reader.try_decode`; of one that was decoded before, nothing; or why it could not be."""
Adapters = Iterable[tuple[str, Iterable[Batch]]]
Found = Iterable[tuple[Batch, Decoded]]
TOGETHER = 512
"""Adapters that are sent to an executor before the next are read."""


@dataclass
class Findings:
    """What a check has come upon so far."""

    failed: list[str] = field(default_factory=list)
    """Keys whose value did not come back."""
    damaged: list[str] = field(default_factory=list)
    changed: int = 0
    """Records that another process replaced, moved or deleted, and whose adapter it removed, before they were read."""

    def count(self) -> int:
        return len(self.failed) + len(self.damaged)


def full_check(
    session: Session,
    progress: Callable[[int, int], None] | None = None,
    *,
    resume: bool = False,
    executor: Executor | None = None,
) -> VerifyReport:
    """Damage does not raise: the report lists it.

    Args:
        progress: Told how many records of how many are done, after every batch.
        resume: Take over what an interrupted check found whole, if nothing changed since; files are all hashed again.
        executor: Its processes decode; files and rows are looked at here.

    Raises:
        OtherBaseModel: The base model given is not the store's at all.
        WorkerLost: See `completed`.
    """
    started, index, findings = time.monotonic(), session.index, Findings()
    with TemporaryTable() as table:
        findings.damaged += problems(session.store, index)
        with index.snapshot():
            records = index.count()
            try:
                with sqlite_errors(index.path):
                    table.add(_whole_records(index, findings))
                    rows = index.rows_sum()
            except IntegrityError as error:  # rows that cannot be read leave nothing to decode by
                damaged = findings.damaged or [str(error)]
                return VerifyReport(records, 0, (), tuple(damaged), time.monotonic() - started)
        found = _base_again(session, findings)
        device = str(session.base.device) if executor is None else "workers"
        state = state_of(rows, session.manifest, session.base, found, device)
        verify_progress = VerifyProgress(session.store, state)
        if not resume:
            verify_progress.forget()
        known, done, total, resumed = verify_progress.adapters(), 0, table.count(), 0
        adapters = groupby(cut_batches(table.records()), key=_adapter)
        looks = _here(session, adapters, known) if executor is None else _there(session, adapters, known, executor)
        for adapter, batches in looks:
            before = findings.count()
            for batch, decoded in batches:
                _note(session, batch, decoded, findings)
                done += len(batch)
                resumed += len(batch) if adapter in known else 0
                if progress is not None:
                    progress(done, total)
                del batch, decoded  # before the next is read
            if adapter not in known and findings.count() == before:
                verify_progress.note(adapter)
    verify_progress.forget()
    return VerifyReport(
        records=records - findings.changed,
        exact=records - findings.changed - len(findings.failed),
        failed=tuple(findings.failed),
        damaged=tuple(findings.damaged),
        elapsed_s=time.monotonic() - started,
        resumed=resumed,
    )


def _base_again(session: Session, findings: Findings) -> Fingerprint:
    """The base model's files and loaded parameters, hashed now and held against what the store says of them."""
    base, manifest = session.base, session.manifest
    found = replace(base.fingerprint, parameters=parameters_sha256(base.model))
    try:
        found = replace(fingerprint(base.folder, rehash=True), parameters=found.parameters)
        found.check(manifest.fingerprint, base.folder, base.id, same_dtype=base.dtype == manifest.dtype)
    except BaseModelError as error:
        findings.damaged.append(str(error))
    findings.damaged += _proved_on_others(session.index, found.parameters, base.dtype)
    return found


def _proved_on_others(index: Index, parameters: str, dtype: str) -> Iterator[str]:
    """Adapters whose proof says that the base model, in the same dtype, had other parameters."""
    with suppress(IntegrityError), sqlite_errors(index.path):  # rows that cannot be read are among the problems
        for id in index.live():
            with suppress(IntegrityError):
                adapter = index.adapter(id)
                proof = adapter.proof if adapter else {}
                # Proofs of older versions do not say.
                if proof.get("parameters", parameters) != parameters and proof["dtypes"]["base"] == dtype:
                    yield f"Adapter {id} was proved on other parameters of the base model as loaded"


def _whole_records(index: Index, findings: Findings) -> Iterator[StoredRecord]:
    """Those whose row is as committed; the other rows are among the problems already."""
    for row, whole in index.every_row("records", order_by="adapter, rowid"):
        if whole:
            yield record_of(row)
        else:
            findings.failed.append(str(row["key"]))


def _adapter(batch: Batch) -> str:
    return batch[0].adapter


def _here(session: Session, adapters: Adapters, known: Collection[str]) -> Iterator[tuple[str, Found]]:
    """What this process decodes for each adapter, batch by batch as it is asked for."""
    reader = session.reader

    def look(batch: Batch) -> Decoded:
        try:
            if _adapter(batch) not in known:
                return _everywhere([reader.try_decode(each) for each in (batch, *reader.in_contexts(batch))])
            reader.check(session.index.located(batch)[0].adapter)
        except IntegrityError as error:
            return error
        return []

    for adapter, batches in adapters:
        yield adapter, ((batch, look(batch)) for batch in batches)


def _there(
    session: Session, adapters: Adapters, known: Collection[str], executor: Executor
) -> Iterator[tuple[str, Found]]:
    """What an executor's processes decode, adapter by adapter as they are done.

    They get the adapter's files, which were compared with their sha256, and prompts; what they give is compared here.
    """
    reader, base, here = session.reader, JobBase.of(session.base, session.planner.device), releases()

    def asked(batch: Batch) -> list[Batch]:
        return [batch, *reader.in_contexts(batch)]

    every = ((id, list(batches)) for id, batches in adapters)
    while some := list(islice(every, TOGETHER)):
        sent, jobs = list[list[Batch]](), list[DecodingJob]()
        for id, batches in some:
            try:
                adapter = session.index.located(batches[0])[0].adapter
                files = reader.files(adapter)
            except IntegrityError as error:
                yield id, [(batch, error) for batch in batches]
                continue
            if id in known:
                yield id, [(batch, []) for batch in batches]
                continue
            decoding = tuple(DecodingBatch(*reader.asked(each)) for batch in batches for each in asked(batch))
            sent.append(batches)
            jobs.append(DecodingJob(base, id, files, decoding, reader.template.end_id, here))
        with closing(completed(executor, run_decoding, jobs)) as answers:
            for number, rows in answers:
                mine = iter(rows)
                found = [
                    (batch, _everywhere([reader.held(each, next(mine)) for each in asked(batch)]))
                    for batch in sent[number]
                ]
                yield jobs[number].adapter, found


def _everywhere(decoded: Sequence[list[tuple[StoredRecord, str | None]]]) -> Decoded:
    """Records with their values, where each came back alone and in every chat that it was proved in."""
    return [
        (ways[0][0], None if any(value is None for _, value in ways) else ways[0][1])
        for ways in zip(*decoded, strict=True)
    ]


def _note(session: Session, batch: Batch, decoded: Decoded, findings: Findings) -> None:
    if isinstance(decoded, IntegrityError):
        if _adapter(batch) not in session.index.live():
            findings.changed += len(batch)
            return
        findings.failed += [record.key for record in batch]
        if not any(decoded.what in problem for problem in findings.damaged):
            findings.damaged.append(str(decoded))
        return
    for record, value in decoded:
        if value is None:
            findings.failed.append(record.key)
        elif (tokens := session.reader.count_tokens(value)) != record.answer_tokens:
            findings.damaged.append(
                f"The record {record.key!r} has {tokens} answer tokens, its row says {record.answer_tokens}"
            )
