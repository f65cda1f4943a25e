"""What came back: records decoded greedily and free-running, and what teacher forcing says of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramem.models.base_model import BaseModel
from loramem.models.batches import group_by_length
from loramem.models.decoding import DECODE_RECORDS, DECODE_TOKENS, answer_probabilities, decode_records
from loramem.records.prompts import EncodedRecord


@dataclass(frozen=True)
class Score:
    """How much of some records the model, as it is, gives back."""

    exact: int
    """Records decoded exactly: greedily, free-running, the end token included."""
    token_accuracy: float
    """Share of the answer tokens that are right at their place in the same decoding; end tokens not counted."""
    ordered: float
    """Share of the answer and end tokens with p > 0.5 under teacher forcing."""
    min_prob: float
    """Lowest such p; 0 for weights that are not finite."""
    loss: float | None
    """Mean cross-entropy of the answer tokens in nats under teacher forcing; None if it is not finite."""


def score(base: BaseModel, records: Sequence[EncodedRecord]) -> Score:
    """Decode every record, and look at every probability, through all layers."""
    exact = right = 0
    batches = group_by_length(records, range(len(records)), DECODE_RECORDS, DECODE_TOKENS)
    for index, ids in decode_records(base.model, records, batches):
        answer = records[index].answer_ids[:-1]
        exact += tuple(ids) == answer
        right += sum(got == wanted for got, wanted in zip(ids, answer, strict=False))
    found = [probs.nan_to_num(0.0) for _, probs in answer_probabilities(base.model, records)]
    every = torch.cat(found)
    loss = _mean_loss(found)
    return Score(
        exact=exact,
        token_accuracy=round(right / sum(record.length for record in records), 4),
        ordered=round(float((every > 0.5).float().mean()), 4),
        min_prob=round(float(every.min()), 4),
        loss=loss,
    )


def mean_loss(base: BaseModel, records: Sequence[EncodedRecord]) -> float | None:
    """Mean cross-entropy of the answer tokens in nats under teacher forcing; None if it is not finite."""
    return _mean_loss([probs for _, probs in answer_probabilities(base.model, records)])


def _mean_loss(found: Sequence[torch.Tensor]) -> float | None:
    loss = -torch.cat([probs[:-1] for probs in found]).log().mean()
    return round(float(loss), 5) if torch.isfinite(loss) else None
