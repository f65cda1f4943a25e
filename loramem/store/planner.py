"""What a write would be: which records are new, as token ids, and the adapters and ranks that they take.

Nothing is changed here, and nothing trained.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

from loramem.errors import ConflictingRecord, DoesNotFit, PromptCollision
from loramem.index.index import Index
from loramem.models.adapters import AdaptedModel
from loramem.models.placement import Placement
from loramem.models.shard_sizes import Size, cut_groups
from loramem.planning import calibration, timings
from loramem.planning.base_calibration import known_of
from loramem.planning.limits import RankLimits
from loramem.planning.plan import Plan, PlanInputs, Price, plan_groups
from loramem.planning.pricing import Priced, priced, run_pricing
from loramem.planning.sampled_prices import SAMPLE, Prices, priced_by
from loramem.records.contexts import Context, with_contexts
from loramem.records.outcome import Outcome
from loramem.records.prompts import EncodedRecord, Tokenized, prompt_digest, settle, tokenize
from loramem.records.questions import asked_apart
from loramem.records.record import Record, deduplicate, question_taken
from loramem.store.manifest import Manifest
from loramem.store.request import OnConflict, WriteRequest
from loramem.training.jobs import JobBase, PricingJob, TokenizingJob, releases
from loramem.workers.executors import completed
from loramem.workers.worker import run_tokenizing

log = logging.getLogger(__name__)

TOGETHER = 512
"""Records of a job that tokenizes; so few are tokenized here."""
LEARNT = 1_000
"""Outcomes, one for each shard."""
EIGHT_BITS_ROOM = 1.6
"""Factor on first ranks where adapters meet inputs of eight bits: of a hundred phone numbers on SmolLM2 one in three
hundred failed there at rank 10, none at 16 (docs/serving.md)."""


class Planner:
    """Admits records to one store and plans their adapters.

    Args:
        calibrate: Whether the first plan calibrates a base model that nothing is known of; see
            `loramem.planning.base_calibration.is_wanted`.
        device: That jobs of other processes run on, as it was asked for: "auto" leaves them the choice.
    """

    def __init__(
        self,
        index: Index,
        manifest: Manifest,
        adapted: AdaptedModel,
        *,
        calibrate: bool | None = None,
        device: str = "auto",
    ) -> None:
        self.index, self.adapted, self.calibrate, self.device = index, adapted, calibrate, device
        self.template, self.placement = manifest.template(), manifest.placed()
        self.eight_bits = "q8_0" in manifest.serve

    def over(self, index: Index) -> "Planner":
        """The same over another connection, for another thread; sizes of placements are looked at by this one."""
        assert self.sizes
        other = copy(self)
        other.index = index
        return other

    def admit(
        self,
        records: Sequence[Record],
        on_conflict: OnConflict = "error",
        executor: Executor | None = None,
        ended: Collection[tuple[str, str]] = (),
    ) -> tuple[list[EncodedRecord], int]:
        """Records and their questions to write as token ids, and how many records are not written.

        A record that gets another value keeps the questions it has.

        Args:
            on_conflict: What becomes of a record whose key is there with another value.
            executor: See `encode`.
            ended: Namespace and key of records that end with the write, and leave their questions to it.

        Raises:
            RecordError: A record cannot be written, or its key has another value; see the subclasses.
        """
        new, skipped = self._new(records, on_conflict, ended)
        if skipped:
            log.info("%d records are in the store already and were skipped", skipped)
        return self.encode(new, executor=executor), skipped

    def admits(
        self, records: Sequence[Record], encoded: Sequence[EncodedRecord], skipped: int, on_conflict: OnConflict
    ) -> bool:
        """Whether what `admit` made of records before is what it would make of them now, if none end with the write.

        Raises:
            ConflictingRecord: The key of one has another value by now.
            QuestionTaken: A text of one asks for another record by now.
        """
        if skipped or self.index.find_many((entry.record.namespace, entry.record.key) for entry in encoded):
            new, _ = self._new(records, on_conflict)
            if _identities(new) != _identities(entry.record for entry in encoded):
                return False
        return self._collision(encoded) is None

    def _new(
        self, records: Sequence[Record], on_conflict: OnConflict, ended: Collection[tuple[str, str]] = ()
    ) -> tuple[list[Record], int]:
        """Those that are to be written, questions among them, and how many records are not."""
        fresh, repeated = deduplicate(asked_apart(records))
        there = self.index.find_many((record.namespace, record.key) for record in fresh)
        given = {(record.namespace, record.key) for record in fresh}
        had = self.index.questions_of(there) if on_conflict == "replace" else {}
        new, kept_as_it_is = list[Record](), set[tuple[str, str]]()
        for record in fresh:
            known = there.get((record.namespace, record.key))
            if known is not None and (known.namespace, known.question_of or "") in ended and record.question_of:
                known = None
            if (record.namespace, record.question_of) in kept_as_it_is:
                continue
            if known is None:
                new.append(record)
            elif known.question_of != record.question_of:
                raise question_taken(record, known.question_of or known.key)
            elif known.holds(record.value):
                repeated.append(record)
            elif on_conflict == "skip":
                repeated.append(record)
                kept_as_it_is.add((record.namespace, record.key))
            elif on_conflict == "replace":
                new.append(record)
                new += [
                    Record(question, record.value, record.namespace, question_of=record.key)
                    for question in had.get((record.namespace, record.key), [])
                    if (record.namespace, question) not in given
                ]
            else:
                raise ConflictingRecord(
                    f"Key {record.key!r} is in the store with another value. Replace it "
                    '(on_conflict="replace", --on-conflict replace), skip it, or use another key.',
                    key=record.key,
                    line=record.line,
                )
        return new, sum(record.question_of is None for record in repeated)

    def encode(
        self,
        records: Sequence[Record],
        kept: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
        executor: Executor | None = None,
    ) -> list[EncodedRecord]:
        """Records as token ids, grouped by namespace: a shard never mixes them, as equal keys are equal prompts.

        Args:
            kept: Prompts of records that are written anew, by namespace and key.
            executor: Its processes have the tokenizer as well.
        """

        def taken(record: Record, prompt_ids: Sequence[int]) -> bool:
            prompt = record.namespace, prompt_digest(prompt_ids)
            return self.index.find_prompts([prompt]).get(prompt, record.key) != record.key

        base = self.adapted.base
        if executor is None or len(records) <= TOGETHER:
            limits = base.max_tokens, base.unreachable, base.vocabulary
            tokenized = tokenize(records, base.tokenizer, self.template, *limits, kept=kept)
        else:
            assert kept is None
            tokenized = self._tokenized(records, executor)
        encoded = settle(records, tokenized, base.max_tokens, taken)
        if (collision := self._collision(encoded)) is not None:
            record, other = collision
            raise PromptCollision(
                f"Key {record.key!r} gives the same prompt token ids as the stored key {other!r}. Rename it.",
                other=other,
                key=record.key,
                line=record.line,
            )
        return sorted(encoded, key=lambda entry: entry.record.namespace)

    def check_answer(self, text: str) -> None:
        """Refuse an answer that no key can be given.

        Raises:
            RecordError: See `tokenize`.
        """
        base = self.adapted.base
        limits = base.max_tokens, base.unreachable, base.vocabulary
        tokenize([Record("-", text)], base.tokenizer, self.template, *limits)

    def in_contexts(self, encoded: Sequence[EncodedRecord], contexts: Sequence[Context]) -> Sequence[EncodedRecord]:
        """Records with their prompts in chats. Raises what `with_contexts` raises."""
        if not contexts:
            return encoded
        base = self.adapted.base
        return with_contexts(encoded, contexts, base.tokenizer, self.template, base.max_tokens, base.vocabulary)

    def _collision(self, encoded: Sequence[EncodedRecord]) -> tuple[Record, str] | None:
        """The first record whose prompt is that of another key in the store, with this key."""
        prompts = [(entry.record.namespace, entry.prompt_sha256) for entry in encoded]
        holders = self.index.find_prompts(prompts)
        for entry, prompt in zip(encoded, prompts, strict=True) if holders else ():
            if (other := holders.get(prompt, entry.record.key)) != entry.record.key:
                return entry.record, other
        return None

    def _tokenized(self, records: Sequence[Record], executor: Executor) -> list[Tokenized]:
        """`tokenize`, by an executor's processes."""
        base, here = JobBase.of(self.adapted.base, self.device), releases()
        jobs = (
            TokenizingJob(
                base, tuple(record.bare() for record in records[start : start + TOGETHER]), self.template, here
            )
            for start in range(0, len(records), TOGETHER)
        )
        found = dict(completed(executor, run_tokenizing, jobs))
        return [ids for number in sorted(found) for ids in found[number]]

    def plan(
        self,
        encoded: Sequence[EncodedRecord],
        request: WriteRequest,
        limits: RankLimits | None = None,
        kind: str | None = None,
        *,
        learnt: Sequence[Outcome] | None = None,
        keep_features: bool = False,
        executor: Executor | None = None,
    ) -> Plan:
        """Shards and ranks for encoded records, by the prices of a sample (`loramem.planning.sampled_prices`).

        Args:
            limits: Ranks that adapters may have; those of the request unless given.
            kind: Of data; the calibrated one that costs most nearly as much if None.
            learnt: Outcomes of writes to this store; what it has learnt by now if None.
            keep_features: For a training in this process, which follows: see `priced`.
            executor: Asks the base model about the values; this process does if None.

        Raises:
            DoesNotFit: See `plan_write`.
        """
        groups = groupby(encoded, key=lambda entry: entry.record.namespace)
        sizes = [len(list(group)) for _, group in groups]
        lengths = [entry.length for entry in encoded]
        most = None if request.one_adapter else self.sizes[0].shard_tokens()
        ranges = cut_groups(sizes, [length + 1 for length in lengths], most)
        learnt = self.learnt() if learnt is None else learnt

        def by(chosen: Sequence[int]) -> Plan:
            parts = self._priced(encoded, [ranges[number] for number in sorted({*chosen})], keep_features, executor)
            price = Prices(encoded, ranges, chosen, dict(zip(sorted({*chosen}), parts, strict=True)))
            sample = price(0, len(lengths[:SAMPLE])) if encoded else None
            return plan_groups(
                sizes,
                lengths,
                price,
                self.plan_inputs(sample, sum(lengths[:SAMPLE]), kind, learnt),
                goal=request.goal,
                rank=request.first_rank,
                limits=limits or request.limits,
                one_adapter=request.one_adapter,
            )

        every, chosen = list(range(len(ranges))), priced_by(encoded, ranges)
        try:
            return by(chosen)
        except DoesNotFit:
            if chosen == every:
                raise
            return by(every)  # nothing is refused by an estimate

    def _priced(
        self,
        encoded: Sequence[EncodedRecord],
        ranges: Sequence[tuple[int, int]],
        keep_features: bool,
        executor: Executor | None,
    ) -> list[Priced]:
        """`priced`, of each range of records, by an executor's processes if there is one."""
        if executor is None:
            return [
                priced(self.adapted, encoded[first:last], self.placement, keep_features=keep_features)
                for first, last in ranges
            ]
        base, here = JobBase.of(self.adapted.base, self.device), releases()
        jobs = (
            PricingJob(base, tuple(entry.bare() for entry in encoded[first:last]), self.placement, here)
            for first, last in ranges
        )
        found = dict(completed(executor, run_pricing, jobs))
        return [found[number] for number in range(len(ranges))]

    def plan_inputs(self, price: Price | None, length: int, kind: str | None, learnt: Sequence[Outcome]) -> PlanInputs:
        """What a plan rests on: what is known of the base model and what this store's writes taught.

        Args:
            price: Of ``length`` answer tokens, by which their kind is told unless it is given.
            learnt: Outcomes of the store's writes.
        """
        base, place = self.adapted.base, (self.placement.modules, self.placement.layers)
        weights = base.fingerprint.weights[:12]
        known = known_of(self.adapted, calibrate=self.calibrate)
        if kind is None and known is not None and price is not None:
            kind = calibration.nearest_kind(known, price.cost_bits, length)
        inputs = calibration.plan_inputs(
            known,
            place,
            self.sizes[0].parameters_per_rank,
            kind,
            learnt,
            timings.seconds_per_visit(weights, base.device.type),
            self.sizes[1:],
        )
        return replace(inputs, room=EIGHT_BITS_ROOM) if self.eight_bits or base.rounds_inputs else inputs

    def learnt(self) -> list[Outcome]:
        """What the newest writes to this store came to, which plans go by: enough of them, however large it is."""
        return self.index.outcomes(LEARNT)

    @cached_property
    def sizes(self) -> list[Size]:
        """Of the placements of `ladder`."""
        return [each.size(self.adapted.model) for each in self.ladder()]

    def ladder(self) -> list[Placement]:
        """The store's placement and those that hold more."""
        ladder = self.adapted.ladder
        return ladder[ladder.index(self.placement) :] if self.placement in ladder else [self.placement]


def _identities(records: Iterable[Record]) -> set[tuple[str, str, str | None]]:
    return {(record.namespace, record.key, record.question_of) for record in records}
