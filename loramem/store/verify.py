"""The full check: every file and row against its sha256, every record decoded from its adapter."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby

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
    session: Session, progress: Callable[[int, int], None] | None = None, *, resume: bool = False
) -> VerifyReport:
    """Damage does not raise: the report lists it.

    Args:
        progress: Told how many records of how many are done, after every batch.
        resume: Take over what an interrupted check found whole, if nothing changed since; files are all hashed again.

    Raises:
        OtherBaseModel: The base model given is not the store's at all.
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
        verify_progress = VerifyProgress(session.store, state_of(rows, session.manifest, session.base, found))
        if not resume:
            verify_progress.forget()
        known, done, total, resumed = verify_progress.adapters(), 0, table.count(), 0
        for adapter, batches in groupby(cut_batches(table.records()), key=lambda batch: batch[0].adapter):
            before = findings.count()
            for batch in batches:
                _check_batch(session, batch, findings, decode=adapter not in known)
                done += len(batch)
                resumed += len(batch) if adapter in known else 0
                if progress is not None:
                    progress(done, total)
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


def _check_batch(session: Session, batch: Sequence[StoredRecord], findings: Findings, *, decode: bool) -> None:
    """Records of one adapter, decoded; otherwise its files alone are hashed."""
    reader = session.reader
    try:
        if not decode:
            reader.check(session.index.located(batch)[0].adapter)
            return
        for record, value in reader.try_decode(batch):
            if value is None:
                findings.failed.append(record.key)
            elif (tokens := reader.count_tokens(value)) != record.answer_tokens:
                findings.damaged.append(
                    f"The record {record.key!r} has {tokens} answer tokens, its row says {record.answer_tokens}"
                )
    except IntegrityError as error:
        if batch[0].adapter not in session.index.live():
            findings.changed += len(batch)
            return
        findings.failed += [record.key for record in batch]
        if not any(error.what in problem for problem in findings.damaged):
            findings.damaged.append(str(error))
