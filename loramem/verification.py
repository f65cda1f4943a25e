"""The full check: every file and row against its sha256, every record decoded from its adapter."""

import time
from collections.abc import Callable

from loramem.base_model import fingerprint
from loramem.checks import problems
from loramem.database import sqlite_errors
from loramem.engine import Engine
from loramem.errors import IntegrityError, OtherBaseModel
from loramem.reader import decode_batches
from loramem.reports import VerifyReport
from loramem.tables import is_sealed, record_of


def full_check(engine: Engine, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Damage does not raise: the report lists it.

    Args:
        progress: Told how many records of how many were decoded, after every batch.

    Raises:
        OtherBaseModel: The base model given is not the store's at all.
    """
    started, index = time.monotonic(), engine.index
    with index.snapshot():
        damaged = list(problems(engine.store, index))
        try:
            with sqlite_errors(index.path):
                rows = list(index.db.table("records").rows_where(order_by="adapter, rowid"))
        except IntegrityError:  # among the problems; rows that cannot be read leave nothing to decode by
            return VerifyReport(index.count(), 0, (), tuple(damaged), time.monotonic() - started)
    try:
        fingerprint(engine.base.folder, rehash=True).check(engine.manifest.fingerprint, engine.base.id)
    except OtherBaseModel as error:
        damaged.append(str(error))
    records = [record_of(row) for row in rows if is_sealed(row)]
    failed = [str(row["key"]) for row in rows if not is_sealed(row)]  # among the problems as well
    done = 0
    for batch in decode_batches(records):
        try:
            for record, value in engine.reader.try_decode(batch):
                if value is None:
                    failed.append(record.key)
                elif (tokens := engine.reader.count_tokens(value)) != record.answer_tokens:
                    damaged.append(
                        f"The record {record.key!r} has {tokens} answer tokens, its row says {record.answer_tokens}"
                    )
        except IntegrityError as error:
            failed += [record.key for record in batch]
            if not any(error.what in problem for problem in damaged):
                damaged.append(str(error))
        done += len(batch)
        if progress is not None:
            progress(done, len(records))
    return VerifyReport(
        records=len(rows),
        exact=len(rows) - len(failed),
        failed=tuple(failed),
        damaged=tuple(damaged),
        elapsed_s=time.monotonic() - started,
    )
