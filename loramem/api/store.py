"""MemoryStore: a folder of adapters and an index, written and read as one.

This module is the order of things that change what a store holds: what is checked before what, under which lock.
`loramem.api.reading` reads it, `loramem.api.publishing` hands it on, `loramem.api.maintenance` keeps it in order.
Torch is imported only once the base model is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loramem._util.choices import check_choice
from loramem._util.events import log_event
from loramem.api.maintenance import Maintained, several
from loramem.api.namespace import Namespace
from loramem.errors import ArgumentError, ConflictingRecord, StoreError, StoreNotFound, WriteError
from loramem.index.commits import commit_deletion, commit_records, end_write
from loramem.index.index import Index
from loramem.index.rows import DISCARDED, RENAMED, Ended, PendingWrite
from loramem.models.dtypes import Dtype, DtypeChoice
from loramem.planning.limits import GoalName
from loramem.records.contexts import as_contexts
from loramem.records.questions import ask as asked_by
from loramem.records.questions import check_templates, renamed
from loramem.records.record import Record, RecordLike, as_records, iterate_records
from loramem.results import WriteReport
from loramem.store import copies
from loramem.store.create import create_store
from loramem.store.manifest import NAME as MANIFEST
from loramem.store.request import OnConflict, WriteRequest
from loramem.store.session import ModelOptions
from loramem.store.staging import clean
from loramem.training.settings import KeepBase, WriterSettings

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from loramem.training.progress import ProgressCallback


BATCH_RECORDS = 10_000
"""Of `MemoryStore.write_batches`: some ten megabytes in memory, and several shards for each of a dozen workers."""


class MemoryStore(Maintained):
    """Key-value facts in LoRA adapters of one frozen base model.

    Args:
        path: Folder of the store; created with its parents if ``create``.
        base_model: "loramem-tiny" (default), a Hub id, a local folder or a GGUF file. Optional for an existing
            store, unless its place is another; if given it must be the model the store was written with, under
            whatever name.
        revision: Hub revision of the base model.
        device: "auto", "cpu", "cuda"…
        dtype: Of the base model: "float32", "bfloat16", "float16"; "auto" keeps the store's, or for a new store
            float32 on CPU and bfloat16 on CUDA.
        create: Make the store if there is none.
        keep_values: Whether the index keeps values beside the adapters, to rewrite and repair them. If False it keeps
            salted digests alone, and rewriting recalls the values from the weights. Decided when a store is made
            (True unless said); of an existing one it must be what that store does.
        serve: Dtypes, beside that of the base model, that the adapters will be served in: every write is trained and
            proved in each. Decided when a store is made (bfloat16 unless said); of an existing one as that does.
        wait_s: Seconds that a change waits for another process to end its own.
        calibrate: Whether the first write or plan measures a base model that nothing is known of, once, in about a
            minute, so that ranks are no guess; not unless LORAMEM_CALIBRATE=1 is in the environment if None.

    Raises:
        StoreNotFound: No store there and ``create`` is False.
        StoreFormatError: The folder is something else, or a newer format.
        StoreReadOnly: It cannot be written, and was not closed where it could.
        StoreError: ``keep_values`` or ``serve`` is not what the store does; or a new one would lie in another store's
            folder.
        IntegrityError: store.json or index.db is not what was committed.

    A store is a context manager and may be shared between threads; calls that need the model take turns. Namespaces
    are separate recall spaces: the same key may be in each. ``len``, iteration and ``in`` are about the default one,
    like every method that is not told another; `namespace` gives a view of another. `stats`, `verify`, `compact` and
    all that copies or checks take the whole store.

    Example:
        >>> import tempfile
        >>> with MemoryStore(tempfile.mkdtemp() + "/memory") as store:
        ...     report = store.write({"Jerry Becerra:": "9100672710"})
        ...     store.recall("Jerry Becerra:")
        '9100672710'
    """

    def __init__(
        self,
        path: str | Path,
        base_model: str | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        create: bool = True,
        keep_values: bool | None = None,
        serve: Sequence[Dtype] | None = None,
        wait_s: float = 0.0,
        calibrate: bool | None = None,
    ) -> None:
        self.wait_s = wait_s
        path, request, base = Path(path), ModelOptions(base_model, revision, device, dtype, calibrate), None
        if not (path / MANIFEST).exists():
            if not create:
                raise StoreNotFound(f"There is no store at {path}. Write records first, or name it with --store.")
            base = create_store(path, request, keep_values=keep_values is not False, serve=serve)
        super().__init__(path, request)
        if serve is not None and set(serve) - {self.manifest.dtype} != set(self.manifest.serve):
            self.close()
            raise StoreError(
                f"{path} is written for {', '.join((self.manifest.dtype, *self.manifest.serve))}, which cannot be "
                f"changed, not for {', '.join(serve) or 'one dtype alone'}. Write a new store."
            )
        if keep_values not in (None, self.manifest.keep_values):
            self.close()
            raise StoreError(
                f"{path} was made with keep_values={self.manifest.keep_values}, which cannot be changed. Write a new "
                "store."
            )
        if base is not None:
            self._session.base = base

    def write(
        self,
        records: Mapping[str, str] | Iterable[RecordLike],
        *,
        ask: Sequence[str] = (),
        contexts: Iterable[Sequence[Mapping[str, Any]]] | None = None,
        namespace: str = "",
        on_conflict: OnConflict = "error",
        goal: GoalName = "fast",
        rank: int | None = None,
        one_adapter: bool = False,
        keep_base: bool | KeepBase | None = None,
        partial: bool = False,
        settings: WriterSettings | None = None,
        progress: "ProgressCallback | None" = None,
        executor: "Executor | None" = None,
    ) -> WriteReport:
        """Write records into new adapters and commit them once every value was decoded back from disk.

        Records that are in the store already with the same value are skipped, so writing twice is a no-op.

        Args:
            records: A mapping, pairs, dicts with "key" and "value", or `Record`s; without any, nothing is written.
            ask: Questions with ``{key}`` in the place of the key, less a colon at its end, that every record is to
                answer beside those it has: each is trained, certified and recalled as a key is.
            contexts: Chats, each a list of messages such as ``{"role": "system", "content": "…"}``, in which a server
                is to answer with the value too: keys and questions are trained and certified as the user's next message
                in each. Nothing changes for recall. None: those of the newest adapter of the records' namespaces.
            namespace: For entries that do not name one, such as "team/project".
            on_conflict: What becomes of a record whose key is there with another value: "error" refuses the write,
                "skip" keeps the old value, "replace" ends it in the same commit that brings the new one.
            goal: "fast" or "small".
            rank: First rank, in place of the planned one; at most ``settings.max_rank``.
            one_adapter: Put all records of a namespace into one adapter, whatever it takes, for a server of a single
                LoRA. It may be slower by far: what the first placement does not hold is trained at one that holds more.
                Records that the namespace had before stay where they are, until `compact` makes one adapter of all.
            keep_base: Leave the base what it is where no record is asked for, so that the adapter may be active for
                everything, and measure how far that went: `WriteReport.kept`. A `KeepBase` says how much is wanted and
                what is done for it. One adapter for each namespace. Takes minutes rather than seconds, and more of them
                for the first write on a base. None: as the newest adapter of the records' namespaces was written.
            partial: Commit the certified records even if others could not be certified.
            settings: How to train; measured defaults otherwise.
            progress: Called after every training step; after every shard with an executor.
            executor: Writes shards side by side; `loramem.process_pool` makes one that shares out the cores.

        Raises:
            RecordError: A record cannot be written (its subclass says why); nothing was changed.
            UnfinishedWrite: An interrupted write must be resumed or discarded first.
            DoesNotFit: A value, or all with ``one_adapter``, is too much for the highest rank; nothing was changed.
            StoreLocked: Another process is writing.
            StubbornRecords: Some records could not be certified and ``partial`` is False; nothing was committed.
            TrainingDiverged: NaN or Inf; nothing was committed.
            BaseHarmed: ``keep_base`` asks for more than was reached, and not only for a report; nothing was committed.
            UnsupportedBaseModel: ``keep_base``, and the base's last MLP is none whose neurons can be replaced.
            RecallError: A saved adapter did not decode what training had certified; nothing was committed.
            OutOfMemory: A batch did not fit into memory; the write waits to be resumed or discarded.
            UnknownChoice: No such goal or conflict rule.
            ArgumentError: A rank above the highest allowed, a question without ``{key}``, or a context that is no chat,
                or none that the base model's template takes.
        """
        check_templates(ask)
        request = WriteRequest(goal, rank, _in_contexts(settings, contexts), one_adapter, partial)
        request.check()
        check_choice("on_conflict", on_conflict, get_args(OnConflict))
        with self._lock, self._writing():
            given = list(asked_by(as_records(records, namespace), ask))
            request = _as_before(self._index, request, keep_base, contexts, given)
            return self._session.transaction.write(given, request, on_conflict, progress, executor)

    def write_batches(
        self,
        records: Mapping[str, str] | Iterable[RecordLike],
        *,
        batch: int = BATCH_RECORDS,
        ask: Sequence[str] = (),
        contexts: Iterable[Sequence[Mapping[str, Any]]] | None = None,
        namespace: str = "",
        on_conflict: OnConflict = "error",
        goal: GoalName = "fast",
        rank: int | None = None,
        one_adapter: bool = False,
        keep_base: bool | KeepBase | None = None,
        partial: bool = False,
        settings: WriterSettings | None = None,
        progress: "ProgressCallback | None" = None,
        executor: "Executor | None" = None,
    ) -> Iterator[WriteReport]:
        """Write records of an input of any length, so many at a time, each batch as `write` does: atomic, proved and
        visible when its report comes, in their order.

        Without an executor the input is read as batches are asked for, and memory holds one of them. With one a thread
        reads, admits and plans the next batch while this one is trained, and workers begin it as soon as they have
        nothing else to do. Where it ends early, by an error, an interrupt or a crash, what was committed stays, and the
        batch that was under way is resumed or discarded as any write; then the same call with the same input writes the
        rest, as records that are there are skipped.

        Args:
            records: As of `write`; a generator does.
            batch: Records of each, but the last, their questions not counted: several shards for each worker.
            ask: As of `write`, like all others.

        Raises what `write` raises, at the batch that fails.

        Example:
            >>> import tempfile
            >>> with MemoryStore(tempfile.mkdtemp() + "/memory") as store:
            ...     facts = ((f"door {number}:", f"{number:04}") for number in range(5))
            ...     tuple(report.written for report in store.write_batches(facts, batch=3))
            (3, 2)
        """
        if batch < 1:
            raise ArgumentError(f"batch must be at least 1, not {batch}", argument="batch", value=batch)
        check_templates(ask)
        given = asked_by(iterate_records(records, namespace), ask)
        parts = iter(lambda: list(islice(given, batch)), [])
        request = WriteRequest(goal, rank, _in_contexts(settings, contexts), one_adapter, partial)
        request.check()
        check_choice("on_conflict", on_conflict, get_args(OnConflict))
        if executor is not None:
            from loramem.store.batches import write_batches

            def keeping(index: Index, records: Sequence[Record]) -> WriteRequest:
                return _as_before(index, request, keep_base, contexts, records)

            transaction, writing = self._session.transaction, self._exclusively
            yield from write_batches(transaction, writing, parts, keeping, on_conflict, progress, executor)
            return
        learnt = None
        for part in parts:
            with self._exclusively():
                transaction = self._session.transaction
                before, learnt = learnt, transaction.planner.learnt()  # as where batches overlap
                asked = _as_before(self._index, request, keep_base, contexts, part)
                report = transaction.write(part, asked, on_conflict, progress, learnt=before)
            yield report

    def update(
        self,
        key: str,
        value: str | None = None,
        *,
        namespace: str = "",
        metadata: Mapping[str, Any] | None = None,
        goal: GoalName = "fast",
        rank: int | None = None,
        keep_base: bool | KeepBase | None = None,
        settings: WriterSettings | None = None,
        progress: "ProgressCallback | None" = None,
    ) -> WriteReport:
        """Give a record another value, other metadata, or both; the old value is not recalled from the commit on.

        Its questions get the new value too.

        Args:
            key: Or a question of the record.
            value: None keeps it; then nothing is trained.
            keep_base: As in `write`.
            metadata: In place of all that the record had; None keeps it.

        Raises:
            KeyNotFound: There is no such record; otherwise as `write`.
        """
        request = WriteRequest(goal, rank, settings or WriterSettings())
        request.check()
        with self._lock, self._writing():
            known = self._find(key, namespace)
            if known.question_of is not None:
                known = self._find(known.question_of, namespace)
            kept = known.metadata if metadata is None else dict(metadata)
            if value is None or known.holds(value):
                Record(known.key, value or " ", namespace, kept)  # raises if the metadata cannot be kept
                commit_records(self._index, [replace(known, metadata=kept)])
                return WriteReport.nothing(1)
            record = Record(known.key, value, namespace, kept)
            request = _as_before(self._index, request, keep_base, None, [record])
            return self._session.transaction.write([record], request, "replace", progress)

    def rename(
        self,
        key: str,
        new_key: str,
        *,
        namespace: str = "",
        goal: GoalName = "fast",
        rank: int | None = None,
        keep_base: bool | KeepBase | None = None,
        settings: WriterSettings | None = None,
        progress: "ProgressCallback | None" = None,
    ) -> WriteReport:
        """Write a record's value under another key and end the old one, in one commit; metadata and questions are kept,
        and a question that names the old key names the new one.

        Args:
            key: Of a record; or one of its questions, which is then worded anew.
            keep_base: As in `write`.

        Raises:
            KeyNotFound: There is no such record.
            ConflictingRecord: The new key is there already; otherwise as `write`.
        """
        ended = (Ended(namespace, key, RENAMED, new_key),)
        request = WriteRequest(goal, rank, settings or WriterSettings(), ended=ended)
        request.check()
        with self._lock, self._writing():
            known = self._find(key, namespace)
            if self._index.find(namespace, new_key) is not None:
                raise ConflictingRecord(f"Key {new_key!r} is in the store already. Use another one.", key=new_key)
            value = self._session.reader.values([known])[namespace, key]
            asked = self._index.questions_of([(namespace, key)]).get((namespace, key), [])
            record = Record(
                *(new_key, value, namespace, known.metadata),
                questions=renamed(asked, key, new_key),
                question_of=known.question_of,
            )
            request = _as_before(self._index, request, keep_base, None, [record])
            return self._session.transaction.write([record], request, progress=progress)

    def delete(self, keys: str | Iterable[str], namespace: str = "") -> int:
        """Stop recalling one record or several, with their questions, in one commit; returns how many.

        A question can be deleted by itself. Their adapters still hold the values until `compact`; `erase` clears every
        trace.

        Raises:
            KeyNotFound: One of the keys is unknown; nothing was deleted.
            StoreLocked: Another process is writing.
        """
        with self._lock, self._writing():
            found = [self._find(key, namespace) for key in dict.fromkeys(several(keys))]
            commit_deletion(self._index, [(record.namespace, record.key) for record in found])
            log_event("deleted", records=len(found))
            return len(found)

    def resume(self, progress: "ProgressCallback | None" = None, executor: "Executor | None" = None) -> WriteReport:
        """Go on with the interrupted write, with the settings it was started with; finished shards are kept.

        Raises:
            WriteError: There is none; or as `write`.
        """
        with self._lock, self._writing(resuming=True):
            return self._session.transaction.resume(self._require_pending(), progress, executor)

    def discard(self) -> int:
        """Forget the interrupted write; returns how many records it held.

        Raises:
            WriteError: There is none.
        """
        with self._lock, self._writing(resuming=True):
            pending = self._require_pending()
            end_write(self._index, pending.id, DISCARDED)
            clean(self.path, self._index)
            return len(pending.records)

    @classmethod
    def import_bundle(cls, source: str | Path, path: str | Path) -> "MemoryStore":
        """A new store at ``path`` from what `export` wrote, every file, row and seal checked.

        Raises:
            BundleError: Not an export, a damaged one, or one of a newer format.
            StoreError: There is something at ``path``, or it lies in a store's folder.
        """
        copies.import_bundle(Path(source), Path(path))
        return cls(path, create=False)

    @classmethod
    def pull(
        cls,
        repo: str,
        path: str | Path,
        base_model: str | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        verify: bool = True,
        max_bytes: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "MemoryStore":
        """A new store at ``path`` of what `push` published, as it is at one commit.

        Nothing that was pulled is trusted: names, sizes, hashes, configs and tensors are checked one by one, and only
        when all hold is there a store. Without published keys it can be read alone, by key given.

        Args:
            base_model: A local folder, where the base model is not on the Hub under its name.
            revision: Branch, tag or commit.
            verify: Load the base model, compare the adapters with it, and decode every record whose key is published.
            max_bytes: Refuse larger adapters, taken together; 16 GiB unless given.
            progress: Told how many records of how many were decoded.

        Raises:
            NotAPublication: The repository holds no published store.
            RefusedRepository: It breaks a rule.
            HubOffline, HubAccess, HubError: The Hub cannot be asked, or says no.
            OtherBaseModel: The base model at hand is not the one the adapters were written for.
            StoreError: There is something at ``path``, or it lies in a store's folder.
        """
        from loramem.hub.pull import MAX_BYTES, pull

        model = ModelOptions(base_model, None, device)
        limit = MAX_BYTES if max_bytes is None else max_bytes
        pull(repo, Path(path), revision=revision, model=model, verify=verify, max_bytes=limit, progress=progress)
        return cls(path, base_model, device=device, create=False)

    def namespace(self, name: str) -> Namespace:
        """A view of one namespace that is used as a store of its own is; "" is the default one.

        Raises:
            InvalidField: No record can be in a namespace of that name.
        """
        return Namespace(self, name)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        with self._lock, self._writing():
            yield

    def _require_pending(self) -> PendingWrite:
        pending = self._index.pending_write()
        if pending is None:
            raise WriteError("There is no interrupted write to resume or discard.")
        return pending


def _in_contexts(
    settings: WriterSettings | None, contexts: Iterable[Sequence[Mapping[str, Any]]] | None
) -> WriterSettings:
    """
    Raises:
        ArgumentError: See `as_contexts`.
    """
    settings = settings or WriterSettings()
    return settings if contexts is None else replace(settings, contexts=as_contexts(contexts))


def _as_before(
    index: Index,
    request: WriteRequest,
    keep_base: bool | KeepBase | None,
    contexts: object | None,
    records: Iterable[Record],
) -> WriteRequest:
    """A request that keeps the base and is for chats, if that is asked for or what the namespaces of these records do.

    Args:
        index: Over whichever connection.
        contexts: None unless the request's settings have what was asked for.
    """
    settings, namespaces = request.settings, sorted({record.namespace for record in records})
    newest = [adapter for namespace in namespaces if (adapter := index.newest_adapter(namespace)) is not None]
    before = [WriteRequest.of_adapter(adapter.training).settings for adapter in newest]
    if keep_base is None and settings.keep_base is None:
        keep_base = next((each.keep_base for each in before if each.keep_base is not None), None)
    if contexts is None and not settings.contexts:
        settings = replace(settings, contexts=next((each.contexts for each in before if each.contexts), ()))
    if keep_base:
        keep = KeepBase() if keep_base is True else keep_base
        settings = replace(settings, keep_base=replace(keep, neurons=request.rank or keep.neurons))
    # An adapter that is active for everything knows no key of another.
    one_adapter = request.one_adapter or settings.keep_base is not None
    return replace(request, settings=settings, one_adapter=one_adapter)
