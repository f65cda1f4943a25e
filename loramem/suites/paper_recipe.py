"""The paper's MemFT-SW for PhoneBook, end to end: its unit, its loss, its fixed schedule, its step.

For comparison only. Taken from the published code (arXiv 2605.30260) and timed without what that spends on measuring
itself (A·B multiplied out, MLPs run twice, every loss computed twice); its second forward of every step is kept.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loramem.base_model import BaseModel
from loramem.objectives import exposed_records, exposure, memft_ot, weighted_mean
from loramem.prompts import EncodedRecord
from loramem.suites.paper_unit import PaperUnit, attached
from loramem.suites.timing import clock, count_exact, lowest_probability

IGNORED = -100  # the label of positions that carry no loss


@dataclass(frozen=True)
class Schedule:
    """One row of the published settings of MemFT-SW on PhoneBook (one step per batch)."""

    learning_rate: float
    epochs: int
    batch_records: int
    boundaries: tuple[int, ...]
    """Epochs at which the exposed share of the records grows; the last is the end."""

    @classmethod
    def published(cls, records: int) -> "Schedule":
        """The row for as many records, or for the next fewer (the first for less than 100).

        The published batch of 10 must divide the records; where it does not, the largest smaller batch that does.
        """
        row = _QWEN_ROWS[max((size for size in _QWEN_ROWS if size <= records), default=100)]
        batch = max(size for size in range(1, row.batch_records + 1) if records % size == 0)
        return cls(row.learning_rate, row.epochs, batch, row.boundaries)

    def exposed(self, records: int) -> list[int]:
        """Records trained on in each epoch."""
        return [
            exposed_records(records, exposure(epoch, self.boundaries), self.batch_records)
            for epoch in range(self.epochs)
        ]

    def steps(self, records: int) -> int:
        """Optimiser steps of the whole run."""
        return sum(exposed // self.batch_records for exposed in self.exposed(records))


_QWEN_ROWS = {
    100: Schedule(1e-2, 300, 10, (20, 40, 60, 80, 300)),
    200: Schedule(1e-2, 300, 10, (20, 40, 60, 80, 300)),
    400: Schedule(1e-2, 350, 10, (30, 60, 90, 120, 350)),
}
PAPER_RANK = 64  # of the ranks that the paper tries the one at which it reports 100 %


def paper_recipe(
    base: BaseModel,
    records: Sequence[EncodedRecord],
    *,
    seed: int,
    cap_s: float,
    rank: int = PAPER_RANK,
    schedule: Schedule | None = None,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Train one unit by the published schedule and decode at its end; there is no early stop.

    A step runs the whole model with the branch and, as the published loop does, once more without it; both give
    logits of every position. The prompt is our template's in place of the paper's system message.

    Args:
        cap_s: Seconds after which it is stopped and scored as it is.
        schedule: The published one for as many records unless given.
        bfloat16: Autocast of the matrix products; A, B and the losses are float32.

    Returns:
        JSON-able: seconds, steps, planned_steps, exact, records, parameters, min_prob, capped, and the settings.
    """
    schedule = schedule or Schedule.published(len(records))
    unit = PaperUnit(base.model, rank, seed)
    optimizer = torch.optim.AdamW(unit.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    planned = schedule.steps(len(records))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / planned)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = 0
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)  # of the dropout
        started = clock(base.device)
        for indices in _batches(order, schedule):
            if time.monotonic() - started >= cap_s:
                break
            _paper_step(base, unit, [records[index] for index in indices], optimizer, bfloat16)
            decay.step()
            steps += 1
        seconds = clock(base.device) - started
    unit.eval()
    with attached(unit, base.model):
        exact, min_prob = count_exact(base, records), lowest_probability(base, records)
    return {
        "seconds": round(seconds, 3),
        "steps": steps,
        "planned_steps": planned,
        "exact": exact,
        "records": len(records),
        "parameters": unit.parameter_count,
        "min_prob": min_prob,
        "capped": steps < planned,
        "cap_s": round(cap_s, 3),
        "learning_rate": schedule.learning_rate,
        "epochs": schedule.epochs,
        "batch": schedule.batch_records,
        "bfloat16": bfloat16,
        "rank": rank,
    }


def _batches(order: Sequence[int], schedule: Schedule) -> Iterator[Sequence[int]]:
    """One permutation for the whole run: composition and order of the batches never change."""
    for exposed in schedule.exposed(len(order)):
        for start in range(0, exposed, schedule.batch_records):
            yield order[start : start + schedule.batch_records]


def _paper_step(
    base: BaseModel,
    unit: PaperUnit,
    records: Sequence[EncodedRecord],
    optimizer: torch.optim.Optimizer,
    bfloat16: bool,
) -> None:
    input_ids, mask, labels = (tensor.to(base.device) for tensor in _padded_right(records))
    unit.train()
    cast = torch.autocast(base.device.type, torch.bfloat16) if bfloat16 else nullcontext()
    with cast:
        with attached(unit, base.model):
            logits: Tensor = base.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():  # the published loop logs the base's loss at every step
            base.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    losses = cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], ignore_index=IGNORED, reduction="none")
    weights = memft_ot(losses, labels[:, 1:] != IGNORED, idle="zero")
    optimizer.zero_grad()
    if weights.any():  # without a gradient AdamW leaves parameters and moments alone
        weighted_mean(losses, weights).backward()
        nn.utils.clip_grad_norm_(unit.parameters(), 1.0)
        optimizer.step()


def _padded_right(records: Sequence[EncodedRecord]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, each (B, T); answer and end token are supervised."""
    shape = len(records), max(record.total_tokens for record in records)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, record in enumerate(records):
        ids[row, : record.total_tokens] = torch.tensor([*record.prompt_ids, *record.answer_ids])
        mask[row, : record.total_tokens] = 1
        labels[row, len(record.prompt_ids) : record.total_tokens] = torch.tensor(record.answer_ids)
    return ids, mask, labels
