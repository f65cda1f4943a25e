"""How a model's predictions differ from another's on the same tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Passage:
    """T token ids, of which those from ``first`` on are scored; ``first`` is at least 1."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Effect:
    """What replacing one model by another does at N scored tokens; each field (N,) on CPU."""

    before: Tensor
    """Loss of the first model, nats."""
    after: Tensor
    """Loss of the second, nats."""
    divergence: Tensor
    """KL(first ‖ second) of the predictions, nats."""
    changed: Tensor
    """Bool: whether the most probable token is another one."""
    hit_before: Tensor
    """Bool: whether the first model's most probable token is the one that comes."""
    hit_after: Tensor
    """The same of the second."""


def windows(ids: Sequence[int], width: int, start: int | None) -> list[Passage]:
    """A text cut into passages of ``width`` tokens, each read on its own; what is left at the end is dropped.

    Args:
        start: Id that the tokenizer begins every text with, if it has one; counted in the width, not scored.
    """
    prefix = () if start is None else (start,)
    size = width - len(prefix)
    cuts = range(0, len(ids) - size + 1, size)
    return [Passage((*prefix, *ids[cut : cut + size]), 1) for cut in cuts]


@torch.inference_mode()
def predictions(model: PreTrainedModel, passages: Sequence[Passage]) -> Iterator[Tensor]:
    """Logits (T - first, V) that predict the scored tokens of each passage, on CPU in the model's dtype.

    One passage at a time, so that equal weights give equal bits.
    """
    for passage in passages:
        ids = torch.tensor([passage.ids[:-1]], device=model.device)
        yield model(input_ids=ids, use_cache=False).logits[0, passage.first - 1 :].cpu()


def effect(passages: Sequence[Passage], first: Sequence[Tensor], second: Sequence[Tensor]) -> Effect:
    """Compare two models' `predictions` of the same passages, in double precision."""
    parts = [
        _compare(torch.tensor(passage.ids[passage.first :]), one.double(), other.double())
        for passage, one, other in zip(passages, first, second, strict=True)
    ]
    return Effect(*(torch.cat(column) for column in zip(*parts, strict=True)))


def identical(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two models' `predictions` are the same bit for bit."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _compare(targets: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    likeliest, then = first.argmax(-1), second.argmax(-1)
    return (
        cross_entropy(first, targets, reduction="none"),
        cross_entropy(second, targets, reduction="none"),
        (one.exp() * (one - other)).sum(-1).clamp(min=0),  # rounding can leave -1e-17
        likeliest != then,
        likeliest == targets,
        then == targets,
    )
