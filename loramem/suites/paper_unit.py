"""The paper's own low-rank unit, for comparison only: PEFT and servers cannot express it, so no store uses it.

Arithmetic of the published code (arXiv 2605.30260): one layer K, one branch parallel to its MLP, added to the block's
output: h_K = block_K(h) + Dropout(x A B) with x the input of the MLP. A ~ U(-1/√r, 1/√r), B = 0, no scaling (the
published alpha is never applied), dropout 0.1 on the branch's output in training, all positions alike. A and B are
float32 here; the published ones are bfloat16 without a float32 copy, so this favours the paper.

The paper's text has a LoRA of the MLP's down-projection instead: the same matrices around that one module, with x its
input, are the unit "down_proj".
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loramem.errors import ArgumentError, InputError, UnsupportedBaseModel
from loramem.models.layers import decoder_layers, features, linears

DROPOUT = 0.1


class PaperUnit(nn.Module):
    """Matrices A (n, r) and B (r, d) of one unit, on the model's device; n is d for the branch.

    Args:
        model: The frozen base, of hidden size d.
        rank: r.
        seed: Of A.
        kind: "branch" or "down_proj".
        layer: K (0-based); at the paper's depth if None.

    Raises:
        UnsupportedBaseModel: The layer has no module named "mlp", or that no linear module.
        InputError: No such layer.
        ArgumentError: No such kind.
    """

    def __init__(
        self, model: PreTrainedModel, rank: int, seed: int, kind: str = "branch", layer: int | None = None
    ) -> None:
        super().__init__()
        self.kind, self.layer = kind, _checked_layer(model, layer)
        width = outputs = int(model.config.get_text_config().hidden_size)
        if kind == "down_proj":
            width, outputs = features(_down_projection(model, self.layer))
        elif kind != "branch":
            raise ArgumentError(f'kind must be "branch" or "down_proj", not {kind!r}', argument="kind", value=kind)
        bound = rank**-0.5
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.empty(width, rank).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(rank, outputs))
        self.dropout = nn.Dropout(DROPOUT)
        self.to(model.device)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T, d) from the inputs (B, T, n) of the MLP or of its down-projection."""
        branch: Tensor = self.dropout(inputs.to(self.A.dtype) @ self.A @ self.B)
        return branch

    @property
    def parameter_count(self) -> int:
        return self.A.numel() + self.B.numel()


def paper_layer(layers: int) -> int:
    """K (0-based) at the paper's depth, 24 of 36 on Qwen3-8B: two thirds of the layers."""
    return round(layers * 24 / 36)


@contextmanager
def attached(unit: PaperUnit, model: PreTrainedModel) -> Iterator[None]:
    """Within this context the unit's output is added where it belongs; outside the model is the plain base."""
    add = _add_branch if unit.kind == "branch" else _add_to_down_projection
    with ExitStack() as stack:
        for handle in add(unit, model):
            stack.callback(handle.remove)
        yield


def _add_branch(unit: PaperUnit, model: PreTrainedModel) -> list[RemovableHandle]:
    layer = decoder_layers(model)[unit.layer]
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[:] = [args[0]]

    def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        changed = hidden + unit(inputs.pop()).to(hidden.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return [_mlp(model, unit.layer).register_forward_pre_hook(keep), layer.register_forward_hook(add)]


def _add_to_down_projection(unit: PaperUnit, model: PreTrainedModel) -> list[RemovableHandle]:
    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        change: Tensor = unit(args[0])
        return output + change.to(output.dtype)

    return [_down_projection(model, unit.layer).register_forward_hook(add)]


def _checked_layer(model: PreTrainedModel, layer: int | None) -> int:
    layers = len(decoder_layers(model))
    chosen = paper_layer(layers) if layer is None else layer
    if not 0 <= chosen < layers:
        raise InputError(f"The layers are 0 to {layers - 1}, not {chosen}.")
    _mlp(model, chosen)
    return chosen


def _mlp(model: PreTrainedModel, layer: int) -> nn.Module:
    mlp = dict(decoder_layers(model)[layer].named_children()).get("mlp")
    if mlp is None:
        raise UnsupportedBaseModel(
            f"{type(model).__name__} has no module named mlp in its decoder layers, which the paper's unit runs beside."
        )
    return mlp


def _down_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The last linear module of the MLP, whatever the architecture calls it."""
    modules = [module for _, module in linears(_mlp(model, layer))]
    if not modules:
        raise UnsupportedBaseModel(f"The MLP of {type(model).__name__} has no linear module to put a LoRA around.")
    return modules[-1]
