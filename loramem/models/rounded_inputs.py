"""Inputs of linear modules rounded to eight bits, as llama.cpp multiplies them with quantised weights on a processor.

Blocks of 32 inputs share a scale, which is kept in float16 (``quantize_row_q8_0_ref`` in ggml's ``ggml-quants.c``). Of
kinds of weights whose blocks have 256 it rounds a little more coarsely than here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loramem.models.layers import linear_paths

BLOCK, LARGEST = 32, 127


def rounded(inputs: Tensor) -> Tensor:
    """Inputs (…, n) as they come out of eight bits; n is a multiple of 32, else they stay."""
    if inputs.shape[-1] % BLOCK:
        return inputs
    blocks = inputs.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / LARGEST
    whole = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    found: Tensor = (whole * scale.half().float()).flatten(-2).to(inputs.dtype)
    return found


@contextmanager
def rounded_inputs(model: nn.Module) -> Iterator[None]:
    """Within this context every linear module of the model itself, the unembedding among them, sees rounded inputs."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(args[0]), *args[1:])

    with ExitStack() as hooks:
        for _, module in linear_paths(model):
            hooks.callback(module.register_forward_pre_hook(enter).remove)
        yield
