"""The SQLite index of a store: which record is in which adapter, and the journal of writes.

Only reading and the journal are here; `loramem.commits` holds what changes records, each change one transaction.
"""

import difflib
import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlite_utils import Database
from sqlite_utils.db import NotFoundError

from loramem.boundary import Outcome
from loramem.database import BUSY_S, connect, connect_read_only, sqlite_errors
from loramem.errors import IntegrityError, StoreLocked
from loramem.locks import write_lock
from loramem.records import Record, journalled
from loramem.tables import (
    MIGRATIONS,
    PENDING,
    RENAMED,
    REPLACED,
    SEALED,
    PendingWrite,
    StoredAdapter,
    StoredRecord,
    StoredVersion,
    adapter_of,
    hidden_names,
    is_sealed,
    now,
    record_of,
    seal,
    version_of,
)

NAME = "index.db"
CLOSE_KEYS = 20_000
"""So many keys are compared roughly with an unknown one, a hundredth of them closely."""
VACUUM_DUE = "vacuum_due"  # in meta: records were erased and the file may still hold them
META = frozenset({"manifest_sha256", "rows_sha256", VACUUM_DUE})


class Index:
    """The database of one store. Not thread-safe by itself: the store holds a lock around it.

    Attributes:
        key_salt: Set for a store whose rows hold digests in place of namespaces and keys: what `find` looks for then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_salt: str | None = None
        self.read_only = path.exists() and not os.access(path.parent, os.W_OK)
        connection = connect_read_only(path) if self.read_only else connect(path)
        self.db = Database(connection)

    @classmethod
    def open(cls, path: Path) -> "Index":
        """The index of an existing store, up to date, for reading alone if its folder cannot be written.

        Raises:
            IntegrityError: It is missing, or not a database that SQLite can read.
            StoreError: SQLite could not read it now, such as on a disk that fails.
            StoreLocked: It is of an older format, and another process is writing.
            StoreReadOnly: It cannot be written, and a commit in its write-ahead log has not reached it.
        """
        if not path.exists():
            raise IntegrityError(f"{path} is missing. Restore it from a backup.", what=path.name)
        with sqlite_errors(path):
            index = cls(path)
            try:
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

    def close(self) -> None:
        self.db.close()

    def snapshot(self) -> AbstractContextManager[Database]:
        """Within this context every query sees the same committed state; outside, each sees the newest."""
        return self.db.atomic()

    @contextmanager
    def change(self) -> Iterator[None]:
        """One transaction that changes rows, all or nothing; it waits for others before it reads, not midway."""
        self.db.conn.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.commit()
        except BaseException:
            self.db.rollback()
            raise

    # Reading

    def find(self, namespace: str, key: str) -> StoredRecord | None:
        """A live record.

        Raises:
            IntegrityError: Its row is not what was committed.
        """
        names = (namespace, key) if self.key_salt is None else hidden_names(self.key_salt, namespace, key)
        row = self._row("records", names)
        return None if row is None else replace(record_of(row), namespace=namespace, key=key)

    def find_prompt(self, namespace: str, prompt_sha256: str) -> str | None:
        """The key that has these prompt token ids, if any."""
        rows = self.db.query(
            "select key from records where namespace = ? and prompt_sha256 = ?", [namespace, prompt_sha256]
        )
        return next((row["key"] for row in rows), None)

    def records(
        self,
        namespace: str | None = None,
        adapter: str | None = None,
        *,
        since: str | None = None,
        until: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[StoredRecord]:
        """Committed records by adapter, in the order they were written.

        Args:
            since: Written at this time or later (UTC, ISO 8601 to the second).
            until: Written before this time.
            metadata: Names and values that a record's metadata must have.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        wanted = {
            "namespace = :namespace": namespace,
            "adapter = :adapter": adapter,
            "written_at >= :since": since,
            "written_at < :until": until,
        }
        conditions = [condition for condition, value in wanted.items() if value is not None]
        values = {"namespace": namespace, "adapter": adapter, "since": since, "until": until}
        where = " and ".join(conditions) or None
        for row in self._rows("records", where, values, order_by="adapter, rowid"):
            record = record_of(row)
            if not metadata or record.has(metadata):
                yield record

    def in_order(self, namespace: str) -> Iterator[StoredRecord]:
        """Live records of a namespace in the order they were written, that of `keys`.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        rows = self._rows("records", "namespace = :namespace", {"namespace": namespace}, order_by="rowid")
        return map(record_of, rows)

    def written(self, adapters: Iterable[str]) -> list[StoredRecord]:
        """Live records of some adapters, in the order they were written.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        wanted = set(adapters)
        rows = self._rows("records", order_by="rowid")
        return [record_of(row) for row in rows if row["adapter"] in wanted]

    def keys(self, namespace: str) -> Iterator[str]:
        for row in self.db.query("select key from records where namespace = ? order by rowid", [namespace]):
            yield row["key"]

    def namespaces(self) -> list[str]:
        return [row["namespace"] for row in self.db.query("select distinct namespace from records order by namespace")]

    def close_keys(self, namespace: str, key: str) -> list[str]:
        """Up to three similar keys, in a tenth of a second at 10,000 keys and at most twice that at more.

        difflib takes 0.1 ms a key: it sees those alone that share most pairs of letters.
        """
        rows = "select key from records where namespace = ? and length(key) between ? and ? order by rowid limit ?"
        bounds = [len(key) // 2, len(key) * 2, CLOSE_KEYS]
        keys = [row["key"] for row in self.db.query(rows, [namespace, *bounds])]
        pairs = set(pairwise(key))
        alike = heapq.nlargest(CLOSE_KEYS // 100, keys, key=lambda other: len(pairs.intersection(pairwise(other))))
        return difflib.get_close_matches(key, alike, n=3)

    def count(self, namespace: str | None = None) -> int:
        if namespace is None:
            return int(self.db.table("records").count)
        return int(self.db.table("records").count_where("namespace = ?", [namespace]))

    def versions(self, namespace: str, key: str, *, renamed: bool = False) -> dict[int, StoredVersion]:
        """What the record of a key was before, oldest first, also under the names it had; by row id.

        Rows are numbered as records end, so one that took a name after a rename is told from the one that left it.

        Args:
            renamed: Also what had the key before and has another one now.
        """
        names, found = [(key, self.next_id("versions"))], dict[int, dict[str, Any]]()
        while names:
            name, last = names.pop()
            for row in self.db.table("versions").rows_where(
                "namespace = ? and (key = ? or successor = ?) and id <= ?",
                [namespace, name, name, last],
                order_by="id desc",
            ):
                if row["key"] != name:
                    names.append((row["key"], row["id"]))
                elif row["ended_by"] == RENAMED and row["id"] != last and not (renamed and name == key):
                    break
                found[row["id"]] = row
        return {number: version_of(found[number]) for number in sorted(found)}

    def successor(self, namespace: str, key: str) -> str | None:
        """The key under which the record that had this one last can be found now, if it was renamed."""
        rows = "namespace = ? and key = ? and id > ? and ended_by != ?"
        gone = list(self.db.table("versions").rows_where(rows, [namespace, key, 0, REPLACED], order_by="id desc"))
        found = None
        while gone and gone[0]["ended_by"] == RENAMED:
            found, last = gone[0]["successor"], gone[0]["id"]
            gone = list(self.db.table("versions").rows_where(rows, [namespace, found, last, REPLACED], order_by="id"))
        return found

    def adapter(self, adapter: str) -> StoredAdapter | None:
        """An adapter, retired or not.

        Raises:
            IntegrityError: Its row is not what was committed.
        """
        row = self._row("adapters", adapter)
        return None if row is None else adapter_of(row)

    def has_adapter(self, adapter: str) -> bool:
        """Whether there is a row of it, whatever it says."""
        return bool(self.db.table("adapters").count_where("id = ?", [adapter]))

    def adapters(self) -> Iterator[StoredAdapter]:
        """Those that hold live records, oldest first.

        Raises:
            IntegrityError: A row is not what was committed.
        """
        where = "id not in (select adapter from retired)"
        return map(adapter_of, self._rows("adapters", where, order_by="rowid"))

    def live(self) -> dict[str, str]:
        """Namespaces of the adapters that hold live records, whatever else their rows say; by id, oldest first."""
        query = "select id, namespace from adapters where id not in (select adapter from retired) order by rowid"
        return {row["id"]: row["namespace"] for row in self.db.query(query)}

    def retired(self) -> dict[str, str]:
        """Adapters that no live record needs, whose files are still there: id -> when that came (UTC, ISO 8601)."""
        return {row["adapter"]: row["retired_at"] for row in self.db.table("retired").rows}

    def tombstones(self) -> dict[str, int]:
        """How many keys ended in each adapter that is still there, if any: id -> count.

        A key that is live in the adapter again, since its value came back and with it the same weights, is none.
        """
        query = (
            "select adapter, count(*) as dead from (select distinct adapter, namespace, key from versions "
            "where adapter in (select id from adapters) except select adapter, namespace, key from records) group by 1"
        )
        return {row["adapter"]: row["dead"] for row in self.db.query(query)}

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

    def empty_log(self, wait_s: float = BUSY_S) -> bool:
        """Move every commit from the write-ahead log into the database; False if a reader was in the way."""
        self.db.execute(f"PRAGMA busy_timeout={wait_s * 1000:.0f}")
        try:
            (busy, *_) = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            self.db.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")
        return not busy

    # The journal

    def begin_write(self, records: Iterable[Record], request: dict[str, Any]) -> int:
        """Journal a write durably before training starts; returns its id."""
        rows = [
            {"key": r.key, "value": r.value, "namespace": r.namespace, "metadata": dict(r.metadata)} for r in records
        ]
        with self.change():
            number = self.next_id("writes")
            row = {
                "id": number,
                "state": PENDING,
                "started_at": now(),
                "ended_at": None,
                "count": len(rows),
                "records": json.dumps(rows),
                "request": json.dumps(request),
            }
            self.db.table("writes").insert(seal(row))
            self.seal_rows()
        return number

    def pending_write(self) -> PendingWrite | None:
        """The write that was journalled and neither committed nor given up.

        Raises:
            IntegrityError: Its row is not what was journalled.
        """
        for row in self.db.table("writes").rows_where("state = ?", [PENDING], order_by="id"):
            if row["row_sha256"] is not None and not is_sealed(row):
                raise IntegrityError(f"{self.path}: the journal of write {row['id']} is damaged.", what="writes")
            records = list(map(journalled, json.loads(row["records"])))
            return PendingWrite(row["id"], row["started_at"], records, json.loads(row["request"]))
        return None

    def outcomes(self) -> list[Outcome]:
        """Of the writes to this store, oldest first."""
        rows = self.db.table("outcomes").rows_where(order_by="id")
        kept = ({name: value for name, value in row.items() if name not in ("id", "noted_at")} for row in rows)
        return [Outcome(**{**fields, "certified": bool(fields["certified"])}) for fields in kept]

    # Integrity

    def _row(self, table: str, key: Any) -> dict[str, Any] | None:
        with sqlite_errors(self.path):
            try:
                return self._checked(table, self.db.table(table).get(key))
            except NotFoundError:
                return None

    def _rows(
        self, table: str, where: str | None = None, values: Mapping[str, Any] | None = None, *, order_by: str
    ) -> Iterator[dict[str, Any]]:
        with sqlite_errors(self.path):
            for row in self.db.table(table).rows_where(where, dict(values or {}), order_by=order_by):
                yield self._checked(table, row)

    def _checked(self, table: str, row: dict[str, Any]) -> dict[str, Any]:
        if is_sealed(row):
            return row
        what = str(row[{"adapters": "id", "records": "key", "publications": "repo"}[table]])
        raise IntegrityError(
            f"{self.path}: the row of {what!r} in {table} is not what was committed. Run loramem repair.", what=what
        )

    def next_id(self, table: str) -> int:
        """For a row whose seal covers its id, inside a transaction."""
        return int(next(self.db.query(f"select coalesce(max(id), 0) + 1 as id from {table}"))["id"])

    def seal_rows(self) -> None:
        """Renew the digest over all rows, inside the transaction that changed some."""
        self.set_meta("rows_sha256", self.rows_digest())

    def meta(self, name: str) -> str | None:
        try:
            value: str = self.db.table("meta").get(name)["value"]
            return value
        except NotFoundError:
            return None

    def set_meta(self, name: str, value: str) -> None:
        self.db.table("meta").upsert({"name": name, "value": value}, pk="name")

    def published(self, repo: str) -> tuple[str | None, str | None]:
        """Commit of a Hub repository that this store equals or began as; sha256 of a loramem.json on its way there."""
        row = self._row("publications", repo)
        return (None, None) if row is None else (row["commit"], row["sent"])

    def rows_digest(self) -> str:
        """One digest over the seals of all rows: a lost row shows."""
        digest = hashlib.sha256()
        for table, order in SEALED:
            seals = f"select row_sha256 from {table} where row_sha256 is not null order by {order}"
            for (row_sha256,) in self.db.conn.execute(seals):
                digest.update(f"{table}:{row_sha256}\n".encode())
        return digest.hexdigest()

    def damaged(self) -> Iterator[str]:
        """What in the index is not as committed, in words; nothing if all is well. A key is named, never a value."""
        for row in self.db.query("pragma integrity_check"):
            if row["integrity_check"] != "ok":
                yield f"index.db: {row['integrity_check']}"
        for table, order in SEALED:
            names = [name.strip() for name in order.split(",")]
            for row in self.db.table(table).rows_where("row_sha256 is not null"):
                if not is_sealed(row):
                    yield f"index row of {table} {', '.join(repr(row[name]) for name in names)}"
        for row in self.db.query("select name from meta order by name"):
            if row["name"] not in META:
                yield f"index row of meta {row['name']!r}"
        if self.meta("rows_sha256") != self.rows_digest():
            yield "index.db: rows were lost, added or replaced"
