"""What a write would be: which records are new, as token ids, and the adapters and ranks that they take.

Nothing is changed here, and nothing trained.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from itertools import groupby
from typing import Any

from loramem.errors import ConflictingRecord, PromptCollision
from loramem.index.index import Index
from loramem.index.rows import prompt_digest
from loramem.models.adapters import AdaptedModel
from loramem.models.placement import Placement
from loramem.models.shard_sizes import cut_groups
from loramem.planning import calibration, timings
from loramem.planning.base_calibration import known_of
from loramem.planning.cost import costs_bits
from loramem.planning.limits import RankLimits
from loramem.planning.plan import Plan, PlanInputs, Price, plan_groups
from loramem.planning.variety import effective_vocabulary
from loramem.records.outcome import Outcome
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import Record, deduplicate
from loramem.store.manifest import Manifest
from loramem.store.request import OnConflict, WriteRequest
from loramem.training.executors import completed
from loramem.training.jobs import JobBase, PricingJob, releases
from loramem.training.pricing import base_probabilities
from loramem.training.worker import price as price_in_worker

log = logging.getLogger(__name__)


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

    def admit(self, records: Sequence[Record], on_conflict: OnConflict = "error") -> tuple[list[EncodedRecord], int]:
        """Records to write as token ids, and how many are not written.

        Args:
            on_conflict: What becomes of a record whose key is there with another value.

        Raises:
            RecordError: A record cannot be written, or its key has another value; see the subclasses.
        """
        fresh, repeated = deduplicate(records)
        new = []
        for record in fresh:
            known = self.index.find(record.namespace, record.key)
            if known is None:
                new.append(record)
            elif known.holds(record.value) or on_conflict == "skip":
                repeated.append(record)
            elif on_conflict == "replace":
                new.append(record)
            else:
                raise ConflictingRecord(
                    f"Key {record.key!r} is in the store with another value. Replace it "
                    '(on_conflict="replace", --on-conflict replace), skip it, or use another key.',
                    key=record.key,
                    line=record.line,
                )
        if repeated:
            log.info("%d records are in the store already and were skipped", len(repeated))
        return self.encode(new), len(repeated)

    def encode(
        self, records: Sequence[Record], kept: Mapping[tuple[str, str], Mapping[str, Any]] | None = None
    ) -> list[EncodedRecord]:
        """Records as token ids, grouped by namespace: a shard never mixes them, as equal keys are equal prompts.

        Args:
            kept: Prompts of records that are written anew, by namespace and key.
        """

        def holder(record: Record, prompt_ids: Sequence[int]) -> str | None:
            other = self.index.find_prompt(record.namespace, prompt_digest(prompt_ids))
            return None if other == record.key else other

        encoded = encode_records(
            records,
            (base := self.adapted.base).tokenizer,
            self.template,
            base.max_tokens,
            base.unreachable,
            base.vocabulary,
            kept=kept,
            taken=lambda record, prompt_ids: holder(record, prompt_ids) is not None,
        )
        for entry in encoded:
            record = entry.record
            if (other := holder(record, entry.prompt_ids)) is not None:
                raise PromptCollision(
                    f"Key {record.key!r} gives the same prompt token ids as the stored key {other!r}. Rename it.",
                    other=other,
                    key=record.key,
                    line=record.line,
                )
        return sorted(encoded, key=lambda entry: entry.record.namespace)

    def plan(
        self,
        encoded: Sequence[EncodedRecord],
        request: WriteRequest,
        limits: RankLimits | None = None,
        kind: str | None = None,
        *,
        as_new: bool = False,
        keep_features: bool = False,
        executor: Executor | None = None,
    ) -> Plan:
        """Shards and ranks for encoded records.

        Args:
            limits: Ranks that adapters may have; those of the request unless given.
            kind: Of data; the calibrated one that costs most nearly as much if None.
            as_new: Plan as a new store would, with nothing learnt from the writes to this one.
            keep_features: For a training in this process, which follows: see `base_probabilities`.
            executor: Asks the base model about the values; this process does if None.

        Raises:
            DoesNotFit: See `plan_write`.
        """
        groups = groupby(encoded, key=lambda entry: entry.record.namespace)
        sizes = [len(list(group)) for _, group in groups]
        values = [entry.answer_ids[:-1] for entry in encoded]
        most = None if request.one_adapter else self.placement.size(self.adapted.model).shard_tokens()
        ranges = cut_groups(sizes, [len(entry.answer_ids) for entry in encoded], most)
        if executor is None:
            parts = [
                base_probabilities(self.adapted, encoded[first:last], self.placement, keep_features=keep_features)
                for first, last in ranges
            ]
        else:
            parts = self._asked(encoded, ranges, executor)
        probs = [prob for part in parts for prob in part]

        def price(first: int, last: int) -> Price:
            tokens = [prob for each in probs[first:last] for prob in each]
            loss = -sum(math.log(max(prob, 1e-30)) for prob in tokens) / len(tokens)
            vocabulary = effective_vocabulary(token for entry in encoded[first:last] for token in entry.answer_ids)
            return Price(sum(costs_bits(values[first:last], probs[first:last])), loss, vocabulary)

        learnt = [] if as_new else self.index.outcomes()
        whole = price(0, len(encoded)) if encoded else None
        inputs = self.plan_inputs(whole, sum(map(len, values)), kind, learnt)
        lengths = [len(value) for value in values]
        return plan_groups(
            sizes,
            lengths,
            price,
            inputs,
            goal=request.goal,
            rank=request.first_rank,
            limits=limits or request.limits,
            one_adapter=request.one_adapter,
        )

    def _asked(
        self, encoded: Sequence[EncodedRecord], ranges: Sequence[tuple[int, int]], executor: Executor
    ) -> list[list[list[float]]]:
        """`base_probabilities` of each range of records, by an executor's processes."""
        base, here = JobBase.of(self.adapted.base, self.device), releases()
        jobs = (
            PricingJob(base, tuple(entry.bare() for entry in encoded[first:last]), self.placement, here)
            for first, last in ranges
        )
        found = dict(completed(executor, price_in_worker, jobs))
        return [found[number] for number in range(len(ranges))]

    def plan_inputs(self, price: Price | None, length: int, kind: str | None, learnt: Sequence[Outcome]) -> PlanInputs:
        """What a plan rests on: what is known of the base model and what this store's writes taught.

        Args:
            price: Of ``length`` answer tokens, by which their kind is told unless it is given.
            learnt: Outcomes of the store's writes.
        """
        base, model, place = self.adapted.base, self.adapted.model, (self.placement.modules, self.placement.layers)
        weights = base.fingerprint.weights[:12]
        known = known_of(self.adapted, calibrate=self.calibrate)
        if kind is None and known is not None and price is not None:
            kind = calibration.nearest_kind(known, price.cost_bits, length)
        return calibration.plan_inputs(
            known,
            place,
            self.placement.parameters_per_rank(model),
            kind,
            learnt,
            timings.seconds_per_visit(weights, base.device.type),
            [each.size(model) for each in self.ladder()[1:]],
        )

    def ladder(self) -> list[Placement]:
        """The store's placement and those that hold more."""
        ladder = self.adapted.ladder
        return ladder[ladder.index(self.placement) :] if self.placement in ladder else [self.placement]
