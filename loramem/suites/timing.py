"""What every timed cell does alike: load and warm up before the clock starts, read the clock, count what came back."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loramem.models.base_model import BaseModel
from loramem.models.batches import group_by_length
from loramem.models.decoding import DECODE_TOKENS, answer_probabilities, decode_records, greedy_decode
from loramem.records.prompts import EncodedRecord

LOOK_RECORDS = 64  # small enough that a first look at a model that knows little is soon over


def warm_up(base: BaseModel) -> None:
    """One forward, one backward and a few decoded tokens: kernels, thread pool and lazy imports are paid for here."""
    prompt = base.template.prompt_ids(base.tokenizer, "warm up")
    embedded = base.model.get_input_embeddings()(torch.tensor([prompt], device=base.device))
    logits: Tensor = base.model(inputs_embeds=embedded.detach().requires_grad_()).logits
    logits.float().logsumexp(-1).sum().backward()
    greedy_decode(base.model, [prompt, prompt[:-1]], 4, base.template.end_id)
    clock(base.device)


def clock(device: torch.device) -> float:
    """Seconds of a monotonic clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def all_exact(base: BaseModel, records: Sequence[EncodedRecord]) -> bool:
    """Whether every record is decoded greedily, end token included; stops at the first batch with one that is not."""
    return all(_decoded(base, records))


def count_exact(base: BaseModel, records: Sequence[EncodedRecord]) -> int:
    """How many records are decoded greedily, end token included."""
    return sum(_decoded(base, records))


def lowest_probability(base: BaseModel, records: Sequence[EncodedRecord]) -> float:
    """The lowest teacher-forced probability of any answer or end token; 0 for weights that are not finite."""
    return teacher_forced(base, records)[0]


def teacher_forced(base: BaseModel, records: Sequence[EncodedRecord]) -> tuple[float, float]:
    """The lowest probability of any answer or end token, as above, and the mean loss of these tokens in nats."""
    probs = torch.cat([probs.nan_to_num(0) for _, probs in answer_probabilities(base.model, records)])
    loss = -probs.clamp(min=torch.finfo(probs.dtype).tiny).log().mean()
    return round(float(probs.min()), 4), round(float(loss), 4)


def conditions(base: BaseModel) -> dict[str, Any]:
    """What of the base model and the machine a result holds for."""
    return {
        "base_model": base.id,
        "revision": base.revision,
        "base_parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        "dtype": base.dtype,
        "threads": torch.get_num_threads(),
    }


def _decoded(base: BaseModel, records: Sequence[EncodedRecord]) -> Iterator[bool]:
    batches = group_by_length(records, range(len(records)), LOOK_RECORDS, DECODE_TOKENS)
    for index, ids in decode_records(base.model, records, batches):
        yield tuple(ids) == records[index].answer_ids[:-1]
