"""What a write would be: which records are new, as token ids, and the adapters and ranks that they take.

Nothing is changed here, and nothing trained.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from loramem.errors import ConflictingRecord, PromptCollision
from loramem.index.index import Index
from loramem.index.rows import prompt_digest
from loramem.models.adapters import AdaptedModel
from loramem.models.decoding import answer_probabilities
from loramem.models.ending import Ending
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
from loramem.training.shard_training import features_of
from loramem.training.trainer import autocast_dtype

log = logging.getLogger(__name__)


class Planner:
    """Admits records to one store and plans their adapters.

    Args:
        calibrate: Whether the first plan calibrates a base model that nothing is known of; see
            `loramem.planning.base_calibration.is_wanted`.
    """

    def __init__(
        self, index: Index, manifest: Manifest, adapted: AdaptedModel, *, calibrate: bool | None = None
    ) -> None:
        self.index, self.adapted, self.calibrate = index, adapted, calibrate
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
    ) -> Plan:
        """Shards and ranks for encoded records.

        Args:
            limits: Ranks that adapters may have; those of the request unless given.
            kind: Of data; the calibrated one that costs most nearly as much if None.
            as_new: Plan as a new store would, with nothing learnt from the writes to this one.
            keep_features: See `base_probabilities`.

        Raises:
            DoesNotFit: See `plan_write`.
        """
        groups = groupby(encoded, key=lambda entry: entry.record.namespace)
        sizes = [len(list(group)) for _, group in groups]
        values = [entry.answer_ids[:-1] for entry in encoded]
        most = None if request.one_adapter else self.placement.size(self.adapted.model).shard_tokens()
        probs = [
            prob
            for first, last in cut_groups(sizes, [len(entry.answer_ids) for entry in encoded], most)
            for prob in self.base_probabilities(encoded[first:last], keep_features=keep_features)
        ]

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
            rank=request.rank,
            limits=limits or request.limits,
            one_adapter=request.one_adapter,
        )

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

    def base_probabilities(self, encoded: Sequence[EncodedRecord], *, keep_features: bool = False) -> list[list[float]]:
        """Probability of every answer token under the plain base, of records that are trained together.

        Args:
            keep_features: For this training, which follows.
        """
        adapted = self.adapted
        if (features := features_of([adapted], encoded, self.placement)) is not None:
            if keep_features:
                adapted.kept_features.keep(encoded, features[0])
            with adapted.disabled():
                losses, _ = Ending(adapted.model, features[0]).scores()
            answers = torch.exp(-losses).split([len(entry.answer_ids) for entry in encoded])
            return [each[:-1].tolist() for each in answers]
        cast = autocast_dtype(adapted.base.device)  # an estimate may be half precise
        with adapted.disabled(), torch.autocast(adapted.base.device.type, cast, enabled=cast is not None):
            probs = dict(answer_probabilities(adapted.model, encoded))
        return [probs[index][:-1].tolist() for index in range(len(encoded))]
