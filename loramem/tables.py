"""What the index keeps: tables, their migrations, and rows as frozen dataclasses.

SQLite does not checksum content, so every row of the sealed tables carries its own sha256.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database, Migrations

from loramem.errors import IntegrityError
from loramem.records import Record

MIGRATIONS = Migrations("loramem")
SEALED = (
    ("adapters", "id"),
    ("records", "namespace, key"),
    ("versions", "id"),
    ("retired", "adapter"),
    ("writes", "id"),
    ("publications", "repo"),
)
"""Tables whose rows are sealed, and the order in which the digest over all rows takes them."""
PENDING, COMMITTED, FAILED, DISCARDED = "pending", "committed", "failed", "discarded"
REPLACED, DELETED, RENAMED = "replaced", "deleted", "renamed"


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


@MIGRATIONS()
def format_1_changes(db: Database) -> None:
    """Records that ended, adapters that no record needs, a sealed journal; no digest of an older index changes."""
    db.table("versions").create(
        {
            "id": int,
            "namespace": str,
            "key": str,
            "written_at": str,
            "ended_at": str,
            "ended_by": str,
            "successor": str,
            "adapter": str,
            "answer_tokens": int,
            "min_prob": float,
            "row_sha256": str,
        },
        pk="id",
        not_null={"namespace", "key", "ended_by", "adapter", "row_sha256"},
    )
    db.table("versions").create_index(["namespace", "key"])
    db.table("versions").create_index(["adapter"])
    db.table("retired").create({"adapter": str, "retired_at": str, "row_sha256": str}, pk="adapter")
    db.table("writes").add_column("row_sha256", str)


@MIGRATIONS()
def format_1_publications(db: Database) -> None:
    """What the store knows of the Hub repositories that it is published in."""
    db.table("publications").create({"repo": str, "commit": str, "sent": str, "row_sha256": str}, pk="repo")


@MIGRATIONS()
def format_1_prompts(db: Database) -> None:
    """Prompts that are not prefix, key and suffix, and which keys may be asked by chat; unknown of older records."""
    db.table("records").add_column("prompt", str)


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
    """UTC, ISO 8601."""
    prompt: dict[str, Any] | None = None
    """`loramem.chat.Chat.kept`; None for a plain prompt, and of records that were written before this was kept."""

    @property
    def chat(self) -> bool | None:
        """Whether the key as a chat's user message has the ids that were trained; None where that is not known."""
        return None if self.prompt is None else bool(self.prompt["chat"])

    def holds(self, value: str) -> bool:
        """Whether ``value`` is the committed one, by its salted digest."""
        expected = digest_of(self.salt, self.namespace, self.key, value)
        return secrets.compare_digest(self.digest.encode(), expected.encode())

    def has(self, metadata: Mapping[str, str]) -> bool:
        """Whether every one of these is in the record's metadata; what is not a string is compared as JSON text."""
        return all(name in self.metadata and _text(self.metadata[name]) == text for name, text in metadata.items())


@dataclass(frozen=True)
class StoredVersion:
    """A record that was replaced, deleted or renamed; its value is not kept here.

    It is a tombstone as long as its adapter, whose weights still hold the value, is in the index.
    """

    namespace: str
    key: str
    written_at: str
    ended_at: str
    ended_by: str
    """"replaced", "deleted" or "renamed"."""
    successor: str | None
    """The new key, if it was renamed."""
    adapter: str
    answer_tokens: int
    min_prob: float


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


def hidden_names(key_salt: str, namespace: str, key: str) -> tuple[str, str]:
    """What stands for a namespace and a key where they are not told: salted digests of 32 and 64 hex digits."""
    digests = [hashlib.sha256(json.dumps([key_salt, *names]).encode()) for names in ([namespace], [namespace, key])]
    return digests[0].hexdigest()[:32], digests[1].hexdigest()


def stored_record(
    record: Record,
    prompt_ids: Sequence[int],
    answer_tokens: int,
    adapter: str,
    min_prob: float,
    *,
    keep_value: bool,
    prompt: Mapping[str, Any] | None = None,
) -> StoredRecord:
    """The index row of a record that has just been proved."""
    salt = secrets.token_hex(16)
    return StoredRecord(
        namespace=record.namespace,
        key=record.key,
        value=record.value if keep_value else None,
        salt=salt,
        digest=digest_of(salt, record.namespace, record.key, record.value),
        metadata=dict(record.metadata),
        prompt_sha256=prompt_digest(prompt_ids),
        answer_tokens=answer_tokens,
        adapter=adapter,
        min_prob=min_prob,
        written_at=now(),
        prompt=None if prompt is None else dict(prompt),
    )


def prompt_digest(prompt_ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


LATER = frozenset({"prompt"})
"""Columns that rows were sealed without before there were any: no seal covers them where they hold nothing."""


def seal(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its own sha256."""
    sealed = {name: value for name, value in row.items() if value is not None or name not in LATER}
    content = json.dumps(sealed, sort_keys=True, ensure_ascii=True)
    return {**row, "row_sha256": hashlib.sha256(content.encode()).hexdigest()}


def is_sealed(row: dict[str, Any]) -> bool:
    """Whether a row of a sealed table is as it was committed."""
    content = {name: value for name, value in row.items() if name != "row_sha256"}
    try:
        return bool(seal(content)["row_sha256"] == row["row_sha256"])
    except TypeError:  # bytes where text was
        return False


def record_row(record: StoredRecord) -> dict[str, Any]:
    prompt = None if record.prompt is None else json.dumps(record.prompt, sort_keys=True)
    return seal({**vars(record), "metadata": json.dumps(record.metadata, sort_keys=True), "prompt": prompt})


def record_of(row: dict[str, Any]) -> StoredRecord:
    fields = {name: value for name, value in row.items() if name != "row_sha256"}
    prompt = None if row["prompt"] is None else _column(row, "prompt")
    return StoredRecord(**{**fields, "metadata": _column(row, "metadata"), "prompt": prompt})


def version_row(number: int, record: StoredRecord, ended_by: str, successor: str | None = None) -> dict[str, Any]:
    """The row that a record leaves when it ends."""
    kept = ("namespace", "key", "written_at", "adapter", "answer_tokens", "min_prob")
    return seal(
        {
            "id": number,
            **{name: vars(record)[name] for name in kept},
            "ended_at": now(),
            "ended_by": ended_by,
            "successor": successor,
        }
    )


def version_of(row: dict[str, Any]) -> StoredVersion:
    return StoredVersion(**{name: value for name, value in row.items() if name not in ("id", "row_sha256")})


_JSON_COLUMNS = ("files", "placement", "training", "proof")


def adapter_row(adapter: StoredAdapter) -> dict[str, Any]:
    return seal({**vars(adapter), **{name: json.dumps(vars(adapter)[name], sort_keys=True) for name in _JSON_COLUMNS}})


def adapter_of(row: dict[str, Any]) -> StoredAdapter:
    fields = {name: value for name, value in row.items() if name != "row_sha256"}
    return StoredAdapter(**{**fields, **{name: _column(row, name) for name in _JSON_COLUMNS}})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


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
