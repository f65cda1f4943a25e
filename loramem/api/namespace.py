"""One namespace of a store as a store of its own: the same methods, the namespace filled in."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from loramem.errors import InvalidField
from loramem.index.rows import StoredRecord
from loramem.planning.plan import Plan
from loramem.records.record import Record, RecordLike, iterate_records
from loramem.results import EraseReport, Explanation, Recall, Version, WriteReport


class Namespace:
    """What `MemoryStore.namespace` gives: its records counted, listed, read and changed as a store's own are.

    Every method is the store's of that name, with the same further arguments and errors. Nothing is kept here: the
    view sees what the store holds, as long as the store is open.

    Example:
        >>> import tempfile
        >>> from loramem import MemoryStore
        >>> with MemoryStore(tempfile.mkdtemp() + "/memory") as store:
        ...     team = store.namespace("team")
        ...     report = team.write({"door:": "0417"})
        ...     team.recall("door:"), len(team), list(team), len(store)
        ('0417', 1, ['door:'], 0)
    """

    def __init__(self, store: "_Store", name: str) -> None:
        Record("?", "?", name)  # raises if no record can be there
        self.name, self._store = name, store

    def __repr__(self) -> str:
        return f"<namespace {self.name!r} of {self._store!r}>"

    def __len__(self) -> int:
        return self._store._count(self.name)

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return self._store._holds(key, self.name)

    def keys(self) -> Iterator[str]:
        """In the order they were written."""
        return self._store.keys(self.name)

    def record(self, key: str) -> StoredRecord:
        """The index row of a key, without decoding anything."""
        return self._store.record(key, self.name)

    def records(self, adapter: str | None = None, **options: Any) -> Iterator[StoredRecord]:
        """Index rows, without decoding anything."""
        return self._store._records(self.name, adapter, **options)

    def iter_records(self, adapter: str | None = None, **options: Any) -> Iterator[StoredRecord]:
        """Index rows, read as they are asked for."""
        return self._store._iter_records(self.name, adapter, **options)

    def iter_asked(self, adapter: str | None = None, **options: Any) -> Iterator[tuple[StoredRecord, list[str]]]:
        """Index rows, read as they are asked for, each with what else gives its value."""
        return self._store._iter_asked(self.name, adapter, **options)

    def history(self, key: str) -> list[Version]:
        """What the key held and holds."""
        return self._store.history(key, self.name)

    def questions(self, key: str) -> list[str]:
        """What else gives the value of a key."""
        return self._store.questions(key, self.name)

    def recall(self, key: str) -> str:
        """Decode a value from the weights."""
        return self._store.recall(key, self.name)

    def recall_many(self, keys: Iterable[str] | None = None, *, ordered: bool = True) -> Iterator[Recall]:
        """Decode many values; all if ``keys`` is None."""
        return self._store.recall_many(keys, self.name, ordered=ordered)

    def explain(self, key: str) -> Explanation:
        """Probability of every answer token and the end token."""
        return self._store.explain(key, self.name)

    def load(self, key: str) -> tuple[Any, list[int]]:
        """The base model with the adapter of ``key`` active, and the prompt's ids."""
        return self._store.load(key, self.name)

    def prompt(self, key: str) -> tuple[StoredRecord, list[int]]:
        """A key's index row and the ids that its adapter is asked with."""
        return self._store.prompt(key, self.name)

    def plan(self, records: Mapping[str, str] | Iterable[RecordLike], **options: Any) -> Plan:
        """What `write` would do with these records.

        Raises:
            InvalidField: A record names another namespace; otherwise as the store's.
        """
        return self._store.plan(self._own(records), namespace=self.name, **options)

    def write(self, records: Mapping[str, str] | Iterable[RecordLike], **options: Any) -> WriteReport:
        """Write records here, also a `Record` that names no namespace.

        Raises:
            InvalidField: A record names another namespace; otherwise as the store's.
        """
        return self._store.write(self._own(records), namespace=self.name, **options)

    def write_batches(self, records: Mapping[str, str] | Iterable[RecordLike], **options: Any) -> Iterator[WriteReport]:
        """Write records of an input of any length here, so many at a time.

        Raises what `write` raises.
        """
        return self._store.write_batches(self._own(records), namespace=self.name, **options)

    def update(self, key: str, value: str | None = None, **options: Any) -> WriteReport:
        """Give a record another value, other metadata, or both."""
        return self._store.update(key, value, namespace=self.name, **options)

    def rename(self, key: str, new_key: str, **options: Any) -> WriteReport:
        """Write a record's value under another key and end the old one."""
        return self._store.rename(key, new_key, namespace=self.name, **options)

    def delete(self, keys: str | Iterable[str]) -> int:
        """Stop recalling one record or several."""
        return self._store.delete(keys, self.name)

    def erase(self, keys: str | Iterable[str], **options: Any) -> EraseReport:
        """Delete records for real."""
        return self._store.erase(keys, self.name, **options)

    def _own(self, records: Mapping[str, str] | Iterable[RecordLike]) -> Iterator[Record]:
        for record in iterate_records(records, self.name):
            if record.namespace not in ("", self.name):
                raise InvalidField(
                    f"The record {record.key!r} is for namespace {record.namespace!r}, not {self.name!r}: write it to "
                    "the store itself.",
                    key=record.key,
                    line=record.line,
                )
            yield record


class _Store(Protocol):
    """Of `MemoryStore`, which makes these views and so cannot be imported here, what they call."""

    def _count(self, namespace: str) -> int: ...
    def _holds(self, key: object, namespace: str) -> bool: ...
    def keys(self, namespace: str) -> Iterator[str]: ...
    def record(self, key: str, namespace: str) -> StoredRecord: ...
    def _records(self, *args: Any, **kwargs: Any) -> Iterator[StoredRecord]: ...
    def _iter_records(self, *args: Any, **kwargs: Any) -> Iterator[StoredRecord]: ...
    def _iter_asked(self, *args: Any, **kwargs: Any) -> Iterator[tuple[StoredRecord, list[str]]]: ...
    def history(self, key: str, namespace: str) -> list[Version]: ...
    def questions(self, key: str, namespace: str) -> list[str]: ...
    def recall(self, key: str, namespace: str) -> str: ...
    def recall_many(self, *args: Any, **kwargs: Any) -> Iterator[Recall]: ...
    def explain(self, key: str, namespace: str) -> Explanation: ...
    def load(self, key: str, namespace: str) -> tuple[Any, list[int]]: ...
    def prompt(self, key: str, namespace: str) -> tuple[StoredRecord, list[int]]: ...
    def plan(self, *args: Any, **kwargs: Any) -> Plan: ...
    def write(self, *args: Any, **kwargs: Any) -> WriteReport: ...
    def write_batches(self, *args: Any, **kwargs: Any) -> Iterator[WriteReport]: ...
    def update(self, *args: Any, **kwargs: Any) -> WriteReport: ...
    def rename(self, *args: Any, **kwargs: Any) -> WriteReport: ...
    def delete(self, keys: str | Iterable[str], namespace: str) -> int: ...
    def erase(self, *args: Any, **kwargs: Any) -> EraseReport: ...
