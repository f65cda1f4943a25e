"""The reading half of a store: what it holds, values from the weights, plans. It takes no lock and changes nothing.

Torch is imported only once the base model is needed.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_args

from loramem._util.choices import check_choice
from loramem.api.listing import Listing
from loramem.errors import ArgumentError, IntegrityError, KeyNotFound, LoramemError, RecallError
from loramem.index.connection import sqlite_errors
from loramem.index.index import NAME as INDEX
from loramem.index.index import Index
from loramem.index.rows import Located, StoredAdapter, StoredRecord
from loramem.index.temporary_table import TemporaryTable
from loramem.planning.limits import ANY_RANK, GoalName, RankLimits, check_request
from loramem.planning.plan import Plan, PlanInputs
from loramem.records.outcome import Outcome
from loramem.records.record import RecordLike, as_records
from loramem.results import (
    Explanation,
    Kept,
    Recall,
    VerifyReport,
)
from loramem.store.manifest import NAME as MANIFEST
from loramem.store.manifest import Manifest, read_manifest
from loramem.store.request import OnConflict, WriteRequest
from loramem.store.session import ModelOptions, Session
from loramem.store.stats import quick_check

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from loramem.models.base_model import BaseModel

_Read = TypeVar("_Read")


class Memory(Listing):
    """A store that exists, to be read; `Publishing` hands it on, `MemoryStore` adds what changes it."""

    def __init__(self, path: Path, options: ModelOptions) -> None:
        path = path.absolute()  # whatever folder this process goes to
        self.path = path
        self._lock = threading.RLock()
        Manifest.from_bytes((path / MANIFEST).read_bytes(), path)  # a newer format is refused, its index left alone
        self._index = Index.open(path / INDEX)
        try:
            with sqlite_errors(self._index.path):
                self.manifest = read_manifest(path, self._index)
        except BaseException:
            self._index.close()
            raise
        self._index.key_salt = self.manifest.key_salt
        self._session = Session(path, self._index, self.manifest, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index; the store object is not used afterwards."""
        with self._lock:
            self._index.close()

    @property
    def base(self) -> "BaseModel":
        """The base model, loaded on first use and checked against the store's fingerprint.

        Its ``model`` answers as if there were no store, except after `load`.

        Raises:
            OtherBaseModel: Another model, or the same with other weights, configuration or tokenizer.
            BaseModelNotFound: It cannot be loaded.
        """
        with self._lock:
            return self._session.base

    # Plans

    def plan(
        self,
        records: Mapping[str, str] | Iterable[RecordLike],
        *,
        namespace: str = "",
        goal: GoalName = "fast",
        rank: int | None = None,
        limits: RankLimits = ANY_RANK,
        kind: str | None = None,
        on_conflict: OnConflict = "error",
        one_adapter: bool = False,
    ) -> Plan:
        """What `write` would do with these records, without training or changing anything.

        Args:
            limits: Ranks that adapters may have.
            kind: Of data, whose pace is told; the calibrated one that costs most nearly as much if None.
            one_adapter: As in `MemoryStore.write`.

        Raises:
            RecordError: A record cannot be written.
            DoesNotFit: A value, or all with ``one_adapter``, is too much for the highest rank allowed.
            UnknownChoice: No such goal or conflict rule.
            ArgumentError: A rank outside the limits.
        """
        check_request(goal, rank, limits)
        check_choice("on_conflict", on_conflict, get_args(OnConflict))
        with self._turn():
            encoded, _ = self._session.planner.admit(as_records(records, namespace), on_conflict)
            request = WriteRequest(goal, rank, one_adapter=one_adapter)
            return self._session.planner.plan(encoded, request, limits, kind)

    def plan_inputs(self, kind: str | None = None) -> PlanInputs:
        """What plans for this store rest on: success boundary, pace, and the law of a kind of data."""
        with self._turn():
            return self._session.planner.plan_inputs(None, 0, kind, self._index.outcomes())

    def outcomes(self) -> list[Outcome]:
        """What the writes to this store came to at their first rank, oldest first."""
        with self._turn():
            return self._index.outcomes()

    # Reading

    def recall(self, key: str, namespace: str = "") -> str:
        """Decode a value from the weights and check it against the committed digest.

        Raises:
            KeyNotFound: No such record; carries close keys.
            RecallError: The weights gave something else.
            IntegrityError: The adapter's files are not what was committed.
            OtherBaseModel: The base model is not the one the store was written with.
        """
        return self._read(key, namespace, lambda found: self._session.reader.value(found))

    def recall_many(
        self, keys: Iterable[str] | None = None, namespace: str = "", *, ordered: bool = True
    ) -> Iterator[Recall]:
        """Decode many values, batched by adapter and length; all of the namespace if ``keys`` is None.

        Yields in the order of ``keys``, a key given twice twice, or without them in the order of `keys`; all values are
        of the one committed state at the first of them. Memory does not grow with the number of records: index rows
        wait in a temporary file, without values, and at most 65,536 values, or a million tokens of them, in memory for
        one that comes before them. Keys of many adapters in turn are decoded in as many small batches per 65,536.
        Raises what `recall` raises, at the first record that fails.

        Args:
            ordered: False yields each value when it is decoded, in the order of batches, which are as few as can be.

        Raises:
            StoreChanged: A record was replaced or deleted while this went on, and its adapter removed.
            StoreError: There is no room for the temporary file.
        """
        from loramem.store.read import in_order

        numbered = self._recall_numbered(keys, namespace, windows=ordered)
        return in_order(numbered) if ordered else (recall for _, recall in numbered)

    def recall_each(self, questions: Sequence[tuple[str, str]]) -> list[Recall | LoramemError]:
        """Decode values of any namespaces and adapters in one turn, batched whatever adapters they are in.

        Args:
            questions: Namespace and key of each.

        Returns:
            In the order of ``questions`` what `recall_many` yields, or the error that `recall` would raise of it.
        """
        from loramem.store.mixed import answer_each

        answers: dict[int, Recall | LoramemError] = {}
        found, holds = dict[int, Located](), dict[str, StoredAdapter]()
        with self._turn():
            with self._index.snapshot():
                for place, (namespace, key) in enumerate(questions):
                    try:
                        record = self._find(key, namespace)
                        if record.adapter not in holds:
                            holds[record.adapter] = self._index.located([record])[0].adapter
                        found[place] = Located(record, holds[record.adapter])
                    except (KeyNotFound, IntegrityError) as error:
                        answers[place] = error
            places = list(found)
            for number, answer in answer_each(self._session.reader, list(found.values())):
                answers[places[number]] = answer
            for place, before in found.items():
                failed = answers[place]
                if isinstance(failed, IntegrityError):  # or its adapter went in between
                    answers[place] = self._moved(before, failed)
        return [answers[place] for place in range(len(questions))]

    def _moved(self, before: Located, error: IntegrityError) -> Recall | LoramemError:
        """A record whose adapter was not as committed, from the one that holds it now, if that is another one."""
        try:
            now = self._locate(before.record.key, before.record.namespace)
            if now.adapter.id == before.adapter.id:
                return error
            return next(self._session.reader.decode([now]))
        except (KeyNotFound, RecallError, IntegrityError) as other:
            return other

    def _recall_numbered(
        self, keys: Iterable[str] | None, namespace: str, *, windows: bool
    ) -> Iterator[tuple[int, Recall]]:
        """Values as they are decoded, each with its place among those asked for."""
        from loramem.store.read import numbered_batches

        with TemporaryTable(windows=windows) as table:
            with self._turn(), self._index.snapshot():
                if keys is None:
                    table.add(self._index.in_order(namespace))
                else:
                    table.add(self._find(key, namespace) for key in keys)
            for places, batch in numbered_batches(table.numbered()):
                with self._turn():
                    decoded = list(self._session.reader.decode_current(batch))
                yield from zip(places, decoded, strict=True)

    def explain(self, key: str, namespace: str = "") -> Explanation:
        """Probability of every answer token and the end token, with the adapter and without it.

        The value is decoded from the weights first, then scored under teacher forcing in a batch of one.
        Raises what `recall` raises.
        """

        def explained(found: Located) -> Explanation:
            value = self._session.reader.value(found)
            tokens = self._session.reader.token_probabilities(found, value)
            kept = found.adapter.proof.get("kept")
            return Explanation(
                key,
                value,
                found.adapter.id,
                tokens,
                None if kept is None else Kept.of(kept),
                found.adapter.proof.get("contexts", 0),
            )

        return self._read(key, namespace, explained)

    def load(self, key: str, namespace: str = "") -> tuple[Any, list[int]]:
        """The base model with the adapter of ``key`` active, and the prompt's ids, for your own ``generate``.

        It stays active until the next call that decodes or writes; after any other the model is the plain base.
        Raises what `recall` raises, except RecallError.
        """

        def loaded(found: Located) -> tuple[Any, list[int]]:
            self._session.reader.activate(found.adapter)
            return self._session.adapted.model, self._session.reader.prompt_ids(found.record)

        return self._read(key, namespace, loaded)

    def prompt(self, key: str, namespace: str = "") -> tuple[StoredRecord, list[int]]:
        """A key's index row and the ids that its adapter is asked with, for a server that has it.

        Of the base model only the tokenizer is loaded. Raises what `record` raises, OtherBaseModel and
        BaseModelNotFound.
        """
        with self._turn():
            record = self._find(key, namespace)
            return record, self.manifest.template().stored_ids(self._session.tokenizer, key, record.prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of answer ids, to the letter; as `prompt` it needs the tokenizer alone."""
        from loramem.records.prompts import decode_answer

        with self._turn():
            return decode_answer(self._session.tokenizer, ids)

    def verify(
        self,
        *,
        quick: bool = False,
        resume: bool = False,
        progress: Callable[[int, int], None] | None = None,
        executor: "Executor | None" = None,
    ) -> VerifyReport:
        """Check every file and row against its sha256, then decode every record from its adapter.

        The base model's weights are hashed again too. Damage does not raise: the report lists it. A store that was
        pulled without its keys cannot be asked for its records: there it is as with ``quick``.

        Args:
            quick: Structure and hashes alone: nothing is decoded, the base model is not loaded.
            resume: Leave out the adapters that an interrupted verify on this machine had decoded, if nothing has
                changed since: no row, base model, device or library that decodes. All files are hashed in any case.
            progress: Told how many records of how many are done, after every batch.
            executor: As of `write`: its processes decode, each an adapter at a time, and keep nothing.

        Raises:
            OtherBaseModel: The base model given is not the store's at all.
            ArgumentError: ``quick`` and ``resume``: a quick check decodes nothing that could be left out.
        """
        if quick and resume:
            raise ArgumentError(
                "A quick check decodes nothing: give quick or resume, not both.", argument="resume", value=resume
            )
        with self._turn():
            if quick or self.manifest.key_salt is not None:
                return quick_check(self.path, self._index)
            from loramem.store.verify import full_check

            return full_check(self._session, progress, resume=resume, executor=executor)

    def _read(self, key: str, namespace: str, read: Callable[[Located], _Read]) -> _Read:
        """What is read of a record where it is; once more where its adapter went in between, as compaction has it."""
        with self._turn():
            found = self._locate(key, namespace)
            try:
                return read(found)
            except IntegrityError:
                now = self._locate(key, namespace)
                if now.adapter.id == found.adapter.id:
                    raise
                return read(now)

    def _locate(self, key: str, namespace: str) -> Located:
        found = self._index.locate(namespace, key)
        if found is None:
            raise self._unknown(key, namespace)
        return found
