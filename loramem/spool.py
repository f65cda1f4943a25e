"""Index rows of one committed state, set aside while their values are decoded: as they grow, on disk, not in memory.

A read transaction held open for as long would also see one state, but keep every change of the store in the
write-ahead log, and `erase` from clearing it.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

from loramem.errors import StoreError
from loramem.tables import StoredRecord


class Spool:
    """Records without their values, in a private temporary database that SQLite unlinks as it opens it."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", check_same_thread=False)  # a generator may be continued by another thread
        self._db.execute("create table records (adapter, answer_tokens, record)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, records: Iterable[StoredRecord]) -> None:
        """Set records aside, read one after another.

        Raises:
            StoreError: There is no room for them. What reading them raises is passed on.
        """
        for record in records:  # outside `_room`: they come from another database
            row = [record.adapter, record.answer_tokens, json.dumps(vars(replace(record, value=None)))]
            with _room():
                self._db.execute("insert into records values (?, ?, ?)", row)

    def count(self) -> int:
        return int(self._db.execute("select count(*) from records").fetchone()[0])

    def records(self) -> Iterator[StoredRecord]:
        """All of them, each adapter's together, shorter answers first."""
        with _room():  # sorting takes some as well
            for (record,) in self._db.execute("select record from records order by adapter, answer_tokens, rowid"):
                yield StoredRecord(**json.loads(record))


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreError(
            f"Rows of the records could not be set aside in the temporary folder ({error}). Make room there, or name "
            "another folder with SQLITE_TMPDIR."
        ) from None
