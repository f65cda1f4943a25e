"""Reading facts back from the weights: decoding, teacher forcing, and the proof that a write holds."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from loramem.batches import answer_logits, group_by_length, make_batch, pad_left, token_losses
from loramem.errors import RecallError
from loramem.prompts import EncodedRecord

DECODE_RECORDS, DECODE_TOKENS = 256, 32_768
# The second composition of the proof: another order, another batch size, other neighbours and padding.
SHUFFLED_RECORDS = 61
SHARED_PREFIX_TOKENS = 16  # a chat template with a system prompt; below this the extra pass costs what it saves
ALONE = 16


@dataclass(frozen=True)
class Proof:
    """That every record of an adapter was decoded exactly, and under which conditions."""

    min_probs: tuple[float, ...]
    """Per record, in the order given: the lowest teacher-forced probability of its answer tokens and end token."""
    conditions: dict[str, object]
    """dtypes, device, batch shapes and torch version the proof holds for; JSON-able."""

    @property
    def min_prob(self) -> float:
        return min(self.min_probs)


def greedy_decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, end_id: int
) -> list[list[int]]:
    """Free-running greedy decoding through every layer, one batch, KV cache; a long common prefix is run once.

    Args:
        prompts: Token ids of each prompt; padded on the left.
        max_tokens: Most new tokens, the end token included.

    Returns:
        Generated ids of each prompt up to but without the end token. A row that never ended has ``max_tokens`` ids.
    """
    return _decode(model, prompts, max_tokens, end_id, do_sample=False)


def sample_decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_id: int,
    *,
    top_p: float = 1.0,
    seed: int,
) -> list[list[int]]:
    """As `greedy_decode`, but every token is drawn at temperature 1.

    Args:
        top_p: Drawn from the likeliest tokens that together have at least this probability; 1 is all of them.
        seed: Of the draws; the same batch and seed give the same ids.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)  # generate() takes no generator
        # Zero is no limit: the library's default draws from the 50 likeliest.
        return _decode(model, prompts, max_tokens, end_id, do_sample=True, temperature=1.0, top_k=0, top_p=top_p)


@torch.inference_mode()
def _decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, end_id: int, **choice: Any
) -> list[list[int]]:
    shared = shared_prefix(model, prompts)
    rest, mask = pad_left([prompt[shared:] for prompt in prompts])
    prefix = torch.tensor([prompts[0][:shared]] * len(prompts), dtype=torch.long)
    ids = torch.cat([prefix, rest], 1)
    mask = torch.cat([torch.ones_like(prefix), mask], 1)
    config = GenerationConfig(
        num_beams=1, max_new_tokens=max_tokens, eos_token_id=end_id, pad_token_id=end_id, **choice
    )
    output = model.generate(  # type: ignore[operator]  # a mixin's method, hidden by nn.Module.__getattr__
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=_prefix_cache(model, ids[:1, :shared], len(prompts)) if shared else None,
        generation_config=config,
    )
    rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


def shared_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts of a batch begin with, if running them once is worth it and exact; otherwise 0.

    Padding then lies between prefix and key, where a sliding window would count it and a recurrence would read it: such
    models run every prompt.
    """
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns)) if len(prompts) > 1 else 0
    window = model.config.get_text_config().to_dict().get("sliding_window")
    if same < SHARED_PREFIX_TOKENS or window is not None:
        return 0
    return same if all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers) else 0


def _prefix_cache(model: PreTrainedModel, prefix: Tensor, rows: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=prefix.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(rows)
    return cache


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
        tensors = make_batch([records[index] for index in batch], model.device)
        probs = torch.exp(-token_losses(answer_logits(model, tensors), tensors)).cpu()
        for row, index in enumerate(batch):
            yield index, probs[row, -len(records[index].answer_ids) :]


def prove(model: PreTrainedModel, records: Sequence[EncodedRecord], adapter: str, dtypes: dict[str, str]) -> Proof:
    """Decode every record from the active adapter in two batch compositions, the least certain also alone.

    Args:
        adapter: Name for error messages.
        dtypes: Recorded with the proof: "base" and "adapter".

    Raises:
        RecallError: A decoded answer differs from the record; names the first.
    """
    probs = dict(answer_probabilities(model, records))
    min_probs = [float(probs[index].min()) for index in range(len(records))]
    batches = compositions(records, min_probs)
    for index, name in misrecalled(model, records, batches):
        key = records[index].record.key
        raise RecallError(
            f"Adapter {adapter} does not decode {key!r} exactly (batches {name}, lowest p {min_probs[index]:.3f}). "
            "Nothing was committed; write again with a higher rank or another seed.",
            key=key,
            adapter=adapter,
        )
    conditions: dict[str, object] = {
        "dtypes": dtypes,
        "device": model.device.type,
        "torch": torch.__version__,
        "decoded_batches": batch_sizes(batches),
    }
    return Proof(tuple(min_probs), conditions)


Compositions = dict[str, list[list[int]]]
"""Batches of indices of records, by the name of the way in which they were put together."""


def compositions(records: Sequence[EncodedRecord], min_probs: Sequence[float]) -> Compositions:
    """The batches in which records must be decoded: two ways over all of them, the least certain also alone."""
    shuffled = list(range(len(records)))
    random.Random(len(records)).shuffle(shuffled)
    least_certain = sorted(shuffled, key=lambda index: min_probs[index])[:ALONE]
    return {
        "by length": group_by_length(records, range(len(records)), DECODE_RECORDS, DECODE_TOKENS),
        "shuffled": [shuffled[start : start + SHUFFLED_RECORDS] for start in range(0, len(records), SHUFFLED_RECORDS)],
        "alone": [[index] for index in least_certain],
    }


def misrecalled(
    model: PreTrainedModel, records: Sequence[EncodedRecord], batches: Compositions
) -> Iterator[tuple[int, str]]:
    """Records that the active adapter does not decode exactly, as they are found: (index, name of the composition)."""
    for name, groups in batches.items():
        for index, ids in decode_records(model, records, groups):
            if tuple(ids) != records[index].answer_ids[:-1]:
                yield index, name


def batch_sizes(batches: Compositions) -> dict[str, list[int]]:
    """Records per batch that occur in each composition, ascending."""
    return {name: sorted({len(group) for group in groups}) for name, groups in batches.items()}
