"""The optimiser over LoRA matrices, with rates that mean the same on every base model and at every rank.

Adam moves every entry of a matrix by about its rate, whatever the gradient. How much that changes a module depends on
the size of its outputs, which differs a thousandfold between base models and between modules of one model, and on the
rank, since r columns of B move together. So a rate here is relative: with rate ρ a step changes B·A·x by about ρ
times the module's own output, and A by a like share of itself.

How the rank enters is fitted to four base models, docs/lab/engine.md; the idea that A and B want rates of their
own is LoRA+'s (arXiv 2402.12354).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

A_SHARE = 2.5  # a rate of A, relative to its entries, in rates of B, relative to the outputs
MORE_RANK = 2  # rates fall as 1/(r + 2) for B and as 1/√(r + 2) for A


def make_optimizer(
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], output_scales: Sequence[float]
) -> torch.optim.Optimizer:
    """AdamW without weight decay; `set_rate` before every step.

    Args:
        pairs: A (r, in) and B (out, r) of every adapted module.
        output_scales: Root mean square of the modules' outputs under the base.
    """
    groups = []
    for (a, b), scale in zip(pairs, output_scales, strict=True):
        rank = len(a) + MORE_RANK
        groups.append({"params": [a], "relative": A_SHARE / rank**0.5 * _root_mean_square(a)})
        groups.append({"params": [b], "relative": scale / rank})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make ``rate``, relative as above, the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["relative"]


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())
