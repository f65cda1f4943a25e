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
from loramem.index.rows import StoredRecord

WINDOW_RECORDS, WINDOW_TOKENS = 2**16, 2**20
"""Values that wait at most for one that was asked for before them: about 30 MB at ten tokens each."""


class TemporaryTable:
    """Records without their values, in a private temporary database that SQLite unlinks as it opens it.

    Args:
        windows: Give them back in windows of at most `WINDOW_RECORDS` and `WINDOW_TOKENS`, one after the other as they
            were added: then putting values in that order holds no more than a window of them.
    """

    def __init__(self, *, windows: bool = False) -> None:
        self._windows = windows
        self._first, self._added, self._records, self._tokens = dict[str, int](), 0, 0, 0
        self._db = sqlite3.connect("", check_same_thread=False)  # a generator may be continued by another thread
        self._db.execute("create table records (number integer primary key, place, answer_tokens, record)")

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
            row = [self._place(record), record.answer_tokens, json.dumps(vars(replace(record, value=None)))]
            with _room():
                self._db.execute("insert into records (place, answer_tokens, record) values (?, ?, ?)", row)

    def count(self) -> int:
        return int(self._db.execute("select count(*) from records").fetchone()[0])

    def records(self) -> Iterator[StoredRecord]:
        """All of them, each adapter's together (within a window), shorter answers first."""
        return (record for _, record in self.numbered())

    def numbered(self) -> Iterator[tuple[int, StoredRecord]]:
        """`records`, each with its place among them as they were added, from 0."""
        query = "select number, record from records order by place, answer_tokens, number"
        with _room():  # sorting takes some as well
            for number, record in self._db.execute(query):
                yield number - 1, StoredRecord(**json.loads(record))

    def _place(self, record: StoredRecord) -> str | int:
        """What sorts a record: its adapter; within a window, where the adapter came first."""
        if not self._windows:
            return record.adapter
        self._added += 1
        self._records, self._tokens = self._records + 1, self._tokens + record.answer_tokens
        if self._records > WINDOW_RECORDS or self._tokens > WINDOW_TOKENS:
            self._first, self._records, self._tokens = {}, 1, record.answer_tokens
        return self._first.setdefault(record.adapter, self._added)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreError(
            f"Rows of the records could not be set aside in the temporary folder ({error}). Make room there, or name "
            "another folder with SQLITE_TMPDIR."
        ) from None
