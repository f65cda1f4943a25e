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
NEAR, ASIDE, BEYOND, LOOKS = 3e-2, 8.0, 4.0, 3
"""Weight of a position that is looked at by itself, beside 1 of all in the mean; where a row has to be below at these,
and by how much more it is pulled; how often they are looked for. Measured: docs/keeping.md."""


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


def through(groups: Sequence[Tensor], others: Moments, opened: float, shut: float, near: Tensor) -> Tensor:
    """A row for each group of positions (n, d): ``opened`` at all of them, nearest to −``shut`` at the others.

    Args:
        near: Others (m, d), one by one: those at which a row has w·x above −`ASIDE` are looked at again, each with the
            weight `NEAR`, and then pulled to what is safely shut. It is the few near misses of a key, not their mean,
            that open its gate.

    Returns:
        (groups, d).
    """
    inverse, mean, one_by_one = others.inverse(), others.mean.double(), near.double()
    rows = list[Tensor]()
    for group in groups:
        inside = group.double()
        seen = torch.zeros(len(one_by_one), dtype=torch.bool, device=near.device)
        row = _solved(inside, inverse, inverse @ (-shut * mean), opened)
        for _ in range(LOOKS):
            seen |= one_by_one @ row > -ASIDE
            chosen = one_by_one[seen]  # (M + NEAR·ZᵀZ)⁻¹ by Woodbury's identity: Z are few
            reached = inverse @ chosen.T
            middle = chosen @ reached
            middle.diagonal().add_(1 / NEAR)
            updated = inverse - reached @ torch.linalg.solve(middle, reached.T)
            pulled = -shut * mean - NEAR * (ASIDE + BEYOND) * chosen.sum(0)
            row = _solved(inside, updated, updated @ pulled, opened)
        rows.append(row)
    return torch.stack(rows).float()


def _solved(inside: Tensor, inverse: Tensor, free: Tensor, opened: float) -> Tensor:
    """The row (d,) nearest to ``free`` by the inverse's measure that is ``opened`` at all positions (n, d) inside."""
    reached = inside @ inverse
    gram = reached @ inside.T
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    row: Tensor = free + torch.linalg.solve(gram, opened - inside @ free) @ reached
    return row


def between(inside: Moments, others: Moments, opened: float, shut: float) -> Tensor:
    """One row (d,): near ``opened`` inside and near −``shut`` at the others, in the mean of squares of both."""
    both = Moments(others.second + inside.second, others.mean + inside.mean)
    row: Tensor = both.inverse() @ (opened * inside.mean - shut * others.mean).double()
    return row.float()
