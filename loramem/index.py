"""The SQLite index: which record is in which adapter, and the journal of writes.

One transaction is one commit. SQLite does not checksum content, so every row carries its own sha256 and ``meta``
one digest over all rows; both are renewed in the same transaction.
"""

import difflib
import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlite_utils import Database, Migrations
from sqlite_utils.db import NotFoundError

from loramem.boundary import Outcome
from loramem.errors import IntegrityError
from loramem.records import Record

MIGRATIONS = Migrations("loramem")
PENDING, COMMITTED, FAILED, DISCARDED = "pending", "committed", "failed", "discarded"


@MIGRATIONS()
def format_1(db: Database) -> None:
    db.table("records").create(
        {
            "namespace": str,
            "key": str,
            "value": str,
            "salt": str,
            "digest": str,
            "metadata": str,
            "prompt_sha256": str,
            "answer_tokens": int,
            "adapter": str,
            "min_prob": float,
            "written_at": str,
            "row_sha256": str,
        },
        pk=("namespace", "key"),
        not_null={"salt", "digest", "adapter", "answer_tokens", "row_sha256"},
    )
    db.table("records").create_index(["adapter"])
    db.table("records").create_index(["namespace", "prompt_sha256"], unique=True)
    db.table("adapters").create(
        {
            "id": str,
            "namespace": str,
            "rank": int,
            "parameters": int,
            "size_bytes": int,
            "files": str,
            "placement": str,
            "training": str,
            "proof": str,
            "created_at": str,
            "row_sha256": str,
        },
        pk="id",
    )
    db.table("writes").create(
        {"id": int, "state": str, "started_at": str, "ended_at": str, "count": int, "records": str, "request": str},
        pk="id",
    )
    db.table("meta").create({"name": str, "value": str}, pk="name")


@MIGRATIONS()
def format_1_outcomes(db: Database) -> None:
    """What writes came to, for the success boundary: knowledge, not content, so no digest covers it."""
    db.table("outcomes").create(
        {
            "id": int,
            "kind": str,
            "rank": int,
            "length": int,
            "parameters": int,
            "cost_bits": float,
            "certified": int,
            "visits": float,
            "noted_at": str,
        },
        pk="id",
    )


@dataclass(frozen=True)
class StoredRecord:
    """A committed record as the index knows it."""

    namespace: str
    key: str
    value: str | None
    """None when the store keeps digests only."""
    salt: str
    digest: str
    metadata: dict[str, Any]
    prompt_sha256: str
    answer_tokens: int
    """ℓ, the end token not counted."""
    adapter: str
    min_prob: float
    """The record's certificate: lowest teacher-forced probability, proved when it was written."""
    written_at: str

    def holds(self, value: str) -> bool:
        """Whether ``value`` is the committed one, by its salted digest."""
        return secrets.compare_digest(self.digest, digest_of(self.salt, self.namespace, self.key, value))


@dataclass(frozen=True)
class StoredAdapter:
    """A committed adapter as the index knows it."""

    id: str
    namespace: str
    rank: int
    parameters: int
    size_bytes: int
    files: dict[str, str]
    """File name -> sha256."""
    placement: dict[str, Any]
    training: dict[str, Any]
    proof: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class PendingWrite:
    """A journalled write that has not been committed."""

    id: int
    started_at: str
    records: list[Record]
    request: dict[str, Any]


def digest_of(salt: str, namespace: str, key: str, value: str) -> str:
    """Salted SHA-256 of a record; it binds the value to its key."""
    return hashlib.sha256(json.dumps([salt, namespace, key, value]).encode()).hexdigest()


def stored_record(
    record: Record, prompt_ids: Sequence[int], answer_tokens: int, adapter: str, min_prob: float
) -> StoredRecord:
    """The index row of a record that has just been proved."""
    salt = secrets.token_hex(16)
    return StoredRecord(
        namespace=record.namespace,
        key=record.key,
        value=record.value,
        salt=salt,
        digest=digest_of(salt, record.namespace, record.key, record.value),
        metadata=dict(record.metadata),
        prompt_sha256=prompt_digest(prompt_ids),
        answer_tokens=answer_tokens,
        adapter=adapter,
        min_prob=min_prob,
        written_at=now(),
    )


