"""Samples of data as features behind the last attention, and the runs of the law that are made of them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from loramem.models.adapters import AdaptedModel
from loramem.models.ending import Ending
from loramem.models.features import Features
from loramem.models.placement import Placement
from loramem.planning.cost import costs_bits
from loramem.planning.feature_runs import RATE, STEPS, converged_losses
from loramem.planning.runs import Run
from loramem.planning.variety import effective_vocabulary
from loramem.records.prompts import EncodedRecord
from loramem.training.settings import WriterSettings

CONDITIONS: dict[str, Any] = {"feature_rate": RATE, "feature_steps": STEPS}
"""How runs over features are trained, beside what they were made on."""


@dataclass(frozen=True)
class FeatureSample:
    """Records of one kind with their features."""

    kind: str
    values: tuple[tuple[int, ...], ...]
    """Answer tokens of each record, its end token last."""
    features: Features
    base_losses: Tensor
    """(N,) nats."""

    @classmethod
    def of(
        cls, adapted: AdaptedModel, kind: str, records: Sequence[EncodedRecord], features: Features
    ) -> "FeatureSample":
        """
        Args:
            features: Of these records, in the model's dtype.
        """
        with adapted.disabled():
            losses, _ = Ending(adapted.model, features).scores()
        return cls(kind, tuple(tuple(record.answer_ids) for record in records), features, losses)

    @property
    def length(self) -> int:
        """Answer tokens, end tokens not among them."""
        return sum(len(value) - 1 for value in self.values)

    @property
    def is_answer(self) -> Tensor:
        """(N,) whether a position is not that of an end token."""
        ends = torch.tensor(list(accumulate(map(len, self.values)))) - 1
        answers = torch.ones(len(self.features), dtype=torch.bool)
        answers[ends] = False
        return answers.to(self.base_losses.device)

    def prefix(self, length: int) -> "FeatureSample":
        """The first records with as many answer tokens; of a single long one its beginning, then the end token."""
        if len(self.values) > 1:
            ends = list(accumulate(len(value) - 1 for value in self.values))
            count = next(count for count, end in enumerate(ends, start=1) if end >= length)
            positions = sum(map(len, self.values[:count]))
            return replace(
                self,
                values=self.values[:count],
                features=self.features.first(positions),
                base_losses=self.base_losses[:positions],
            )
        (value,) = self.values
        cut = self.features.first(length + 1)
        targets = cut.targets.clone()
        targets[-1] = value[-1]
        return replace(
            self,
            values=((*value[:length], value[-1]),),
            features=replace(cut, targets=targets),
            base_losses=self.base_losses[: length + 1],
        )

    def run(
        self, adapted: AdaptedModel, rank: int, placement: Placement, conditions: dict[str, Any], seed: int = 0
    ) -> Run:
        """Train an adapter of this rank to convergence and drop it.

        Args:
            seed: Of the data, which the run is noted with.

        Raises:
            TrainingDiverged: See `converged_losses`.
        """
        started = time.monotonic()
        losses = converged_losses(adapted, self.features, rank, placement)
        elapsed_s = time.monotonic() - started
        answers = self.is_answer
        before, after = self.base_losses[answers], losses[answers]
        probs = torch.exp(-before).split([len(value) - 1 for value in self.values])
        cost = sum(costs_bits([value[:-1] for value in self.values], [each.tolist() for each in probs]))
        return Run(
            kind=self.kind,
            rank=rank,
            length=self.length,
            seed=seed,
            modules=placement.modules,
            layers=placement.layers,
            records=len(self.values),
            parameters=rank * placement.parameters_per_rank(adapted.model),
            bits=round(float((before / math.log(2) - 1).clamp(min=0).sum()), 1),
            cost_bits=round(cost, 1),
            base_loss=float(before.mean()),
            final_loss=float(after.mean()),
            ordered=round(float((after < math.log(2)).float().mean()), 4),
            certified=float(losses.max()) <= -math.log(WriterSettings.certify_threshold),
            steps=STEPS,
            visits=STEPS * len(self.values),
            training_s=round(elapsed_s, 2),
            elapsed_s=round(elapsed_s, 2),
            conditions=conditions,
            vocabulary=effective_vocabulary(token for value in self.values for token in value),
        )
