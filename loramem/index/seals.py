"""Seals: each row of an index has one of its own, and one sum is kept over all of them, so that damage shows.

SQLite does not checksum content. A seal is ``version:sha256``: the version says which list of columns it covers, so
that a table can get more columns and rows that were sealed before can still be told from damaged ones.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlite_utils import Database

from loramem.errors import IntegrityError

SEAL = "row_sha256"
ROWS_SUM = "rows_sum"
"""In meta: the sum over all seals, as 64 hex digits."""
TOGETHER = 900
"""Rows that are looked for or put by one statement: SQLite before 3.32 takes 999 values."""


@dataclass(frozen=True)
class Sealed:
    """A table whose rows are sealed."""

    key: tuple[str, ...]
    """Its primary key."""
    versions: tuple[tuple[str, ...], ...]
    """What seals cover, version 1 first. A list never changes; a migration that changes the columns adds one, with all
    columns that there are now, and calls `loramem.index.migrations.reseal`."""

    def columns(self, version: int | None = None) -> tuple[str, ...]:
        """What seals of a version cover, the newest if None."""
        return self.versions[-1 if version is None else version - 1]


_WRITES = ("id", "state", "started_at", "ended_at", "count", "request")
_RECORDS = (
    *("namespace", "key", "value", "salt", "digest", "metadata", "prompt_sha256", "answer_tokens"),
    *("adapter", "min_prob", "written_at", "prompt"),
)
_VERSIONS = (
    *("id", "namespace", "key", "written_at", "ended_at", "ended_by", "successor", "adapter"),
    *("answer_tokens", "min_prob"),
)
SEALED = {
    "adapters": Sealed(
        ("id",),
        (
            (
                *("id", "namespace", "rank", "parameters", "size_bytes", "files", "placement", "training", "proof"),
                "created_at",
            ),
        ),
    ),
    "records": Sealed(("namespace", "key"), (_RECORDS, (*_RECORDS, "question_of"))),
    "versions": Sealed(("id",), (_VERSIONS, (*_VERSIONS, "question_of"))),
    "retired": Sealed(("adapter",), (("adapter", "retired_at"),)),
    "writes": Sealed(("id",), ((*_WRITES, "records"), _WRITES)),
    "journal": Sealed(("write", "number"), (("write", "number", "record"),)),
    "publications": Sealed(("repo",), (("repo", "commit", "sent"),)),
}


def seal_of(table: str, row: Mapping[str, Any], version: int | None = None) -> str:
    """The seal of a row by a version of the table's list of columns, the newest if None.

    Raises:
        TypeError: A column holds bytes, which no row of ours does.
    """
    versions = SEALED[table].versions
    number = len(versions) if version is None else version
    content = json.dumps([table, number, *[row[name] for name in versions[number - 1]]])
    return f"{number}:{hashlib.sha256(content.encode()).hexdigest()}"


def is_sealed(table: str, row: Mapping[str, Any]) -> bool:
    """Whether a row is as it was committed, in every column that the table has now."""
    try:
        return bool(seal_of(table, row) == row[SEAL])
    except TypeError:
        return False


def was_sealed(table: str, row: Mapping[str, Any]) -> bool:
    """Whether a row is as it was committed, in the columns that there were then."""
    version = str(row[SEAL]).partition(":")[0]
    try:
        return version.isdecimal() and int(version) > 0 and seal_of(table, row, int(version)) == row[SEAL]
    except (TypeError, IndexError):
        return False


def count_rows(db: Database, tables: Iterable[str] = tuple(SEALED)) -> int:
    """The sum over the seals of all rows, modulo 2^256, counted anew: it reads every one.

    A sum, so that a change of a few rows costs no more in a large store than in a small one. It shows rows that were
    lost, added, doubled or put back from another time, as disks, copies and other programs do that. It holds off
    nobody who means it: there is no key in it, so that whoever can change a row can change the sum as well, and rows
    chosen for it could be found that add up to the same. It says nothing of the order of rows, nor of what a row
    holds: that is what its own seal is for.
    """
    return sum(
        seal_number(table, seal) for table in tables for (seal,) in db.conn.execute(f'select {SEAL} from "{table}"')
    ) % (1 << 256)


def seal_number(table: str, seal: object) -> int:
    """What a row adds to the sum."""
    return int.from_bytes(hashlib.sha256(f"{table}:{seal}".encode()).digest())


def sum_text(total: int) -> str:
    return f"{total % (1 << 256):064x}"


def kept_sum(db: Database) -> str | None:
    """What meta says that the sum is."""
    found = db.conn.execute("select value from meta where name = ?", [ROWS_SUM]).fetchone()
    return None if found is None else str(found[0])


class Change:
    """A transaction under way: it seals the rows that it puts, and knows by how much the sum over all rows moves."""

    def __init__(self, db: Database) -> None:
        self.db, self.moved, self._anew = db, 0, False

    def put(self, table: str, row: Mapping[str, Any], version: int | None = None) -> None:
        """Insert a row, in the place of the one that has its key, if any.

        Args:
            row: Every column that the seal covers.
            version: Of the list of columns; the newest if None.
        """
        self.put_all(table, [row], version)

    def put_all(self, table: str, rows: Iterable[Mapping[str, Any]], version: int | None = None) -> int:
        """`put` of rows with different keys, many at a time; returns how many there were."""
        kind, count = SEALED[table], 0
        names = kind.columns(version)
        others = ", ".join(f'"{name}" = excluded."{name}"' for name in (*names, SEAL) if name not in kind.key)
        conflict = f"on conflict ({', '.join(kind.key)}) do update set {others}"  # keeps its place in the order of rows
        rest = iter(rows)
        while part := list(islice(rest, TOGETHER)):
            for (left,) in select_keys(self.db, table, SEAL, kind.key, ([row[n] for n in kind.key] for row in part)):
                self.moved -= seal_number(table, left)
            count += self.add_all(table, part, version, conflict)
        return count

    def add_all(
        self, table: str, rows: Iterable[Mapping[str, Any]], version: int | None = None, conflict: str = ""
    ) -> int:
        """Insert rows, in whose places there are none; returns how many there were.

        Args:
            conflict: What SQLite does where there are; it refuses them unless told.
        """
        names = SEALED[table].columns(version)
        expected, count = {*names}, 0

        def sealed() -> Iterator[list[Any]]:
            nonlocal count
            for row in rows:
                assert row.keys() - {SEAL} == expected, f"{table} has the columns {names}"
                seal = seal_of(table, row, version)
                self.moved += seal_number(table, seal)
                count += 1
                yield [*(row[name] for name in names), seal]

        columns = ", ".join(f'"{name}"' for name in (*names, SEAL))
        values = ", ".join("?" * (len(names) + 1))
        self.db.conn.executemany(f'insert into "{table}" ({columns}) values ({values}) {conflict}', sealed())
        return count

    def remove(self, table: str, where: str = "true", values: Sequence[Any] = ()) -> None:
        """Delete rows."""
        self._leave(table, where, values)
        self.db.conn.execute(f'delete from "{table}" where {where}', values)

    def remove_key(self, table: str, *key: Any) -> None:
        """Delete the row that has this key, if there is one."""
        self.remove(table, equal(SEALED[table].key), key)

    def set_meta(self, name: str, value: str) -> None:
        self.db.conn.execute(
            "insert into meta (name, value) values (?, ?) on conflict (name) do update set value = excluded.value",
            [name, value],
        )

    def count_anew(self) -> None:
        """Take the rows for all there are, as they will be at the end, whatever the sum said."""
        self._anew = True

    def finish(self) -> None:
        """Keep the sum, at the end of the transaction.

        Raises:
            IntegrityError: What was kept is no sum.
        """
        if self._anew:
            self.set_meta(ROWS_SUM, sum_text(count_rows(self.db)))
        elif self.moved:
            try:
                total = int(kept_sum(self.db) or "", 16)
            except ValueError:
                raise IntegrityError(
                    "index.db: the sum over all rows is not what was committed. Run loramem repair.", what="index.db"
                ) from None
            self.set_meta(ROWS_SUM, sum_text(total + self.moved))

    def _leave(self, table: str, where: str, values: Sequence[Any]) -> None:
        for (seal,) in self.db.conn.execute(f'select {SEAL} from "{table}" where {where}', values):
            self.moved -= seal_number(table, seal)


def select_keys(
    db: Database, table: str, columns: str, key: Sequence[str], wanted: Iterable[Sequence[Any]]
) -> Iterator[tuple[Any, ...]]:
    """Columns of the rows that have these keys, found by the index of the key, many at a time; not in order.

    SQLite looks through the whole table for a list of pairs: so a list of the last column's values for each beginning.
    """
    lasts: defaultdict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for values in wanted:
        *first, last = values
        lasts[tuple(first)].append(last)
    beginning = "".join(f'"{name}" = ? and ' for name in key[:-1])
    for start, rest in lasts.items():
        for number in range(0, len(rest), TOGETHER):
            some = rest[number : number + TOGETHER]
            where = f'{beginning}"{key[-1]}" in ({", ".join("?" * len(some))})'
            yield from db.conn.execute(f'select {columns} from "{table}" where {where}', [*start, *some])


def equal(key: Sequence[str]) -> str:
    """The condition that columns have values that are given in their order."""
    return " and ".join(f'"{name}" = ?' for name in key)
