"""What a store holds, as its index says: keys, rows, adapters, history, counts. Nothing is decoded, and no torch."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loramem._util.out_of_memory import memory_errors
from loramem.errors import KeyNotFound
from loramem.index.connection import sqlite_errors
from loramem.index.index import Index
from loramem.index.rows import PendingWrite, StoredAdapter, StoredRecord, hidden_names
from loramem.results import Stats, Version
from loramem.store.manifest import Manifest
from loramem.store.stats import history, stats


class Listing:
    """The part of `Memory` that asks the index alone."""

    path: Path
    manifest: Manifest
    _index: Index
    _lock: threading.RLock

    # Of the default namespace, as all that is not told another one: `stats` counts the whole store.

    def __len__(self) -> int:
        return self._count("")

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return self._holds(key, "")

    def keys(self, namespace: str = "") -> Iterator[str]:
        """Keys of a namespace in the order they were written; none where only digests of them were pulled."""
        with self._turn():
            return iter(list(self._index.keys(namespace)))

    def namespaces(self) -> list[str]:
        """Those that hold records, sorted; "" is the default one."""
        with self._turn():
            return self._index.namespaces()

    def record(self, key: str, namespace: str = "") -> StoredRecord:
        """The index row of a key, without decoding anything.

        Raises:
            KeyNotFound: No such record; carries close keys.
            IntegrityError: Its row is not what was committed.
        """
        with self._turn():
            return self._find(key, namespace)

    def records(
        self,
        namespace: str | None = "",
        adapter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[StoredRecord]:
        """Index rows, without decoding anything, adapter by adapter; no questions, which `questions` gives.

        Args:
            namespace: None for those of all namespaces. An adapter's are those of its own one where none is named.
            since: Written at this time or later; a time without a zone is local.
            until: Written before this time.
            metadata: Names and values that a record's metadata must have; values that are not strings as JSON text.
        """
        space = namespace if namespace or adapter is None else None
        return self._records(space, adapter, since=since, until=until, metadata=metadata)

    def iter_records(
        self,
        namespace: str | None = "",
        adapter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[StoredRecord]:
        """`records`, read as they are asked for: the first come at once, and memory does not grow with their number.

        All are of one committed state. As long as the iterator is not exhausted or closed, the index keeps that state
        beside newer ones, and `erase` cannot clear its log.
        """
        space = namespace if namespace or adapter is None else None
        return self._iter_records(space, adapter, since=since, until=until, metadata=metadata)

    def iter_asked(
        self,
        namespace: str | None = "",
        adapter: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[tuple[StoredRecord, list[str]]]:
        """`iter_records`, each with its `questions`."""
        space = namespace if namespace or adapter is None else None
        return self._iter_asked(space, adapter, since=since, until=until, metadata=metadata)

    def questions(self, key: str, namespace: str = "") -> list[str]:
        """What else gives the value of a key, in the order it was written; of a question, those of its record.

        Raises:
            KeyNotFound: No such record.
        """
        with self._turn():
            known = self._find(key, namespace)
            identity = self._stored_name(namespace), known.question_of or key
            return self._index.questions_of([identity]).get(identity, [])

    def adapters(self) -> list[StoredAdapter]:
        """Committed adapters that hold live records, oldest first."""
        with self._turn():
            return list(self._index.adapters())

    def history(self, key: str, namespace: str = "") -> list[Version]:
        """What the key held and holds, oldest first, under the names it had; times and certificates, no values.

        Raises:
            KeyNotFound: There is no such record and never was, or it was erased.
        """
        with self._turn(), self._index.snapshot():
            if found := history(self._index, namespace, key):
                return found
            raise self._unknown(key, namespace)

    def pending(self) -> PendingWrite | None:
        """The interrupted write that waits to be resumed or discarded, if any (or one that is running now)."""
        with self._turn():
            return self._index.pending_write()

    def stats(self) -> Stats:
        """Counts and sizes of what is committed, and whether compaction pays."""
        with self._turn(), self._index.snapshot():
            return stats(self.path, self._index, self.manifest)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, and what SQLite says of the index, or torch of memory, as errors of ours."""
        with self._lock, sqlite_errors(self._index.path), memory_errors():
            yield

    def _count(self, namespace: str) -> int:
        with self._turn():
            return self._index.count(self._stored_name(namespace))

    def _holds(self, key: object, namespace: str) -> bool:
        with self._turn():
            return isinstance(key, str) and self._index.find(namespace, key) is not None

    def _records(
        self,
        namespace: str | None,
        adapter: str | None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[StoredRecord]:
        with self._turn():
            return iter(
                list(self._chosen(self._index, namespace, adapter, since=since, until=until, metadata=metadata))
            )

    def _iter_records(self, namespace: str | None, adapter: str | None, **options: Any) -> Iterator[StoredRecord]:
        with self._frozen() as index:
            yield from self._chosen(index, namespace, adapter, **options)

    def _iter_asked(
        self, namespace: str | None, adapter: str | None, **options: Any
    ) -> Iterator[tuple[StoredRecord, list[str]]]:
        with self._frozen() as index:
            for record in self._chosen(index, namespace, adapter, **options):
                identity = record.namespace, record.key
                yield record, index.questions_of([identity]).get(identity, [])

    def _chosen(
        self,
        index: Index,
        namespace: str | None,
        adapter: str | None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[StoredRecord]:
        """Of an index of this store, over whichever connection."""
        stored = None if namespace is None else self._stored_name(namespace)
        return index.records(stored, adapter, since=_utc(since), until=_utc(until), metadata=metadata, questions=False)

    @contextmanager
    def _frozen(self) -> Iterator[Index]:
        """The index in one committed state, over a connection of its own."""
        with closing(Index.open(self._index.path)) as index, index.snapshot():
            yield index

    def _stored_name(self, namespace: str) -> str:
        salt = self.manifest.key_salt
        return namespace if salt is None else hidden_names(salt, namespace, "")[0]

    def _find(self, key: str, namespace: str) -> StoredRecord:
        record = self._index.find(namespace, key)
        if record is None:
            raise self._unknown(key, namespace)
        return record

    def _unknown(self, key: str, namespace: str) -> KeyNotFound:
        successor = self._index.successor(namespace, key)
        close = self._index.close_keys(namespace, key) if successor is None else ()
        return KeyNotFound(key, namespace=namespace, close=close, successor=successor)


def _utc(time_of_day: datetime | None) -> str | None:
    return None if time_of_day is None else time_of_day.astimezone(UTC).isoformat(timespec="seconds")
