"""The paper's MemFT-SW for PhoneBook, end to end: its unit, its loss, its fixed schedule, its step.

For comparison only. Taken from the published code (arXiv 2605.30260) and timed without what that spends on measuring
itself (A·B multiplied out, MLPs run twice, every loss computed twice); its second forward of every step is kept.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loramem.models.base_model import BaseModel
from loramem.records.prompts import EncodedRecord
from loramem.suites.paper_schedule import Schedule
from loramem.suites.paper_unit import PaperUnit, attached
from loramem.suites.published import add_gradient, make_optimizer, seeded, take_step
from loramem.suites.timing import clock, count_exact, lowest_probability
from loramem.training.objectives import memft_ot

IGNORED = -100  # the label of positions that carry no loss


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
    optimizer, decay = make_optimizer(unit, schedule, len(records))
    planned, steps = schedule.steps(len(records)), 0
    with seeded(seed, base.device):  # the dropout
        started = clock(base.device)
        for batches in schedule.batches(len(records), seed):
            if time.monotonic() - started >= cap_s:
                break
            chosen = [[records[index] for index in batch] for batch in batches]
            _paper_step(base, unit, chosen, optimizer, bfloat16, schedule.accumulate)
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


def _paper_step(
    base: BaseModel,
    unit: PaperUnit,
    batches: Sequence[Sequence[EncodedRecord]],
    optimizer: torch.optim.Optimizer,
    bfloat16: bool,
    accumulate: int = 1,
) -> None:
    unit.train()
    optimizer.zero_grad()
    for records in batches:
        input_ids, mask, labels = (tensor.to(base.device) for tensor in _padded_right(records))
        cast = torch.autocast(base.device.type, torch.bfloat16) if bfloat16 else nullcontext()
        with cast:
            with attached(unit, base.model):
                logits: Tensor = base.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
            with torch.no_grad():  # the published loop logs the base's loss at every step
                base.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        losses = cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], ignore_index=IGNORED, reduction="none")
        add_gradient(losses, memft_ot(losses, labels[:, 1:] != IGNORED, idle="zero"), accumulate)
    take_step(unit, optimizer)


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