def prompt_digest(prompt_ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Index:
    """The database of one store. Not thread-safe by itself: the store holds a lock around it."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)  # SQLite gives its side files the mode of the database
        connection = sqlite3.connect(path, check_same_thread=False, timeout=30)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA secure_delete=ON")
        self.db = Database(connection)
        if MIGRATIONS.pending(self.db):
            MIGRATIONS.apply(self.db)

    @classmethod
    def open(cls, path: Path) -> "Index":
        """The index of an existing store.

        Raises:
            IntegrityError: It is missing, or not a database that SQLite can read.
        """
        if not path.exists():
            raise IntegrityError(f"{path} is missing. Restore it from a backup.", what=path.name)
        try:
            return cls(path)
        except sqlite3.DatabaseError as error:
            raise IntegrityError(f"{path} is damaged ({error}). Restore it from a backup.", what=path.name) from None

    def close(self) -> None:
        self.db.close()

    # Reading

    def find(self, namespace: str, key: str) -> StoredRecord | None:
        try:
            return _record(self.db.table("records").get((namespace, key)))
        except NotFoundError:
            return None

    def find_prompt(self, namespace: str, prompt_sha256: str) -> str | None:
        """The key that has these prompt token ids, if any."""
        rows = self.db.query(
            "select key from records where namespace = ? and prompt_sha256 = ?", [namespace, prompt_sha256]
        )
        return next((row["key"] for row in rows), None)

    def records(self, namespace: str | None = None, adapter: str | None = None) -> Iterator[StoredRecord]:
        """Committed records by adapter, in the order they were written."""
        wanted = {"namespace": namespace, "adapter": adapter}
        conditions = {name: value for name, value in wanted.items() if value is not None}
        where = " and ".join(f"{name} = :{name}" for name in conditions) or None
        for row in self.db.table("records").rows_where(where, conditions, order_by="adapter, rowid"):
            yield _record(row)

    def keys(self, namespace: str) -> Iterator[str]:
        for row in self.db.query("select key from records where namespace = ? order by rowid", [namespace]):
            yield row["key"]

    def close_keys(self, namespace: str, key: str) -> list[str]:
        """Up to three similar keys."""
        return difflib.get_close_matches(key, list(self.keys(namespace)), n=3)

    def count(self, namespace: str | None = None) -> int:
        if namespace is None:
            return int(self.db.table("records").count)
        return int(self.db.table("records").count_where("namespace = ?", [namespace]))

    def adapter(self, adapter: str) -> StoredAdapter | None:
        try:
            return _adapter(self.db.table("adapters").get(adapter))
        except NotFoundError:
            return None

    def adapters(self) -> Iterator[StoredAdapter]:
        for row in self.db.table("adapters").rows_where(order_by="rowid"):
            yield _adapter(row)

    # The journal

    def begin_write(self, records: Iterable[Record], request: dict[str, Any]) -> int:
        """Journal a write durably before training starts; returns its id."""
        rows = [
            {"key": r.key, "value": r.value, "namespace": r.namespace, "metadata": dict(r.metadata)} for r in records
        ]
        with self.db.atomic():
            table = self.db.table("writes").insert(
                {
                    "state": PENDING,
                    "started_at": now(),
                    "count": len(rows),
                    "records": json.dumps(rows),
                    "request": json.dumps(request),
                }
            )
        return int(str(table.last_pk))

    def pending_write(self) -> PendingWrite | None:
        for row in self.db.table("writes").rows_where("state = ?", [PENDING], order_by="id"):
            records = [Record(**entry) for entry in json.loads(row["records"])]
            return PendingWrite(row["id"], row["started_at"], records, json.loads(row["request"]))
        return None

    def end_write(self, write_id: int, state: str, learnt: Iterable[Outcome] = ()) -> None:
        """Close a journalled write and forget its values, but not what it taught."""
        with self.db.atomic():
            self._end_write(write_id, state)
            self._note_outcomes(learnt)

    def outcomes(self) -> list[Outcome]:
        """Of the writes to this store, oldest first."""
        rows = self.db.table("outcomes").rows_where(order_by="id")
        kept = ({name: value for name, value in row.items() if name not in ("id", "noted_at")} for row in rows)
        return [Outcome(**{**fields, "certified": bool(fields["certified"])}) for fields in kept]

    def _note_outcomes(self, learnt: Iterable[Outcome]) -> None:
        self.db.table("outcomes").insert_all({**vars(outcome), "noted_at": now()} for outcome in learnt)

    def commit(
        self,
        write_id: int,
        adapters: Iterable[StoredAdapter],
        records: Iterable[StoredRecord],
        learnt: Iterable[Outcome] = (),
    ) -> None:
        """Make adapters and records visible, all or nothing."""
        with self.db.atomic():
            for adapter in adapters:
                self.db.table("adapters").upsert(_seal(_adapter_row(adapter)), pk="id")
            self.db.table("records").insert_all(_seal(_record_row(record)) for record in records)
            self._end_write(write_id, COMMITTED)
            self._note_outcomes(learnt)
            self.set_meta("rows_sha256", self.rows_digest())

    def _end_write(self, write_id: int, state: str) -> None:
        self.db.table("writes").update(write_id, {"state": state, "ended_at": now(), "records": None})

    # Integrity

    def seal(self, manifest_sha256: str) -> None:
        """Finish a new, empty index: bind it to its manifest."""
        with self.db.atomic():
            self.set_meta("manifest_sha256", manifest_sha256)
            self.set_meta("rows_sha256", self.rows_digest())

    def meta(self, name: str) -> str | None:
        try:
            value: str = self.db.table("meta").get(name)["value"]
            return value
        except NotFoundError:
            return None

    def set_meta(self, name: str, value: str) -> None:
        self.db.table("meta").upsert({"name": name, "value": value}, pk="name")

    def rows_digest(self) -> str:
        """One digest over the seals of all rows: a lost row shows."""
        digest = hashlib.sha256()
        for table, order in (("adapters", "id"), ("records", "namespace, key")):
            for row in self.db.query(f"select row_sha256 from {table} order by {order}"):
                digest.update(f"{table}:{row['row_sha256']}\n".encode())
        return digest.hexdigest()

    def damaged(self) -> Iterator[str]:
        """What in the index is not as committed, in words; nothing if all is well."""
        for row in self.db.query("pragma integrity_check"):
            if row["integrity_check"] != "ok":
                yield f"index.db: {row['integrity_check']}"
        for table, name in (("adapters", "id"), ("records", "key")):
            for row in self.db.table(table).rows:
                if _seal({k: v for k, v in row.items() if k != "row_sha256"})["row_sha256"] != row["row_sha256"]:
                    yield f"index row of {table} {row[name]!r}"
        committed = self.meta("rows_sha256")
        if committed is not None and committed != self.rows_digest():
            yield "index.db: rows were lost, added or replaced"


def _seal(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its own sha256."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=True)
    return {**row, "row_sha256": hashlib.sha256(content.encode()).hexdigest()}


def _record_row(record: StoredRecord) -> dict[str, Any]:
    return {**vars(record), "metadata": json.dumps(record.metadata, sort_keys=True)}


def _record(row: dict[str, Any]) -> StoredRecord:
    fields = {name: value for name, value in row.items() if name != "row_sha256"}
    return StoredRecord(**{**fields, "metadata": _column(row, "metadata")})


def _column(row: dict[str, Any], name: str) -> Any:
    """A JSON column of a row.

    Raises:
        IntegrityError: It is not JSON any more.
    """
    try:
        return json.loads(row[name])
    except (ValueError, TypeError):
        raise IntegrityError(
            f"index.db: column {name!r} of a row is not what was committed. Run loramem verify.", what="index.db"
        ) from None


JSON_COLUMNS = ("files", "placement", "training", "proof")


def _adapter_row(adapter: StoredAdapter) -> dict[str, Any]:
    return {**vars(adapter), **{name: json.dumps(vars(adapter)[name], sort_keys=True) for name in JSON_COLUMNS}}


def _adapter(row: dict[str, Any]) -> StoredAdapter:
    fields = {name: value for name, value in row.items() if name != "row_sha256"}
    return StoredAdapter(**{**fields, **{name: _column(row, name) for name in JSON_COLUMNS}})
