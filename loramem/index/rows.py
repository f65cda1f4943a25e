"""What the index keeps, as frozen dataclasses, and as the rows of its tables."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from loramem.errors import IntegrityError
from loramem.records.record import Record

PENDING, COMMITTED, FAILED, DISCARDED = "pending", "committed", "failed", "discarded"
REPLACED, DELETED, RENAMED = "replaced", "deleted", "renamed"
_sorted_json = json.JSONEncoder(sort_keys=True).encode  # made once: `json.dumps` makes one a call


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
    """`loramem.records.chat.Chat.kept`; None for a plain prompt, and of records that were written before this was
    kept."""
    question_of: str | None = None
    """Of a question: the key of the record that it asks for. Its value is that record's."""

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


class Ended(NamedTuple):
    """A record that ends with a write, which does not replace it."""

    namespace: str
    key: str
    how: str
    """Such as "renamed"."""
    successor: str | None
    """The new key, if it was renamed."""


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
    question_of: str | None = None
    """As in `StoredRecord`."""


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
class Located:
    """A live record and the adapter that holds it, as the index had both at one moment."""

    record: StoredRecord
    adapter: StoredAdapter


@dataclass(frozen=True)
class PendingWrite:
    """A journalled write that has not been committed."""

    id: int
    started_at: str
    records: list[Record]
    request: dict[str, Any]
    """`loramem.store.request.WriteRequest` as JSON, and the plan; what they say is none of the index's business."""


def digest_of(salt: str, namespace: str, key: str, value: str) -> str:
    """Salted SHA-256 of a record; it binds the value to its key."""
    return hashlib.sha256(json.dumps([salt, namespace, key, value]).encode()).hexdigest()


def hidden_names(key_salt: str, namespace: str, key: str) -> tuple[str, str]:
    """What stands for a namespace and a key where they are not told: salted digests of 32 and 64 hex digits."""
    digests = [hashlib.sha256(json.dumps([key_salt, *names]).encode()) for names in ([namespace], [namespace, key])]
    return digests[0].hexdigest()[:32], digests[1].hexdigest()


def stored_record(
    record: Record,
    prompt_sha256: str,
    answer_tokens: int,
    adapter: str,
    min_prob: float,
    *,
    keep_value: bool,
    prompt: Mapping[str, Any] | None = None,
    written_at: str | None = None,
) -> StoredRecord:
    """The index row of a record that has just been proved.

    Args:
        written_at: Now unless given.
    """
    salt = secrets.token_hex(16)
    return StoredRecord(
        namespace=record.namespace,
        key=record.key,
        value=record.value if keep_value else None,
        salt=salt,
        digest=digest_of(salt, record.namespace, record.key, record.value),
        metadata=dict(record.metadata),
        prompt_sha256=prompt_sha256,
        answer_tokens=answer_tokens,
        adapter=adapter,
        min_prob=min_prob,
        written_at=written_at or now(),
        prompt=None if prompt is None else dict(prompt),
        question_of=record.question_of,
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_row(record: StoredRecord) -> dict[str, Any]:
    prompt = None if record.prompt is None else _sorted_json(record.prompt)
    return {**vars(record), "metadata": _sorted_json(record.metadata), "prompt": prompt}


def record_of(row: Mapping[str, Any]) -> StoredRecord:
    prompt = None if row["prompt"] is None else _column(row, "prompt")
    return StoredRecord(**{**_fields(StoredRecord, row), "metadata": _column(row, "metadata"), "prompt": prompt})


def version_row(number: int, record: StoredRecord, ended_by: str, successor: str | None = None) -> dict[str, Any]:
    """The row that a record leaves when it ends."""
    kept = ("namespace", "key", "written_at", "adapter", "answer_tokens", "min_prob", "question_of")
    return {
        "id": number,
        **{name: vars(record)[name] for name in kept},
        "ended_at": now(),
        "ended_by": ended_by,
        "successor": successor,
    }


def version_of(row: Mapping[str, Any]) -> StoredVersion:
    return StoredVersion(**_fields(StoredVersion, row))


_JSON_COLUMNS = ("files", "placement", "training", "proof")


def adapter_row(adapter: StoredAdapter) -> dict[str, Any]:
    return {**vars(adapter), **{name: _sorted_json(vars(adapter)[name]) for name in _JSON_COLUMNS}}


def adapter_of(row: Mapping[str, Any]) -> StoredAdapter:
    return StoredAdapter(**{**_fields(StoredAdapter, row), **{name: _column(row, name) for name in _JSON_COLUMNS}})


def _fields(kind: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(kind)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _column(row: Mapping[str, Any], name: str) -> Any:
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
