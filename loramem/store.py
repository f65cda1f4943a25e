"""MemoryStore: a folder of adapters and an index, written and read as one.

This module is the order of things: what is checked before what, and what a reader may believe. Torch is imported only
once the base model is needed.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from loramem import embedded
from loramem.boundary import Outcome
from loramem.capacity import ANY_RANK, Basis, Plan, RankLimits, check_request
from loramem.errors import (
    IntegrityError,
    KeyNotFound,
    OtherBaseModel,
    StoreFormatError,
    StoreLocked,
    StoreNotFound,
    UnfinishedWrite,
    WriteError,
)
from loramem.index import DISCARDED, Index, PendingWrite, StoredAdapter, StoredRecord
from loramem.manifest import NAME as MANIFEST
from loramem.manifest import Manifest, read_manifest
from loramem.records import RecordLike, as_records
from loramem.reports import Explanation, Recall, Stats, VerifyReport, WriteReport
from loramem.staging import clean

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from loramem.adapters import AdaptedModel
    from loramem.base_model import BaseModel
    from loramem.prompts import PromptTemplate
    from loramem.reader import Reader
    from loramem.settings import WriterSettings
    from loramem.transaction import Transaction
    from loramem.writer import ProgressCallback


class MemoryStore:
    """Key-value facts in LoRA adapters of one frozen base model.

    Args:
        path: Folder of the store; created with its parents if ``create``.
        base_model: "loramem-tiny" (default), a Hub id or a local folder. Optional for an existing store; if given
            it must be the model the store was written with.
        revision: Hub revision of the base model.
        device: "auto", "cpu", "cuda"…
        dtype: Of the base model: "float32", "bfloat16", "float16"; "auto" keeps the store's, or for a new store
            float32 on CPU and bfloat16 on CUDA.
        create: Make the store if there is none.

    Raises:
        StoreNotFound: No store there and ``create`` is False.
        StoreFormatError: The folder is something else, or a newer format.
        IntegrityError: store.json or index.db is not what was committed.

    A store is a context manager and may be shared between threads; calls that need the model take turns.

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
        dtype: str = "auto",
        create: bool = True,
    ) -> None:
        self.path = Path(path)
        self._model_name, self._revision, self._device, self._dtype = base_model, revision, device, dtype
        self._lock = threading.RLock()
        if not (self.path / MANIFEST).exists():
            if not create:
                raise StoreNotFound(f"There is no store at {self.path}. Write records first, or name it with --store.")
            self._create()
        self._index = Index.open(self.path / "index.db")
        self.manifest = read_manifest(self.path, self._index)

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index; the store object is not used afterwards."""
        with self._lock:
            self._index.close()

    # What is in the store

    def __len__(self) -> int:
        with self._lock:
            return self._index.count()

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return isinstance(key, str) and self._index.find("", key) is not None

    def keys(self, namespace: str = "") -> Iterator[str]:
        """Keys of a namespace in the order they were written."""
        with self._lock:
            return iter(list(self._index.keys(namespace)))

    def records(self, namespace: str | None = None, adapter: str | None = None) -> Iterator[StoredRecord]:
        """Index rows, without decoding anything."""
        with self._lock:
            return iter(list(self._index.records(namespace, adapter)))

    def adapters(self) -> list[StoredAdapter]:
        """Committed adapters, oldest first."""
        with self._lock:
            return list(self._index.adapters())

    def pending(self) -> PendingWrite | None:
        """The interrupted write that waits to be resumed or discarded, if any (or one that is running now)."""
        with self._lock:
            return self._index.pending_write()

    def stats(self) -> Stats:
        """Counts and sizes of what is committed."""
        with self._lock:
            adapters, records = list(self._index.adapters()), list(self._index.records())
            pending = self._index.pending_write()
        parameters = sum(adapter.parameters for adapter in adapters)
        cost_bits = sum(adapter.training["cost_bits"] for adapter in adapters)
        return Stats(
            base_model=self.manifest.base_model,
            records=len(records),
            adapters=len(adapters),
            ranks=sorted({adapter.rank for adapter in adapters}),
            parameters=parameters,
            answer_tokens=sum(record.answer_tokens for record in records),
            cost_bits=cost_bits,
            bits_per_parameter=cost_bits / parameters if parameters else 0.0,
            min_prob=min((record.min_prob for record in records), default=None),
            size_bytes=sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()),
            unfinished_records=len(pending.records) if pending else 0,
        )

    # Writing

    def plan(
        self,
        records: Mapping[str, str] | Iterable[RecordLike],
        *,
        namespace: str = "",
        goal: str = "fast",
        rank: int | None = None,
        limits: RankLimits = ANY_RANK,
        kind: str | None = None,
    ) -> Plan:
        """What `write` would do with these records, without training or changing anything.

        Args:
            limits: Ranks that adapters may have.
            kind: Of data, whose memory law is asked; the calibrated one that costs most nearly as much if None.

        Raises:
            RecordError: A record cannot be written.
            DoesNotFit: A value is too much for the highest rank allowed.
        """
        check_request(goal, rank, limits)
        with self._lock:
            encoded, _ = self._transaction.admit(as_records(records, namespace))
            return self._transaction.plan(encoded, goal, rank, limits, kind)

    def basis(self, kind: str | None = None) -> Basis:
        """What plans for this store rest on: success boundary, pace, and the law of a kind of data."""
        with self._lock:
            return self._transaction.basis(None, 0, kind)

    def outcomes(self) -> list[Outcome]:
        """What the writes to this store came to at their first rank, oldest first."""
        with self._lock:
            return self._index.outcomes()

    def write(
        self,
        records: Mapping[str, str] | Iterable[RecordLike],
        *,
        namespace: str = "",
        goal: str = "fast",
        rank: int | None = None,
        partial: bool = False,
        settings: "WriterSettings | None" = None,
        progress: "ProgressCallback | None" = None,
        executor: "Executor | None" = None,
    ) -> WriteReport:
        """Write records into new adapters and commit them once every value was decoded back from disk.

        Records that are in the store already with the same value are skipped, so writing twice is a no-op.

        Args:
            records: A mapping, pairs, dicts with "key" and "value", or `Record`s.
            namespace: For entries that do not name one.
            goal: "fast" or "small".
            rank: First rank, in place of the planned one.
            partial: Commit the certified records even if others could not be certified.
            settings: How to train; measured defaults otherwise.
            progress: Called after every training step; after every shard with an executor.
            executor: Writes shards side by side; `loramem.jobs.process_pool` makes one that shares out the cores.

        Raises:
            RecordError: A record cannot be written (its subclass says why); nothing was changed.
            UnfinishedWrite: An interrupted write must be resumed or discarded first.
            DoesNotFit: A value is too much for the highest rank; nothing was changed.
            StoreLocked: Another process is writing.
            StubbornRecords: Some records could not be certified and ``partial`` is False; nothing was committed.
            TrainingDiverged: NaN or Inf; nothing was committed.
            RecallError: A saved adapter did not decode what training had certified; nothing was committed.
        """
        from loramem.settings import WriterSettings

        check_request(goal, rank)
        with self._lock, self._writing():
            if (pending := self._index.pending_write()) is not None:
                raise UnfinishedWrite(
                    f"Write {pending.id} of {len(pending.records)} records, started {pending.started_at}, was "
                    "interrupted. Resume it (loramem write --resume) or discard it (loramem write --discard).",
                    write_id=pending.id,
                    records=len(pending.records),
                )
            transaction = self._transaction
            encoded, skipped = transaction.admit(as_records(records, namespace))
            if not encoded:
                return WriteReport.nothing(skipped)
            started = time.monotonic()
            settings = settings or WriterSettings()
            plan = transaction.plan(encoded, goal, rank, RankLimits(settings.max_rank))
            request = {"goal": goal, "rank": rank, "partial": partial, "settings": asdict(settings)}
            write_id = self._index.begin_write((entry.record for entry in encoded), request)
            return transaction.run(write_id, encoded, plan, request, skipped, progress, executor, started=started)

    def resume(self, progress: "ProgressCallback | None" = None, executor: "Executor | None" = None) -> WriteReport:
        """Go on with the interrupted write, with the settings it was started with; finished shards are kept.

        Raises:
            WriteError: There is none; or as `write`.
        """
        with self._lock, self._writing():
            pending = self._require_pending()
            started, transaction, request = time.monotonic(), self._transaction, pending.request
            encoded = transaction.encode(pending.records)
            limits = RankLimits(request["settings"]["max_rank"])
            plan = transaction.plan(encoded, request["goal"], request["rank"], limits)
            return transaction.run(pending.id, encoded, plan, request, 0, progress, executor, started=started)

    def discard(self) -> int:
        """Forget the interrupted write; returns how many records it held.

        Raises:
            WriteError: There is none.
        """
        with self._lock, self._writing():
            pending = self._require_pending()
            self._index.end_write(pending.id, DISCARDED)
            clean(self.path, self._index)
            return len(pending.records)

    # Reading

    def recall(self, key: str, namespace: str = "") -> str:
        """Decode a value from the weights and check it against the committed digest.

        Raises:
            KeyNotFound: No such record; carries close keys.
            RecallError: The weights gave something else.
            IntegrityError: The adapter's files are not what was committed.
            OtherBaseModel: The base model is not the one the store was written with.
        """
        with self._lock:
            record = self._find(key, namespace)
            return next(self._reader.decode([record])).value

    def recall_many(self, keys: Iterable[str] | None = None, namespace: str = "") -> Iterator[Recall]:
        """Decode many values, batched by adapter and length; all of the namespace if ``keys`` is None.

        Yields in the order of batches, not of ``keys``. Raises as `recall`, at the first record that fails.
        """
        from loramem.reader import decode_batches

        with self._lock:
            if keys is None:
                found = list(self._index.records(namespace))
            else:
                found = [self._find(key, namespace) for key in keys]
        for batch in decode_batches(found):
            with self._lock:
                decoded = list(self._reader.decode(batch))
            yield from decoded

    def explain(self, key: str, namespace: str = "") -> Explanation:
        """Probability of every answer token and the end token, with the adapter and without it.

        The value is decoded from the weights first, then scored under teacher forcing in a batch of one.
        Raises as `recall`.
        """
        with self._lock:
            record = self._find(key, namespace)
            value = next(self._reader.decode([record])).value
            return Explanation(key, value, record.adapter, self._reader.token_probabilities(record, value))

    def load(self, key: str, namespace: str = "") -> tuple[Any, list[int]]:
        """The base model with the adapter of ``key`` active, and the prompt's ids, for your own ``generate``.

        It stays active until the next call that decodes or writes; after any other the model is the plain base.
        Raises as `recall`, except RecallError.
        """
        with self._lock:
            self._reader.activate(self._find(key, namespace).adapter)
            return self._adapted.model, self._template.prompt_ids(self.base.tokenizer, key)

    def verify(self) -> VerifyReport:
        """Check every file and row against its sha256, then decode every record from its adapter.

        The base model's weights are hashed again too. Damage does not raise: the report lists it.

        Raises:
            OtherBaseModel: The base model given is not the store's at all.
        """
        from loramem.base_model import fingerprint
        from loramem.reader import decode_batches, file_problems

        with self._lock:
            started = time.monotonic()
            damaged = list(self._index.damaged())
            try:
                adapters, records = list(self._index.adapters()), list(self._index.records())
            except IntegrityError as error:  # rows that cannot be read leave nothing to decode by
                count, elapsed_s = self._index.count(), time.monotonic() - started
                return VerifyReport(count, 0, (), (*damaged, str(error)), elapsed_s)
            damaged += [problem for row in adapters for problem in file_problems(self.path, row)]
            try:
                fingerprint(self.base.folder, rehash=True).check(self.manifest.fingerprint, self.base.id)
            except OtherBaseModel as error:
                damaged.append(str(error))
            failed: list[str] = []
            for batch in decode_batches(records):
                try:
                    decoded = self._reader.try_decode(batch)
                    failed += [record.key for record, value in decoded if value is None]
                except IntegrityError as error:
                    failed += [record.key for record in batch]
                    if not any(error.what in problem for problem in damaged):
                        damaged.append(str(error))
            return VerifyReport(
                records=len(records),
                exact=len(records) - len(failed),
                failed=tuple(failed),
                damaged=tuple(damaged),
                elapsed_s=time.monotonic() - started,
            )

    # The base model and what works on it

    @cached_property
    def base(self) -> "BaseModel":
        """The base model, loaded on first use and checked against the store's fingerprint.

        Its ``model`` answers as if there were no store, except after `load`.

        Raises:
            OtherBaseModel: Another model, or the same with other weights, configuration or tokenizer.
            BaseModelNotFound: It cannot be loaded.
        """
        from loramem.base_model import load_base_model

        manifest = self.manifest
        base = load_base_model(
            self._model_name or manifest.location or manifest.base_model,
            revision=self._revision or manifest.revision,
            device=self._device,
            dtype=manifest.dtype if self._dtype == "auto" else self._dtype,
        )
        if base.id != manifest.base_model:
            raise OtherBaseModel(
                f"The store was written with base model {manifest.base_model!r}, not {base.id!r}. Adapters only "
                "work on their own base: leave --model out, or write a new store.",
                expected=manifest.base_model,
                got=base.id,
            )
        base.fingerprint.check(manifest.fingerprint, base.id)
        return base

    @cached_property
    def _adapted(self) -> "AdaptedModel":
        from loramem.adapters import AdaptedModel

        return AdaptedModel(self.base)

    @cached_property
    def _template(self) -> "PromptTemplate":
        from loramem.prompts import PromptTemplate

        prompt = self.manifest.prompt
        return PromptTemplate(
            tuple(prompt["prefix_ids"]), tuple(prompt["suffix_ids"]), prompt["end_id"], prompt["kind"]
        )

    @cached_property
    def _reader(self) -> "Reader":
        from loramem.reader import Reader

        return Reader(self.path, self._index, self._adapted, self._template)

    @cached_property
    def _transaction(self) -> "Transaction":
        from loramem.adapters import Placement
        from loramem.transaction import Transaction

        stored = self.manifest.placement
        placement = Placement(tuple(stored["modules"]), tuple(stored["layers"]))
        return Transaction(self.path, self._index, self._adapted, self._template, placement)

    # Helpers

    def _create(self) -> None:
        from loramem.base_model import load_base_model

        if self.path.exists() and (not self.path.is_dir() or _foreign(self.path)):
            raise StoreFormatError(f"{self.path} exists and is not a loramem store. Give another path.")
        name = self._model_name or embedded.NAME
        base = load_base_model(name, revision=self._revision, device=self._device, dtype=self._dtype)
        manifest = Manifest.of(base)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        index = Index(self.path / "index.db")
        index.seal(manifest.sha256)
        index.close()
        manifest.save(self.path)  # last: a folder with a manifest is a whole store
        self.base = base

    @contextmanager
    def _writing(self) -> Iterator[None]:
        lock = FileLock(self.path / "store.lock", timeout=0, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            raise StoreLocked(f"Another process is writing to {self.path}. Wait for it to end.") from None
        try:
            yield
        finally:
            lock.release()

    def _find(self, key: str, namespace: str) -> StoredRecord:
        record = self._index.find(namespace, key)
        if record is None:
            raise KeyNotFound(key, namespace=namespace, close=self._index.close_keys(namespace, key))
        return record

    def _require_pending(self) -> PendingWrite:
        pending = self._index.pending_write()
        if pending is None:
            raise WriteError("There is no interrupted write to resume or discard.")
        return pending


def _foreign(path: Path) -> list[Path]:
    """Files that a store whose creation was interrupted would not contain."""
    ours = {"index.db", "index.db-wal", "index.db-shm", "store.lock", "store.json.partial"}
    return [entry for entry in path.iterdir() if entry.name not in ours]
