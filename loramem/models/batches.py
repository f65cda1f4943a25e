"""Encoded records as padded tensors, answers flush right.

All answers of a batch end in its last column, so that one slice of the logits holds every supervised position, and
teacher forcing sees the same left-padded layout as batched generation.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from loramem.models.prefix import cache_argument
from loramem.records.prompts import EncodedRecord

Batches = list[list[int]]
"""Indices of records."""


@dataclass(frozen=True)
class Batch:
    """B records, T columns of which the last K supervise.

    Attributes:
        input_ids: (B, T), left-padded.
        attention_mask: (B, T), or None when nothing is padded.
        position_ids: (B, T), counting from each record's first real token.
        targets: (B, K) answer and end token ids.
        supervised: (B, K) bool; False left of shorter answers.
        cache: Keys and values of S tokens that stand before ``input_ids`` in every row; the mask covers them as well,
            (B, S + T). A pass adds to it, so that it serves one.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    targets: Tensor
    supervised: Tensor
    cache: DynamicCache | None = None

    def after(self, tokens: int, cache: DynamicCache) -> "Batch":
        """The same rows behind ``tokens`` more, which all have in common and whose keys and values are known."""
        before = torch.ones(len(self.input_ids), tokens, dtype=torch.long, device=self.input_ids.device)
        mask = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        return replace(
            self, attention_mask=torch.cat([before, mask], 1), position_ids=self.position_ids + tokens, cache=cache
        )


def make_batch(records: Sequence[EncodedRecord], device: torch.device | str) -> Batch:
    """Pad records into one batch for teacher forcing."""
    rows = [[*record.prompt_ids, *record.answer_ids] for record in records]
    input_ids, mask = pad_left(rows)
    targets, supervised = pad_left([record.answer_ids for record in records])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(
        input_ids.to(device),
        None if bool(mask.all()) else mask.to(device),
        positions.to(device),
        targets.to(device),
        supervised.bool().to(device),
    )


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, T) padded on the left with 0, and the mask (B, T) of real tokens as int64."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits (N, V) in float32 of the N supervised positions, record by record; only these are unembedded."""
    before_target = batch.supervised.nonzero(as_tuple=True)

    def supervised_only(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][before_target],)

    head = model.get_output_embeddings().register_forward_pre_hook(supervised_only)
    try:
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            # Without padding the positions are the default ones, and fused attention needs no mask.
            position_ids=None if batch.attention_mask is None else batch.position_ids,
            logits_to_keep=batch.targets.shape[1] + 1,
            use_cache=batch.cache is not None,
            **cache_argument(batch.cache),
        )
    finally:
        head.remove()
    logits: Tensor = output.logits.float()
    return logits


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy (B, K) in nats per token of logits (N, V); 0 where nothing is supervised."""
    losses = cross_entropy(logits, batch.targets[batch.supervised], reduction="none")
    return per_position(losses, batch)


def per_position(values: Tensor, batch: Batch) -> Tensor:
    """Values (N,) of the supervised positions at their places in (B, K); 0 elsewhere."""
    return values.new_zeros(batch.targets.shape).masked_scatter(batch.supervised, values)


def group_by_length(
    records: Sequence[EncodedRecord], order: Sequence[int], batch_records: int, batch_tokens: int
) -> Batches:
    """Indices of ``records`` in batches of similar length.

    Args:
        order: Indices to use; ties in length keep this order.
        batch_records: Most records in a batch.
        batch_tokens: Most columns times rows in a batch (one record may exceed it alone).
    """
    batches: list[list[int]] = []
    for index in sorted(order, key=lambda index: records[index].total_tokens):
        width = records[index].total_tokens
        if batches and len(batches[-1]) < batch_records and width * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def shuffled(records: Sequence[EncodedRecord], batch_records: int, batch_tokens: int) -> Batches:
    """Indices of all records in batches of any lengths, in an order that looks random and follows from their number.

    Args:
        batch_records, batch_tokens: See `group_by_length`.
    """
    order = list(range(len(records)))
    random.Random(len(records)).shuffle(order)
    batches, width = list[list[int]](), 0
    for index in order:
        wider = max(width, records[index].total_tokens)
        if batches and len(batches[-1]) < batch_records and wider * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
            width = wider
        else:
            batches.append([index])
            width = records[index].total_tokens
    return batches
