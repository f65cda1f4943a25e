"""Weights and inputs of linear modules rounded to eight bits, as llama.cpp multiplies them on a processor.

Blocks of 32 share a scale, which is kept in float16 (``quantize_row_q8_0_ref`` in ggml's ``ggml-quants.c``). Of kinds
of weights whose blocks have 256 it rounds inputs a little more coarsely than here.

Which way an input is rounded depends on the last bits of the sums before it, so that no two programs agree after some
layers: each has its own *outcome*, and `disturbed` gives as many as are wanted. On SmolLM2-135M and a hundred phone
numbers (``tests.benchmarks.eight_bits``, November 2026), hidden states that enter the last layer are moved by 0.11 of
their distance from their mean, where bfloat16 moves them by 0.05; two outcomes are 0.09 from one another.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loramem.models.layers import linear_paths

BLOCK, LARGEST = 32, 127
DISTURBANCE = 1e-4
"""Relative; a keys' and values' cache in float16 is off by as much."""


def rounded(inputs: Tensor) -> Tensor:
    """Inputs (…, n) as they come out of eight bits; n is a multiple of 32, else they stay."""
    if inputs.shape[-1] % BLOCK:
        return inputs
    blocks = inputs.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).div_(LARGEST)  # in place: several times as fast as new tensors
    whole = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    found: Tensor = whole.mul_(scale.half().float()).flatten(-2).to(inputs.dtype)
    return found


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round the weights of every linear module, and the embedding, for good."""
    modules = [*(module for _, module in linear_paths(model)), *_embeddings(model)]
    weights = [module.get_parameter("weight") for module in modules]
    for weight in {id(weight): weight for weight in weights}.values():  # embedding and unembedding may be one
        weight.copy_(rounded(weight))


def round_inputs(model: nn.Module) -> list[RemovableHandle]:
    """From now on every linear module of the model itself, the unembedding among them, sees rounded inputs; adapters
    see them as they are."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(args[0]), *args[1:])

    return [module.register_forward_pre_hook(enter) for _, module in linear_paths(model)]


@contextmanager
def in_eight_bits(model: nn.Module, *, weights: bool = False) -> Iterator[None]:
    """Within this context every linear module of a model, or of a part of one, sees rounded inputs.

    Args:
        weights: Theirs are rounded as well.
    """
    with torch.no_grad(), ExitStack() as after:
        for _, module in linear_paths(model) if weights else ():
            weight = module.get_parameter("weight")
            after.callback(weight.copy_, weight.clone())
            weight.copy_(rounded(weight))
        for handle in round_inputs(model):
            after.callback(handle.remove)
        yield


@contextmanager
def disturbed(model: nn.Module, outcome: int) -> Iterator[None]:
    """Within this context embeddings are a little off, so that roundings come out otherwise for every outcome."""
    generator = torch.Generator().manual_seed(outcome)

    def leave(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        return output * (1 + DISTURBANCE * noise.to(output))

    with ExitStack() as hooks:
        for embedding in _embeddings(model):
            hooks.callback(embedding.register_forward_hook(leave).remove)
        yield


def _embeddings(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]
