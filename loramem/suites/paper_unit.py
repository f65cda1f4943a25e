"""The paper's own low-rank branch, for comparison only: PEFT and servers cannot express it, so no store uses it.

Arithmetic of the published code (arXiv 2605.30260): one layer K, one branch parallel to its MLP, added to the block's
output: h_K = block_K(h) + Dropout(x A B) with x the input of the MLP. A ~ U(-1/√r, 1/√r), B = 0, no scaling (the
published alpha is never applied), dropout 0.1 on the branch's output in training, all positions alike. A and B are
float32 here; the published ones are bfloat16 without a float32 copy, so this favours the paper.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramem.errors import UnsupportedBaseModel
from loramem.layers import decoder_layers

DROPOUT = 0.1


class PaperUnit(nn.Module):
    """Matrices A (d, r) and B (r, d) of one branch, on the model's device.

    Args:
        model: The frozen base, of hidden size d.
        rank: r.
        seed: Of A.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int) -> None:
        super().__init__()
        width = int(model.config.get_text_config().hidden_size)
        bound = rank**-0.5
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.empty(width, rank).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(rank, width))
        self.dropout = nn.Dropout(DROPOUT)
        self.to(model.device)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T, d) from the MLP's inputs (B, T, d)."""
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
    """Within this context the branch is added to the output of layer K; outside the model is the plain base.

    Raises:
        UnsupportedBaseModel: The layer has no module named "mlp".
    """
    layers = decoder_layers(model)
    layer = layers[paper_layer(len(layers))]
    mlp = dict(layer.named_children()).get("mlp")
    if mlp is None:
        raise UnsupportedBaseModel(
            f"{type(model).__name__} has no module named mlp in its decoder layers, which the paper's unit runs beside."
        )
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[:] = [args[0]]

    def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        changed = hidden + unit(inputs.pop()).to(hidden.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    handles = [mlp.register_forward_pre_hook(keep), layer.register_forward_hook(add)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
