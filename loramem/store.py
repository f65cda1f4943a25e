"""MemoryStore: a folder of adapters and an index, written and read as one.

This module is the order of things: what is checked before what, what is synced before what, and what a reader may
believe. The mathematics is elsewhere, and torch is imported only once the base model is needed.
"""

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from loramem import embedded
from loramem.capacity import Plan, plan_write
from loramem.errors import (
    ConflictingRecord,
    IntegrityError,
    KeyNotFound,
    OtherBaseModel,
    PromptCollision,
    RecallError,
    StoreFormatError,
    StoreLocked,
    StoreNotFound,
    StubbornRecords,
    UnfinishedWrite,
    WriteError,
)
from loramem.files import move_synced
from loramem.index import (
    DISCARDED,
    FAILED,
    Index,
    PendingWrite,
    StoredAdapter,
    StoredRecord,
    prompt_digest,
    stored_record,
)
from loramem.manifest import NAME as MANIFEST
from loramem.manifest import Manifest
from loramem.records import Record, RecordLike, as_records, deduplicate
from loramem.reports import Explanation, Recall, Stats, TokenProbability, VerifyReport, WriteReport

if TYPE_CHECKING:
    from loramem.adapters import AdaptedModel, Placement
    from loramem.base_model import BaseModel
    from loramem.prompts import EncodedRecord, PromptTemplate
    from loramem.shards import Shard
    from loramem.writer import ProgressCallback, WriterSettings

log = logging.getLogger(__name__)

