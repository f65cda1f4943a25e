"""What a model makes of one answer, token by token: teacher-forced, and decoded greedily without help.

Positions count from 0 at the first answer token. The end token is no answer token: it is reported apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramem.models.base_model import BaseModel
from loramem.models.batches import answer_logits, make_batch, token_losses
from loramem.models.decoding import decode_records
from loramem.records.prompts import EncodedRecord

LEARNED = 0.5  # the paper's threshold: a token of at most this probability is stubborn


@dataclass(frozen=True)
class Forced:
    """Answer tokens and end token given the true ones before them."""

    losses: Tensor
    """(ℓ + 1,) in nats."""
    correct: Tensor
    """(ℓ + 1,) bool: the most likely token is the right one."""

    @property
    def answer_loss(self) -> float:
        """Nats per answer token."""
        return float(self.losses[:-1].double().mean())


@torch.inference_mode()
def teacher_forced(base: BaseModel, record: EncodedRecord) -> Forced:
    """One forward pass over the record, with whatever is attached to the base."""
    batch = make_batch([record], base.device)
    logits = answer_logits(base.model, batch)
    return Forced(token_losses(logits, batch)[0].cpu(), (logits.argmax(-1) == batch.targets[0]).cpu())


def free_running(base: BaseModel, record: EncodedRecord) -> list[int]:
    """Ids decoded greedily, up to but without the end token; two more than the answer has where it does not come."""
    ((_, ids),) = decode_records(base.model, [record], [[0]])
    return ids


def scores(record: EncodedRecord, decoded: Sequence[int], forced: Forced) -> dict[str, Any]:
    """How much of an answer is there.

    Args:
        decoded: From `free_running`; what is missing of it is wrong.
        forced: From `teacher_forced`.

    Returns:
        JSON-able: free-running ``token_accuracy``, ``exact`` (all answer tokens), ``ended`` (the end token came right
        after them) and ``first_failure``; teacher-forced ``forced_accuracy``, ``earliest_stubborn`` (the first position
        with p <= 0.5), ``min_prob``, ``end_prob`` and ``final_loss`` (nats per answer token). Positions are None where
        there is none.
    """
    answer = record.answer_ids[:-1]
    right = [place < len(decoded) and decoded[place] == token for place, token in enumerate(answer)]
    probs = torch.exp(-forced.losses.double())
    learned = (probs[:-1] > LEARNED).tolist()
    return {
        "token_accuracy": sum(right) / len(answer),
        "exact": all(right),
        "ended": len(decoded) == len(answer),
        "first_failure": _first_false(right),
        "forced_accuracy": float(forced.correct[:-1].double().mean()),
        "earliest_stubborn": _first_false(learned),
        "min_prob": finite(float(probs[:-1].min())),
        "end_prob": finite(float(probs[-1])),
        "final_loss": finite(forced.answer_loss),
    }


def _first_false(values: Sequence[bool]) -> int | None:
    return next((place for place, value in enumerate(values) if not value), None)


def finite(number: float) -> float | None:
    """To six significant digits; None, which JSON has, for what training that diverged leaves."""
    return float(f"{number:.6g}") if math.isfinite(number) else None
