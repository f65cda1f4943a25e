"""Reading facts back from the weights: greedy decoding and teacher forcing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from loramem.models.batches import Batch, answer_logits, group_by_length, make_batch, pad_left, token_losses
from loramem.models.prefix import Prefix, cache_argument, common_prefix
from loramem.records.prompts import EncodedRecord

DECODE_RECORDS, DECODE_TOKENS = 256, 32_768


@torch.inference_mode()
def greedy_decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_id: int,
    forced: Sequence[Sequence[int]] | None = None,
    kept: Prefix | None = None,
) -> list[list[int]]:
    """Free-running greedy decoding through every layer, one batch, KV cache; a long common prefix is run once.

    Args:
        prompts: Token ids of each prompt; padded on the left.
        max_tokens: Most new tokens, the end token included.
        forced: Ids that each prompt gets instead of its likeliest, for what the model computes on the way.
        kept: What prompts may begin with, run before; taken where they do, and have no more in common.

    Returns:
        Generated ids of each prompt up to but without the end token. A row that never ended has ``max_tokens`` ids.
    """
    common = common_prefix(model, prompts, kept)
    shared = 0 if common is None else len(common.ids)
    rest, mask = pad_left([prompt[shared:] for prompt in prompts])
    prefix = torch.tensor([prompts[0][:shared]] * len(prompts), dtype=torch.long)
    ids = torch.cat([prefix, rest], 1)
    mask = torch.cat([torch.ones_like(prefix), mask], 1)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_tokens, eos_token_id=end_id, pad_token_id=end_id
    )
    with _contiguous_before_the_head(model):
        output = model.generate(  # type: ignore[operator]  # a mixin's method, hidden by nn.Module.__getattr__
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=None if forced is None else LogitsProcessorList([_Forced(forced, ids.shape[1])]),
            **cache_argument(None if common is None else common.rows(len(prompts))),
        )
    rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


class _Forced(LogitsProcessor):
    """The given ids are the likeliest; after its last a row repeats that."""

    def __init__(self, rows: Sequence[Sequence[int]], prompt_tokens: int) -> None:
        self.rows, self.prompt_tokens = rows, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.prompt_tokens
        ids = torch.tensor([row[min(place, len(row) - 1)] for row in self.rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, ids[:, None], 0.0)


@contextmanager
def _contiguous_before_the_head(model: PreTrainedModel) -> Iterator[None]:
    """Of the pass over the prompts `generate` unembeds the last column, a view; torch multiplies a view of three
    dimensions by a copy of the whole unembedding for every row, which took most of that pass."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


def forced_batch(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> Batch:
    """The records as a batch for one teacher-forced pass, with a long common prefix run already."""
    prompts = [record.prompt_ids for record in records]
    common = common_prefix(model, prompts)
    if common is None:
        return make_batch(records, model.device)
    shared = len(common.ids)
    rest = [replace(record, prompt_ids=record.prompt_ids[shared:]) for record in records]
    return make_batch(rest, model.device).after(shared, common.rows(len(records)))


def decode_records(
    model: PreTrainedModel, records: Sequence[EncodedRecord], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[int, list[int]]]:
    """Greedily decode records in the given batches of indices; yields (index, ids without the end token).

    A batch is decoded one token beyond its longest answer, so that a missing end token shows.
    """
    for batch in batches:
        longest = max(len(records[index].answer_ids) for index in batch)
        rows = greedy_decode(
            model, [records[index].prompt_ids for index in batch], longest + 1, records[batch[0]].answer_ids[-1]
        )
        yield from zip(batch, rows, strict=True)


@torch.inference_mode()
def answer_probabilities(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> Iterator[tuple[int, Tensor]]:
    """Teacher-forced probability of every answer token and the end token; yields (index, probabilities (ℓ + 1,))."""
    for batch in group_by_length(records, range(len(records)), DECODE_RECORDS, DECODE_TOKENS):
        tensors = forced_batch(model, [records[index] for index in batch])
        probs = torch.exp(-token_losses(answer_logits(model, tensors), tensors)).cpu()
        for row, index in enumerate(batch):
            yield index, probs[row, -len(records[index].answer_ids) :]
