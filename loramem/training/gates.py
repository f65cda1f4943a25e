"""Hyperplanes that have neutral positions on one side and records on the other, in closed form.

A neuron whose gate has the row w gives as good as nothing where w·x is well below zero, so a gate is a hyperplane
between what enters the last MLP at the positions where a record is asked for, and what enters it everywhere else. Of
all rows with w·x = a at some positions the one whose w·x lies nearest to −b at the others, in the mean of squares, is
w = M⁻¹(Xᵀλ − b·m) with M and m the second moments and the mean of the others (Fisher's discriminant, and without a
bias, which most gates lack: the inputs of a last MLP have a mean large enough to stand for it).

How well this parts them was measured on SmolLM2-135M with a hundred phone numbers (docs/keeping.md): one hyperplane
has all positions within answers on one side and 99.9 % of every kind of neutral position on the other; where an answer
begins, keys are told from others of their form by a hyperplane each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-2
"""Of second moments, as a share of the mean variance about their mean."""


@dataclass(frozen=True)
class Moments:
    """Of inputs x of d dimensions: E[x xᵀ], (d, d), and E[x], (d,)."""

    second: Tensor
    mean: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, float]]) -> "Moments":
        """Of positions (n, d) of several kinds, each kind with its share; empty ones count for nothing."""
        total = sum(share for rows, share in parts if len(rows))
        weighted = [(rows.float(), share / total / len(rows)) for rows, share in parts if len(rows)]
        second = torch.stack([share * (rows.T @ rows) for rows, share in weighted]).sum(0)
        return cls(second, torch.stack([share * rows.sum(0) for rows, share in weighted]).sum(0))

    def inverse(self) -> Tensor:
        """M⁻¹, damped; in float64."""
        second, mean = self.second.double(), self.mean.double()
        variance = (second.diagonal() - mean.square()).mean()
        damped = second.clone()
        damped.diagonal().add_(DAMPING * variance.clamp(min=0) + torch.finfo(self.second.dtype).tiny)
        inverse: Tensor = torch.linalg.inv(damped)
        return inverse


def through(groups: Sequence[Tensor], others: Moments, opened: float, shut: float) -> Tensor:
    """A row for each group of positions (n, d): ``opened`` at all of them, nearest to −``shut`` at the others.

    Returns:
        (groups, d).
    """
    inverse, mean = others.inverse(), others.mean.double()
    rows = list[Tensor]()
    for group in groups:
        inside = group.double()
        reached = inside @ inverse
        gram = reached @ inside.T
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        rows.append(torch.linalg.solve(gram, opened + shut * (reached @ mean)) @ reached - shut * (inverse @ mean))
    return torch.stack(rows).float()


def between(inside: Moments, others: Moments, opened: float, shut: float) -> Tensor:
    """One row (d,): near ``opened`` inside and near −``shut`` at the others, in the mean of squares of both."""
    both = Moments(others.second + inside.second, others.mean + inside.mean)
    row: Tensor = both.inverse() @ (opened * inside.mean - shut * others.mean).double()
    return row.float()
