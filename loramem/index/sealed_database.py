"""The database file of an index: its transactions, its rows against their seals, what is left in it of the erased."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

from sqlite_utils import Database
from sqlite_utils.db import NotFoundError

from loramem.errors import IntegrityError, StoreFormatError, StoreLocked
from loramem.index.connection import BUSY_S, connect, connect_read_only, sqlite_errors
from loramem.index.lock import write_lock
from loramem.index.migrations import MIGRATIONS
from loramem.index.seals import (
    ROWS_SUM,
    SEAL,
    SEALED,
    Change,
    count_rows,
    equal,
    is_sealed,
    kept_sum,
    seal_number,
    select_keys,
    sum_text,
)

VACUUM_DUE = "vacuum_due"  # in meta: records were erased and the file may still hold them
META = frozenset({"manifest_sha256", ROWS_SUM, VACUUM_DUE})


class SealedDatabase:
    """A connection to a database of sealed rows. Not thread-safe by itself: the store holds a lock around it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read_only = path.exists() and not os.access(path.parent, os.W_OK)
        connection = connect_read_only(path) if self.read_only else connect(path)
        self.db = Database(connection)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The index of an existing store, up to date, for reading alone if its folder cannot be written.

        Raises:
            IntegrityError: It is missing, or not a database that SQLite can read.
            StoreError: SQLite could not read it now, such as on a disk that fails.
            StoreFormatError: A newer version of this package has changed its tables.
            StoreLocked: It is of an older format, and another process is writing.
            StoreReadOnly: It cannot be written, and a commit in its write-ahead log has not reached it.
        """
        if not path.exists():
            raise IntegrityError(f"{path} is missing. Restore it from a backup.", what=path.name)
        with sqlite_errors(path):
            index = cls(path)
            try:
                index._refuse_newer()
                if index.read_only:
                    index.migrate()
                elif MIGRATIONS.pending(index.db):
                    with write_lock(path.parent, BUSY_S):
                        index.migrate()
            except BaseException:
                index.close()
                raise
            return index

    def migrate(self) -> None:
        """Bring the tables up to date; the caller holds the store's lock, unless nobody else sees them."""
        if MIGRATIONS.pending(self.db):
            MIGRATIONS.apply(self.db)

    def _refuse_newer(self) -> None:
        """Its seals would read as damage here, and be removed by `repair`."""
        ours = {migration.name for migration in MIGRATIONS.pending(Database(memory=True))}
        if newer := [each.name for each in MIGRATIONS.applied(self.db) if each.name not in ours]:
            raise StoreFormatError(
                f"{self.path} was brought to a newer format ({newer[0]}) by a newer version of loramem. Upgrade it."
            )

    def close(self) -> None:
        self.db.close()

    def snapshot(self) -> AbstractContextManager[Database]:
        """Within this context every query sees the same committed state; outside, each sees the newest."""
        return self.db.atomic()

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction that changes rows, all or nothing; it waits for others before it reads, not midway.

        Raises:
            IntegrityError: What meta says of all rows is damaged, so that it cannot be brought up to date.
        """
        self.db.conn.execute("BEGIN IMMEDIATE")
        try:
            change = Change(self.db)
            yield change
            change.finish()
            self.db.commit()
        except BaseException:
            self.db.rollback()
            raise

    # The file

    def vacuum(self) -> None:
        """Rewrite the database without what was deleted from it, and empty its write-ahead log.

        Raises:
            StoreLocked: Another process kept reading for 30 s.
        """
        self.db.execute("PRAGMA temp_store=MEMORY")  # no copy of the rows in a folder of temporary files
        self.db.execute("VACUUM")
        if not self.empty_log():
            raise StoreLocked(
                f"Another process keeps reading {self.path}, so that its log still holds what was erased. End it; the "
                "next change of the store clears the log (loramem gc is one).",
                pid=None,
                host=None,
                since=None,
            )
        with self.change():
            self.db.execute("delete from meta where name = ?", [VACUUM_DUE])

    def copy_to(self, target: Path) -> None:
        """A new database of what is committed now, without what was deleted from this one."""
        self.db.execute("VACUUM INTO ?", [str(target)])

    def empty_log(self, wait_s: float = BUSY_S) -> bool:
        """Move every commit from the write-ahead log into the database; False if a reader was in the way."""
        self.db.execute(f"PRAGMA busy_timeout={wait_s * 1000:.0f}")
        try:
            (busy, *_) = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            self.db.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")
        return not busy

    # Integrity

    def _row(self, table: str, *key: Any) -> dict[str, Any] | None:
        # Not `Table.get`, which asks for the table's columns first, twice: once a record, that is half of an admission.
        with sqlite_errors(self.path):
            found = self.db.conn.execute(f'select * from "{table}" where {equal(SEALED[table].key)}', key)
            names = [name for name, *_ in found.description]
            row = found.fetchone()
            return None if row is None else self._checked(table, dict(zip(names, row, strict=True)))

    def _some(self, table: str, keys: Iterable[Sequence[Any]]) -> Iterator[dict[str, Any]]:
        """The rows that have these keys, not in order."""
        names = [name for name, *_ in self.db.conn.execute(f'select * from "{table}" limit 0').description]
        with sqlite_errors(self.path):
            for row in select_keys(self.db, table, "*", SEALED[table].key, keys):
                yield self._checked(table, dict(zip(names, row, strict=True)))

    def _rows(
        self, table: str, where: str | None = None, values: Mapping[str, Any] | None = None, *, order_by: str
    ) -> Iterator[dict[str, Any]]:
        with sqlite_errors(self.path):
            for row in self.db.table(table).rows_where(where, dict(values or {}), order_by=order_by):
                yield self._checked(table, row)

    def _checked(self, table: str, row: dict[str, Any]) -> dict[str, Any]:
        if is_sealed(table, row):
            return row
        what = str(row[SEALED[table].key[-1]])
        raise IntegrityError(
            f"{self.path}: the row of {what!r} in {table} is not what was committed. Run loramem repair.", what=what
        )

    def every_row(self, table: str, order_by: str = "rowid") -> Iterator[tuple[dict[str, Any], bool]]:
        """Rows whatever they say, each with whether it is as committed."""
        for row in self.db.table(table).rows_where(order_by=order_by):
            yield row, is_sealed(table, row)

    def next_id(self, table: str) -> int:
        """For a row whose seal covers its id, inside a transaction."""
        return int(next(self.db.query(f"select coalesce(max(id), 0) + 1 as id from {table}"))["id"])

    def meta(self, name: str) -> str | None:
        try:
            value: str = self.db.table("meta").get(name)["value"]
            return value
        except NotFoundError:
            return None

    def rows_sum(self) -> str:
        """The sum over the seals of all rows, counted anew: what `loramem.index.seals.count_rows` says."""
        return sum_text(count_rows(self.db))

    def broken_pages(self) -> list[str]:
        """What SQLite finds wrong with the database as such."""
        found = [row["integrity_check"] for row in self.db.query("pragma integrity_check")]
        return [] if found == ["ok"] else found

    def damaged(self) -> Iterator[str]:
        """What in the index is not as committed, in words; nothing if all is well. A key is named, never a value."""
        for problem in self.broken_pages():
            yield f"index.db: {problem}"
        total = 0
        for table, kind in SEALED.items():
            for row, whole in self.every_row(table):
                total += seal_number(table, row[SEAL])
                if not whole:
                    yield f"index row of {table} {', '.join(repr(row[name]) for name in kind.key)}"
        for row in self.db.query("select name from meta order by name"):
            if row["name"] not in META:
                yield f"index row of meta {row['name']!r}"
        if kept_sum(self.db) != sum_text(total):
            yield "index.db: rows were lost, added or replaced"
