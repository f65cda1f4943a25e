"""A store kept in order: compaction, collection, erasing, repair; and the lock under which anything is changed."""

import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from loramem._util.out_of_memory import memory_errors
from loramem.api.publishing import Publishing
from loramem.errors import StoreReadOnly, UnfinishedWrite
from loramem.index.connection import sqlite_errors
from loramem.index.lock import write_lock
from loramem.index.sealed_database import VACUUM_DUE
from loramem.results import CompactReport, EraseReport, GcReport, RepairReport
from loramem.store import compact
from loramem.store.compact import CompactChoice
from loramem.store.repair import repair
from loramem.store.staging import GRACE_S, collect

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from loramem.training.progress import ProgressCallback

log = logging.getLogger(__name__)

LOG_S = 1.0
"""A reader that sees one state for longer may keep the log from being emptied; the next change tries again."""


class Maintained(Publishing):
    """A store whose files are rewritten, cleared and mended."""

    wait_s: float
    """Seconds that a change waits for another process to end its own."""

    def compact(
        self,
        *,
        which: CompactChoice = "advised",
        progress: "ProgressCallback | None" = None,
        executor: "Executor | None" = None,
    ) -> CompactReport:
        """Rewrite shards from the frozen base, in one commit.

        Each new adapter is byte for byte what writing its records alone would give, so nothing of what was deleted is
        left in it. The old ones go with `gc`, after its grace.

        Args:
            which: "advised": the small and half-dead ones, where it pays; "dead": every one that holds a deleted or
                replaced record; "all".

        Raises:
            StoreLocked: Another process is writing.
            UnfinishedWrite: An interrupted write must be resumed or discarded first.
            StubbornRecords: A record could not be certified again; nothing changed.
            RecallError: A value that the index does not keep did not come back; nothing changed.
        """
        with self._lock, self._writing():
            groups = compact.chosen_for(self._index, which)
            return compact.compact(self._session, groups, progress, executor)

    def gc(self, grace_s: float = GRACE_S) -> GcReport:
        """Remove the files of adapters that no live record needs.

        Args:
            grace_s: Keep those retired less than so many seconds ago, for readers that began before.

        Raises:
            StoreLocked: Another process is writing.
        """
        with self._lock, self._writing(resuming=True):
            adapters, freed_bytes = collect(self.path, self._index, grace_s)
            return GcReport(adapters, freed_bytes, len(self._index.retired()))

    def erase(
        self,
        keys: str | Iterable[str],
        namespace: str = "",
        *,
        progress: "ProgressCallback | None" = None,
        executor: "Executor | None" = None,
    ) -> EraseReport:
        """Delete records for real: afterwards no file of the store holds their values, in this or an earlier version.

        Records that shared an adapter with them are written anew from the frozen base; the new adapter is byte for
        byte what writing them alone would have given. Backups, exports and what the disk keeps of unlinked files are
        out of reach. A record that was deleted before can still be erased. Killed, it is finished by the same call.
        A record that was renamed is erased by its new key, under all the names it had.

        Raises:
            KeyNotFound: One of the keys is neither in the store nor in its history, or was renamed (``successor``);
                nothing was changed.
            StubbornRecords: A record that shared an adapter could not be certified again; the records are deleted,
                not erased.
            StoreLocked: Another process is writing, or kept reading for 30 s.
            UnfinishedWrite: An interrupted write must be resumed or discarded first.
        """
        with self._lock, self._writing():
            chosen = [(namespace, key) for key in dict.fromkeys(several(keys))]
            for _, key in chosen:
                if self._index.find(namespace, key) is None and not self._index.versions(namespace, key):
                    raise self._unknown(key, namespace)
            return compact.erase(self._session, chosen, progress, executor)

    def repair(
        self,
        *,
        drop_lost: bool = False,
        progress: "ProgressCallback | None" = None,
        executor: "Executor | None" = None,
    ) -> RepairReport:
        """Write the records of damaged adapters and rows anew from the values that the index keeps, in one commit.

        Args:
            drop_lost: Delete the records whose value is neither kept nor recalled, which the report names.

        Raises:
            IntegrityError: index.db cannot be read as a database; restore a backup.
            StubbornRecords: A record could not be certified again; nothing changed.
            StoreLocked: Another process is writing.
        """
        with self._lock, self._writing(resuming=True):
            return repair(self._session, drop_lost=drop_lost, progress=progress, executor=executor)

    @contextmanager
    def _writing(self, *, resuming: bool = False) -> Iterator[None]:
        """Hold the store's lock, after finishing what an earlier writer was killed in.

        Raises:
            StoreReadOnly, StoreLocked: See `write_lock`.
            UnfinishedWrite: A write is journalled, and this is not about it.
            StoreError: SQLite could not write, such as on a full disk.
            IntegrityError: index.db is damaged.
            OutOfMemory: A write that ran into it waits to be resumed or discarded.
        """
        if self._index.read_only:
            raise StoreReadOnly(f"{self.path} cannot be written. Change its permissions, or copy it.")
        if self.manifest.key_salt is not None:
            raise StoreReadOnly(f"{self.path} was pulled without its keys, so that it can only be read.")
        with write_lock(self.path, self.wait_s), sqlite_errors(self._index.path), memory_errors():
            if self._index.meta(VACUUM_DUE):
                self._index.vacuum()
            if not resuming and (pending := self._index.pending_write()) is not None:
                raise UnfinishedWrite(
                    f"Write {pending.id} of {len(pending.records)} records, started {pending.started_at}, was "
                    "interrupted. Resume it (loramem write --resume) or discard it (loramem write --discard).",
                    write_id=pending.id,
                    records=len(pending.records),
                )
            try:
                yield
            finally:
                if not self.manifest.keep_values:
                    self._empty_log()

    def _empty_log(self) -> None:
        """Clear the values that the journal held while they were needed, whether the change came to be or not."""
        with suppress(sqlite3.OperationalError):
            if self._index.empty_log(LOG_S):
                return
        log.warning(
            "%s: index.db-wal still holds values, since another process is reading or the disk failed; the next change "
            "empties it, or the last process that closes the store",
            self.path,
        )


def several(keys: str | Iterable[str]) -> Iterable[str]:
    """Keys, given one or more."""
    return [keys] if isinstance(keys, str) else keys
