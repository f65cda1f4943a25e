"""The three published methods (arXiv 2605.30260) on this package's engine: unit, losses and schedules as published.

What is left out changes no result: the layers below the unit are run once (`loramem.models.trunk`), only supervised
positions are unembedded, and nothing is run twice or only to be logged. `loramem.suites.paper_recipe` keeps the second
forward.

What differs: the prompt is our template's in place of the paper's system message; the end token is supervised as well,
and only that of what follows an answer; unit, losses and optimiser are float32, where the published code has bfloat16.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramem._util.choices import check_choice
from loramem.errors import ArgumentError
from loramem.models.base_model import BaseModel
from loramem.models.batches import Batch, per_position, token_losses
from loramem.models.trunk import Trunk
from loramem.records.prompts import EncodedRecord
from loramem.suites.paper_schedule import Schedule
from loramem.suites.paper_unit import PaperUnit, attached
from loramem.suites.timing import clock
from loramem.training.objectives import SlidingState, memft_ot, memft_sw, sft, stubborn, weighted_mean

PUBLISHED = ("sft", "memft-ot", "memft-sw")
MAX_GRAD_NORM = 1.0  # of A and B jointly
LOOKS = 40  # points of a learning curve, at most


@dataclass(frozen=True)
class Trained:
    """A unit as its schedule left it, and what that took."""

    unit: PaperUnit
    model: PreTrainedModel
    steps: int
    """Of the optimiser, those without a stubborn token included."""
    visits: int
    """Times a record was in a training batch, over all records."""
    seconds: float
    """The cached pass through the layers below the unit included."""
    curve: tuple[tuple[int, float], ...]
    """(step, share of all answer and end tokens with teacher-forced p > 0.5) at up to 40 moments. A token counts as the
    last training forward saw it, with dropout and before that step's update; one never seen does not count."""

    @property
    def parameters(self) -> int:
        return self.unit.parameter_count

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context the base computes with the unit, without dropout."""
        self.unit.eval()
        with attached(self.unit, self.model):
            yield


def train_published(
    base: BaseModel,
    records: Sequence[EncodedRecord],
    method: str,
    rank: int,
    schedule: Schedule,
    *,
    seed: int,
    unit: str = "branch",
    layer: int | None = None,
) -> Trained:
    """Train one unit to the end of its schedule; there is no early stop.

    Args:
        method: "sft", "memft-ot" or "memft-sw": the curriculum where the schedule has boundaries, otherwise the
            sliding window, for one long record.
        seed: Of A, of the batches and of the dropout.
        unit: "branch", as in the published code, or "down_proj", as in the paper.
        layer: K (0-based); at the paper's depth if None.

    Raises:
        ArgumentError: No such method, unit or layer; batches that do not divide the records; the sliding window, or a
            curriculum for another method, where it does not belong.
        UnsupportedBaseModel: See `PaperUnit`.
    """
    _check(method, len(records), schedule)
    started = clock(base.device)
    matrices = PaperUnit(base.model, rank, seed, unit, layer)
    trunk = Trunk(base.model, records, matrices.layer)
    optimizer, decay = make_optimizer(matrices, schedule, len(records))
    planned, total = schedule.steps(len(records)), sum(len(record.answer_ids) for record in records)
    looks = set(moments(planned))
    ordered = torch.zeros(len(records), dtype=torch.long, device=base.device)
    sliding = SlidingState.start(1, base.device) if method == "memft-sw" and not schedule.boundaries else None
    visits, curve = 0, list[tuple[int, float]]()
    matrices.train()
    with seeded(seed, base.device), attached(matrices, base.model):
        for step, batches in enumerate(schedule.batches(len(records), seed), start=1):
            optimizer.zero_grad()
            for indices in batches:
                logits, batch = forward(trunk, indices)
                losses = token_losses(logits, batch)
                correct = per_position(logits.detach().argmax(-1) == batch.targets[batch.supervised], batch)
                weights, sliding = token_weights(method, losses, batch.supervised, correct, sliding)
                add_gradient(losses, weights, schedule.accumulate)
                ordered[indices] = (batch.supervised & ~stubborn(losses, batch.supervised)).sum(1)
                visits += len(indices)
            take_step(matrices, optimizer)
            decay.step()
            if step in looks:
                curve.append((step, round(int(ordered.sum()) / total, 4)))
    return Trained(matrices, base.model, planned, visits, clock(base.device) - started, tuple(curve))


def moments(steps: int) -> list[int]:
    """A few dozen of so many steps, counted from 1 and spread evenly in their logarithm: the first and the last too."""
    return sorted({round(steps ** (place / (LOOKS - 1))) for place in range(LOOKS)})


def forward(trunk: Trunk, indices: Sequence[int]) -> tuple[Tensor, Batch]:
    """Logits (N, V) of the supervised positions of some records, from the attached unit's layer upwards."""
    batch = trunk.batch(indices)
    return trunk.logits(indices, batch), batch


def token_weights(
    method: str, losses: Tensor, supervised: Tensor, correct: Tensor, sliding: SlidingState | None
) -> tuple[Tensor, SlidingState | None]:
    """Weights (B, T) of a published method, and the state of its sliding window for the next step.

    Args:
        losses, supervised, correct: (B, T); nats, bool, bool.
        sliding: Of MemFT-SW within a long record; None elsewhere.
    """
    if method == "sft":
        return sft(losses, supervised), None
    if method == "memft-ot":
        return memft_ot(losses, supervised), None
    if sliding is None:
        return memft_ot(losses, supervised, idle="zero"), None
    return memft_sw(losses, supervised, correct, sliding)


def make_optimizer(
    unit: PaperUnit, schedule: Schedule, records: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without weight decay, and the linear decay of its rate to 0 at the end of the schedule."""
    optimizer = torch.optim.AdamW(unit.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    planned = schedule.steps(records)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / planned)


def add_gradient(losses: Tensor, weights: Tensor, accumulate: int) -> None:
    """Backward through a batch's loss; a batch without weights gives none, and leaves even AdamW's moments alone."""
    if weights.any():
        (weighted_mean(losses, weights) / accumulate).backward()


def take_step(unit: PaperUnit, optimizer: torch.optim.Optimizer) -> None:
    """Clip and step; AdamW passes over parameters without a gradient."""
    nn.utils.clip_grad_norm_(unit.parameters(), MAX_GRAD_NORM)
    optimizer.step()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within this context dropout is this seed's; afterwards torch's generators are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check(method: str, records: int, schedule: Schedule) -> None:
    check_choice("method", method, PUBLISHED)
    if method != "memft-sw" and schedule.boundaries:
        raise ArgumentError(f"A curriculum belongs to memft-sw, not to {method}.", argument="method", value=method)
    if method == "memft-sw" and not schedule.boundaries and records != 1:
        raise ArgumentError(
            f"The sliding window is for one long record, not for {records}: give a curriculum.",
            argument="records",
            value=records,
        )