RECALL_BATCH = 64


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
        IntegrityError: store.json is not what was committed.

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
        self._index = Index(self.path / "index.db")
        self.manifest = self._read_manifest()

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
        cost = sum(adapter.training["cost_bits"] for adapter in adapters)
        return Stats(
            base_model=self.manifest.base_model,
            records=len(records),
            adapters=len(adapters),
            ranks=sorted({adapter.rank for adapter in adapters}),
            parameters=parameters,
            answer_tokens=sum(record.answer_tokens for record in records),
            cost_bits=cost,
            bits_per_parameter=cost / parameters if parameters else 0.0,
            min_prob=min((record.min_prob for record in records), default=None),
            size_bytes=sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()),
            unfinished_records=len(pending.records) if pending else 0,
        )

    # Writing

    def plan(
        self, records: Mapping[str, str] | Iterable[RecordLike], *, goal: str = "fast", rank: int | None = None
    ) -> Plan:
        """What `write` would do with these records, without training or changing anything."""
        with self._lock:
            fresh, _ = self._admit(as_records(records))
            return self._plan(self._encode(fresh), goal, rank)

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
            progress: Called after every training step.

        Raises:
            RecordError: A record cannot be written (its subclass says why); nothing was changed.
            UnfinishedWrite: An interrupted write must be resumed or discarded first.
            StoreLocked: Another process is writing.
            StubbornRecords: Some records could not be certified and ``partial`` is False; nothing was committed.
            TrainingDiverged: NaN or Inf; nothing was committed.
        """
        with self._lock, self._writing():
            if (pending := self._index.pending_write()) is not None:
                raise UnfinishedWrite(
                    f"Write {pending.id} of {len(pending.records)} records, started {pending.started_at}, was "
                    "interrupted. Resume it (loramem write --resume) or discard it (loramem write --discard).",
                    write_id=pending.id,
                    records=len(pending.records),
                )
            fresh, skipped = self._admit(as_records(records, namespace))
            if not fresh:
                return WriteReport.nothing(skipped)
            from loramem.writer import WriterSettings

            encoded = self._encode(fresh)
            settings = settings or WriterSettings()
            plan_write([], [], 1, goal=goal, rank=rank)  # refuses a bad goal or rank before the journal is written
            request = {"goal": goal, "rank": rank, "partial": partial, "settings": asdict(settings)}
            write_id = self._index.begin_write(fresh, request)
            return self._run(write_id, encoded, request, skipped, progress)

    def resume(self, progress: "ProgressCallback | None" = None) -> WriteReport:
        """Run the interrupted write again from its journal, with the settings it was started with."""
        with self._lock, self._writing():
            pending = self._require_pending()
            return self._run(pending.id, self._encode(pending.records), pending.request, 0, progress)

    def discard(self) -> int:
        """Forget the interrupted write; returns how many records it held."""
        with self._lock, self._writing():
            pending = self._require_pending()
            self._index.end_write(pending.id, DISCARDED)
            self._clean()
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
            return next(self._decode([self._find(key, namespace)])).value

    def recall_many(self, keys: Iterable[str] | None = None, namespace: str = "") -> Iterator[Recall]:
        """Decode many values, batched and grouped by adapter; all of the namespace if ``keys`` is None.

        Yields in the order of adapters, not of ``keys``. Raises as `recall`, at the first record that fails.
        """
        with self._lock:
            if keys is None:
                found = list(self._index.records(namespace))
            else:
                found = sorted((self._find(key, namespace) for key in keys), key=lambda record: record.adapter)
        for start, end in _runs([record.adapter for record in found]):
            with self._lock:
                decoded = list(self._decode(found[start:end]))
            yield from decoded

    def explain(self, key: str, namespace: str = "") -> Explanation:
        """Probability of every answer token and the end token, with the adapter and without it.

        The value is decoded from the weights first, then scored under teacher forcing in a batch of one.
        Raises as `recall`.
        """
        from loramem.recall import answer_probabilities

        with self._lock:
            record = self._find(key, namespace)
            value = next(self._decode([record])).value
            encoded = self._encode([Record(key, value, namespace)])
            (_, probs), *_rest = answer_probabilities(self._adapted.model, encoded)
            with self._adapted.disabled():
                (_, base_probs), *_rest = answer_probabilities(self._adapted.model, encoded)
            tokenizer = self.base.tokenizer
            tokens = tuple(
                TokenProbability(tokenizer.decode([token]), token, float(p), float(p_base), float(p) > 0.5)
                for token, p, p_base in zip(encoded[0].answer_ids, probs, base_probs, strict=True)
            )
            return Explanation(key, value, record.adapter, tokens)

    def load(self, key: str, namespace: str = "") -> tuple[Any, list[int]]:
        """The base model with the adapter of ``key`` active, and the prompt's token ids, for your own ``generate``."""
        with self._lock:
            self._activate(self._find(key, namespace).adapter)
            return self._adapted.model, self._template.prompt_ids(self.base.tokenizer, key)

    def verify(self) -> VerifyReport:
        """Check every file and row against its sha256, then decode every record from its adapter.

        Never raises for damage: the report lists it.
        """
        with self._lock:
            started = time.monotonic()
            damaged = list(self._index.damaged())
            damaged += [problem for adapter in self._index.adapters() for problem in self._file_problems(adapter)]
            records = list(self._index.records())
            failed = []
            for start, end in _runs([record.adapter for record in records]):
                try:
                    failed += [record.key for record, value in self._try_decode(records[start:end]) if value is None]
                except IntegrityError as error:
                    failed += [record.key for record in records[start:end]]
                    if error.what not in " ".join(damaged):
                        damaged.append(str(error))
            return VerifyReport(
                records=len(records),
                exact=len(records) - len(failed),
                failed=tuple(failed),
                damaged=tuple(damaged),
                elapsed_s=time.monotonic() - started,
            )

    # The base model

    @cached_property
    def base(self) -> "BaseModel":
        """The base model, loaded on first use and checked against the store's fingerprint."""
        from loramem.base_model import load_base_model

        manifest = self.manifest
        name = self._model_name or manifest.location or manifest.base_model
        dtype = manifest.dtype if self._dtype == "auto" else self._dtype
        revision = self._revision or (None if manifest.location else manifest.revision)
        base = load_base_model(name, revision=revision, device=self._device, dtype=dtype)
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

    @property
    def _template(self) -> "PromptTemplate":
        from loramem.prompts import PromptTemplate

        prompt = self.manifest.prompt
        return PromptTemplate(
            tuple(prompt["prefix_ids"]), tuple(prompt["suffix_ids"]), prompt["end_id"], prompt["kind"]
        )

    @property
    def _placement(self) -> "Placement":
        from loramem.adapters import Placement

        return Placement(tuple(self.manifest.placement["modules"]), tuple(self.manifest.placement["layers"]))

    # Creating and opening

    def _create(self) -> None:
        from loramem.adapters import Placement
        from loramem.base_model import load_base_model
        from loramem.writer import WriterSettings

        if self.path.exists() and (not self.path.is_dir() or _foreign(self.path)):
            raise StoreFormatError(f"{self.path} exists and is not a loramem store. Give another path.")
        name = self._model_name or embedded.NAME
        base = load_base_model(name, revision=self._revision, device=self._device, dtype=self._dtype)
        is_local = base.revision is None and base.id != embedded.NAME
        manifest = Manifest(
            base_model=base.id,
            location=str(base.folder.resolve()) if is_local else None,
            revision=base.revision,
            fingerprint=asdict(base.fingerprint),
            dtype=base.dtype,
            prompt={name: _plain(value) for name, value in asdict(base.template).items()},
            placement={name: list(value) for name, value in asdict(Placement.default(base.model)).items()},
            train_threshold=WriterSettings.train_threshold,
            certify_threshold=WriterSettings.certify_threshold,
        )
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        index = Index(self.path / "index.db")
        with index.db.atomic():
            index.set_meta("manifest_sha256", hashlib.sha256(manifest.to_bytes()).hexdigest())
            index.set_meta("rows_sha256", index.rows_digest())
        index.close()
        (self.path / "index.db").chmod(0o600)
        manifest.save(self.path)  # last: a folder with a manifest is a whole store
        self.base = base

    def _read_manifest(self) -> Manifest:
        content = (self.path / MANIFEST).read_bytes()
        manifest = Manifest.from_bytes(content, self.path)
        if self._index.meta("manifest_sha256") != hashlib.sha256(content).hexdigest():
            raise IntegrityError(
                f"{self.path / MANIFEST} is not what was committed. Restore it from a backup.", what=MANIFEST
            )
        return manifest

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

    # Steps of a write

    def _admit(self, records: Sequence[Record]) -> tuple[list[Record], int]:
        """Records that are new, and how many are here already; refuses other values for known keys."""
        fresh, repeated = deduplicate(records)
        new = []
        for record in fresh:
            known = self._index.find(record.namespace, record.key)
            if known is None:
                new.append(record)
            elif known.holds(record.value):
                repeated.append(record)
            else:
                raise ConflictingRecord(
                    f"Key {record.key!r} is in the store with another value; this one would replace it. "
                    "Use another key or another store.",
                    key=record.key,
                    line=record.line,
                )
        if repeated:
            log.info("%d records are in the store already and were skipped", len(repeated))
        return new, len(repeated)

    def _encode(self, records: Sequence[Record]) -> "list[EncodedRecord]":
        from loramem.prompts import encode_records

        encoded = encode_records(records, self.base.tokenizer, self._template, self.base.max_tokens)
        for entry in encoded:
            record = entry.record
            other = self._index.find_prompt(record.namespace, prompt_digest(entry.prompt_ids))
            if other is not None and other != record.key:
                raise PromptCollision(
                    f"Key {record.key!r} gives the same prompt token ids as the stored key {other!r}. Rename it.",
                    other=other,
                    key=record.key,
                    line=record.line,
                )
        # A shard never mixes namespaces: the same key in two of them is the same prompt.
        return sorted(encoded, key=lambda entry: entry.record.namespace)

    def _costs(self, encoded: "Sequence[EncodedRecord]") -> list[float]:
        """Bits of each value that the plain base does not know: Σ max(0, −log2 p − 1) over its answer tokens."""
        from loramem.recall import answer_probabilities

        with self._adapted.disabled():
            probs = dict(answer_probabilities(self._adapted.model, encoded))
        return [float((-probs[i][:-1].log2() - 1).clamp(min=0).sum()) for i in range(len(encoded))]

    def _plan(self, encoded: "Sequence[EncodedRecord]", goal: str, rank: int | None) -> Plan:
        per_rank = self._placement.parameters_per_rank(self.base.model)
        lengths, costs = [entry.length for entry in encoded], self._costs(encoded)
        shards = []
        for start, end in _runs([entry.record.namespace for entry in encoded], most=len(encoded)):
            plan = plan_write(lengths[start:end], costs[start:end], per_rank, goal=goal, rank=rank)
            shards += [shard.moved(start) for shard in plan.shards]
        return Plan(goal, tuple(shards))

    def _run(
        self,
        write_id: int,
        encoded: "Sequence[EncodedRecord]",
        request: Mapping[str, Any],
        skipped: int,
        progress: "ProgressCallback | None",
    ) -> WriteReport:
        """Train, prove and commit a journalled write.

        A typed error closes the journal entry; anything else (an interrupt, a crash) leaves it to be resumed.
        """
        from loramem.shards import numbered, write_shard
        from loramem.writer import WriterSettings

        started = time.monotonic()
        self._clean()
        staging = self.path / "staging"
        plan = self._plan(encoded, request["goal"], request["rank"])
        settings = WriterSettings(**request["settings"])
        shards: list[tuple[Shard, float]] = []
        given_up: list[EncodedRecord] = []
        try:
            for number, planned in enumerate(plan.shards, start=1):
                part = encoded[planned.first : planned.first + planned.records]
                done, failed = write_shard(
                    self._adapted,
                    part,
                    planned.rank,
                    self._placement,
                    settings,
                    staging,
                    numbered(progress, number, len(plan.shards)),
                )
                shards += [(shard, planned.cost_bits * len(shard.records) / planned.records) for shard in done]
                given_up += failed
            if given_up and not (request["partial"] and shards):
                raise _stubborn(given_up, settings.max_rank)
        except (WriteError, RecallError):
            self._index.end_write(write_id, FAILED)
            self._clean()
            raise
        self._commit(write_id, shards)
        return WriteReport(
            written=sum(len(shard.records) for shard, _ in shards),
            skipped=skipped,
            failed=tuple(entry.record.key for entry in given_up),
            adapters=tuple(shard.adapter for shard, _ in shards),
            rank=max(shard.training.rank for shard, _ in shards),
            exact_match=sum(len(shard.records) for shard, _ in shards) / len(encoded),
            min_prob=min(shard.proof.min_prob for shard, _ in shards),
            parameters=sum(shard.training.parameters for shard, _ in shards),
            cost_bits=sum(cost for _, cost in shards),
            steps=sum(shard.training.steps for shard, _ in shards),
            visits=sum(shard.training.visits for shard, _ in shards),
            training_s=sum(shard.training.elapsed_s for shard, _ in shards),
            elapsed_s=time.monotonic() - started,
        )

    def _commit(self, write_id: int, shards: "Sequence[tuple[Shard, float]]") -> None:
        """Files first (they were synced in staging), then one transaction."""
        from loramem.shards import stored_adapter

        target = self.path / "adapters"
        target.mkdir(mode=0o700, exist_ok=True)
        for shard, _ in shards:
            move_synced(shard.folder, target / shard.adapter)
        adapters = [stored_adapter(shard, target / shard.adapter, cost) for shard, cost in shards]
        records = [
            stored_record(entry.record, entry.prompt_ids, entry.length, shard.adapter, min_prob)
            for shard, _ in shards
            for entry, min_prob in zip(shard.records, shard.proof.min_probs, strict=True)
        ]
        self._index.commit(write_id, adapters, records)

    def _clean(self) -> None:
        """Remove what no committed row needs: staging, and adapters of a write that never committed."""
        shutil.rmtree(self.path / "staging", ignore_errors=True)
        committed = {adapter.id for adapter in self._index.adapters()}
        for folder in (self.path / "adapters").glob("*"):
            if folder.name not in committed:
                shutil.rmtree(folder, ignore_errors=True)

    def _require_pending(self) -> PendingWrite:
        pending = self._index.pending_write()
        if pending is None:
            raise WriteError("There is no interrupted write to resume or discard.")
        return pending

    # Steps of a recall

    def _find(self, key: str, namespace: str) -> StoredRecord:
        record = self._index.find(namespace, key)
        if record is None:
            raise KeyNotFound(key, namespace=namespace, close=self._index.close_keys(namespace, key))
        return record

    def _decode(self, records: Sequence[StoredRecord]) -> Iterator[Recall]:
        """Decode records of one adapter; a value that is not the committed one is an error, never returned."""
        for record, value in self._try_decode(records):
            if value is None:
                raise RecallError(
                    f"Adapter {record.adapter} did not give back the committed value of {record.key!r}. Run "
                    "loramem verify; the value is not returned.",
                    key=record.key,
                    adapter=record.adapter,
                )
            yield Recall(record.key, value, record.min_prob, record.adapter)

    def _try_decode(self, records: Sequence[StoredRecord]) -> list[tuple[StoredRecord, str | None]]:
        """Records of one adapter with what was decoded, None where it is not the committed value."""
        from loramem.prompts import decode_answer
        from loramem.recall import greedy_decode

        self._activate(records[0].adapter)
        tokenizer, template = self.base.tokenizer, self._template
        ids = greedy_decode(
            self._adapted.model,
            [template.prompt_ids(tokenizer, record.key) for record in records],
            max(record.answer_tokens for record in records) + 2,  # the end token, and one beyond: it must have ended
            template.end_id,
        )
        values = [decode_answer(tokenizer, row) for row in ids]
        return [(r, value if r.holds(value) else None) for r, value in zip(records, values, strict=True)]

    def _activate(self, adapter: str) -> None:
        """Load an adapter from disk if it is not loaded, after checking its files."""
        row = self._index.adapter(adapter)
        if row is None:
            raise IntegrityError(f"The index has no adapter {adapter!r}.", what=adapter)
        if not self._adapted.is_loaded(adapter) and (problems := self._file_problems(row)):
            raise IntegrityError(f"{problems[0]}. Values from it are not returned.", what=adapter)
        self._adapted.load(adapter, self.path / "adapters" / adapter)

    def _file_problems(self, adapter: StoredAdapter) -> list[str]:
        problems = []
        for name, expected in adapter.files.items():
            path = self.path / "adapters" / adapter.id / name
            try:
                found = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                problems.append(f"Adapter {adapter.id}: {name} cannot be read ({error.strerror})")
                continue
            if found != expected:
                problems.append(f"Adapter {adapter.id}: {name} is not what was committed (sha256 differs)")
        return problems


def _runs(labels: Sequence[str], most: int = RECALL_BATCH) -> Iterator[tuple[int, int]]:
    """Half-open ranges of equal labels, none longer than ``most``."""
    start = 0
    for index in range(1, len(labels) + 1):
        if index == len(labels) or labels[index] != labels[start] or index - start == most:
            yield start, index
            start = index


def _foreign(path: Path) -> list[Path]:
    """Files that a store whose creation was interrupted would not contain."""
    ours = {"index.db", "index.db-wal", "index.db-shm", "store.lock", "store.json.partial"}
    return [entry for entry in path.iterdir() if entry.name not in ours]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _stubborn(records: "Sequence[EncodedRecord]", rank: int) -> StubbornRecords:
    keys = [entry.record.key for entry in records]
    shown = ", ".join(map(repr, keys[:5])) + (" …" if len(keys) > 5 else "")
    return StubbornRecords(
        f"{len(keys)} records could not be certified, at rank {rank} and on their own: {shown}. Nothing was committed; "
        "partial=True (--partial) commits the others.",
        keys=keys,
        rank=rank,
    )
