"""Adam over LoRA matrices in coordinates in which the inputs of a module are uncorrelated.

At the depth of the last layer nine tenths of a module's input at an answer position are a mean that all records share;
the directions in which records differ are faint. Adam moves every entry of A by the same amount, so it spends its
steps on the mean. With L·Lᵀ = E[x xᵀ] + λI and A = Ã·L⁻¹ every direction of the inputs weighs alike, and it is Ã that
Adam moves.

Rates are relative: with rate ρ a step changes Ã by ρ of its entries, and B so that B·A·x changes by about ρ of the
scale of what it is added to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import cholesky, solve_triangular

DAMPING, STRONG_DAMPING = 1e-3, 0.1
"""λ as a share of an input's mean second moment, most of which is the mean that all records share: directions in which
two records differ have a thousandth of it. With a tenth, training of more positions than inputs hardly moves in these;
fewer positions are told apart without them, in fewer steps (docs/lab/engine.md)."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Site:
    """One adapted module."""

    a: nn.Parameter
    """(r, in)."""
    b: nn.Parameter
    """(out, r)."""
    factor: Tensor
    """L, (in, in), lower triangular, from `whitening_factor`."""
    scale: float
    """Root mean square of what the product B·A·x is added to."""
    step_a: float = 1.0
    """How far a step moves Ã, as a share of how far it would: where A is only a part of what the module computes."""
    moves_a: bool = True
    moves_b: bool = True
    """Whether training changes that matrix."""


def whitening_factor(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """L of the second moments (in, in) of a module's inputs."""
    damped = moments.clone()
    damped.diagonal().add_(damping * moments.diagonal().mean() + torch.finfo(moments.dtype).tiny)
    factor: Tensor = cholesky(damped)
    return factor


def random_rows(rows: int, factor: Tensor, seed: int) -> Tensor:
    """Rows (rows, in) of A whose Ã is random with entries of variance 1 / in."""
    inputs = len(factor)
    white = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) / math.sqrt(inputs)
    return _raw(white.to(factor), factor)


def _raw(white: Tensor, factor: Tensor) -> Tensor:
    """A of Ã."""
    raw: Tensor = solve_triangular(factor.T, white.T, upper=True).T
    return raw


class WhitenedAdam:
    """Adam on Ã and B of every site; after a step the modules hold A = Ã·L⁻¹ and B, rounded to a dtype.

    A cast to that dtype does not change them: what is served is what was trained. A cast after training would not do:
    rows of A cancel the mean of the inputs by large entries, whose rounding weighs more than its size says. Gradients
    are those at the rounded values.
    """

    def __init__(self, sites: Sequence[Site], rate: float, rounded_to: torch.dtype = torch.float32) -> None:
        self.sites, self.rate, self.rounded_to = sites, rate, rounded_to
        self.white = [nn.Parameter(site.a.detach() @ site.factor) for site in sites]
        self.b = [nn.Parameter(site.b.detach().clone()) for site in sites]
        groups = []
        for white, b, site in zip(self.white, self.b, sites, strict=True):
            rank, inputs = white.shape
            if site.moves_a:
                groups.append({"params": [white], "relative": site.step_a / math.sqrt(inputs)})
            if site.moves_b:
                groups.append({"params": [b], "relative": site.scale / math.sqrt(rank)})
        self._adam = torch.optim.Adam(groups, lr=rate, betas=BETAS)
        for site in sites:
            self._set(site, site.a, site.b)

    @torch.no_grad()
    def step(self, factor: float, gradient_scale: float = 1.0) -> bool:
        """One step at ``factor`` times the rate; False, and nothing moved, if a gradient is not finite.

        Args:
            gradient_scale: What the gradients of A and B are multiplied by: they may be of a sum of losses.
        """
        for group in self._adam.param_groups:
            group["lr"] = self.rate * factor * group["relative"]
        finite = torch.ones((), dtype=torch.bool, device=self.white[0].device)
        for white, b, site in zip(self.white, self.b, self.sites, strict=True):
            assert site.a.grad is not None and site.b.grad is not None
            if site.moves_a:
                white.grad = solve_triangular(site.factor, site.a.grad.T * gradient_scale, upper=False).T
                finite &= torch.isfinite(white.grad).all()
            if site.moves_b:
                b.grad = site.b.grad * gradient_scale
                finite &= torch.isfinite(b.grad).all()
        if moved := bool(finite):
            self._adam.step()
            for white, b, site in zip(self.white, self.b, self.sites, strict=True):
                self._set(site, _raw(white, site.factor) if site.moves_a else site.a, b)
        for site in self.sites:
            site.a.grad = site.b.grad = None
        return moved

    @torch.no_grad()
    def _set(self, site: Site, a: Tensor, b: Tensor) -> None:
        site.a.copy_(a.to(self.rounded_to))
        site.b.copy_(b.to(self.rounded_to))
