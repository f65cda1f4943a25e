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
INSIDE, STEPS = 5.0, 20
"""Weight of what lacks within answers, beside 1 of what lacks elsewhere; and how many steps are taken at most."""


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

    def damped(self) -> Tensor:
        """E[x xᵀ] + λI, in float64."""
        second, mean = self.second.double(), self.mean.double()
        variance = (second.diagonal() - mean.square()).mean()
        second.diagonal().add_(DAMPING * variance.clamp(min=0) + torch.finfo(self.second.dtype).tiny)
        return second


def through(groups: Sequence[Tensor], others: Moments, opened: float, shut: float, near: Tensor) -> Tensor:
    """A row for each group of positions (n, d): ``opened`` at all of them, nearest to −``shut`` at the others.

    Args:
        near: Others (m, d), one by one: those at which a row has w·x above −`ASIDE` are looked at again, each with the
            weight `NEAR`, and then pulled to what is safely shut. It is the few near misses of a key, not their mean,
            that open its gate.

    Returns:
        (groups, d).
    """
    second, pulled = others.damped(), -shut * others.mean.double()
    factor = torch.linalg.cholesky(second)
    rows = torch.stack([_solved(group.double(), factor, pulled, opened) for group in groups])
    seen = torch.zeros(len(near), len(groups), dtype=torch.bool, device=near.device)
    for _ in range(LOOKS):
        seen |= (near.float() @ rows.T.float()) > -ASIDE
        for number, group in enumerate(groups):
            chosen = near[seen[:, number]].float()
            factor = torch.linalg.cholesky(second + NEAR * (chosen.T @ chosen))
            aside = pulled - NEAR * (ASIDE + BEYOND) * chosen.sum(0)
            rows[number] = _solved(group.double(), factor, aside, opened)
    return rows.float()


def _solved(inside: Tensor, factor: Tensor, pulled: Tensor, opened: float) -> Tensor:
    """Of the rows w (d,) that are ``opened`` at all positions (n, d) inside, the one with the least wᵀMw − 2·w·pulled.

    Args:
        factor: L of M = L·Lᵀ.
    """
    solved = torch.cholesky_solve(torch.cat([pulled[:, None], inside.T], 1), factor)
    free, reached = solved[:, 0], solved[:, 1:]
    gram = inside @ reached
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    row: Tensor = free + reached @ torch.linalg.solve(gram, opened - inside @ free)
    return row


def between(groups: Sequence[Tensor], others: Tensor, weights: Tensor, opened: float, shut: float) -> Tensor:
    """A row for each group of positions (n, d): at least ``opened`` there, at most −``shut`` at the others (m, d), as
    far as the mean of squares of what lacks can be made small.

    A support vector machine with squared hinge loss and no bias, by Newton's steps over those that lack something
    (Keerthi and DeCoste, JMLR 6, 2005).

    Args:
        weights: (m,) of the others, their sum 1.

    Returns:
        (groups, d).
    """
    mean = weights @ others
    every = (others * weights[:, None]).T @ others
    ridge = DAMPING * float((every.diagonal() - mean.square()).mean().clamp(min=0)) + torch.finfo(others.dtype).tiny
    eye = ridge * torch.eye(len(mean), device=others.device, dtype=torch.float64)
    rows = list[Tensor]()
    for group in groups:
        weight = INSIDE / len(group)
        within, gram, pull = group, every, mean
        some: tuple[Tensor, Tensor] | None = None
        for _ in range(STEPS):
            whole = gram.double() + weight * (within.T @ within).double() + eye
            row = torch.linalg.solve(whole, (opened * weight * within.sum(0) - shut * pull).double()).to(others)
            before, some = some, (others @ row > -shut, group @ row < opened)
            if before is not None and all(map(torch.equal, before, some)):
                break
            lacking = others[some[0]] * weights[some[0], None]
            within, gram, pull = group[some[1]], lacking.T @ others[some[0]], lacking.sum(0)
        rows.append(row)
    return torch.stack(rows)


def parts(positions: Tensor, places: Tensor, others: Moments, count: int) -> Tensor:
    """Which of so many parts each position (n, d) belongs to, (n,): k-means where the others are white, from the means
    of places (n,) that are near one another. Each part is told from the others by a hyperplane more easily than all."""
    white = positions.double() @ torch.linalg.cholesky(torch.linalg.inv(others.damped()))
    order = places.argsort(stable=True)
    labels = torch.empty_like(places)
    labels[order] = torch.arange(len(places), device=places.device) * count // len(places)
    for _ in range(STEPS):
        centres = torch.stack([white[labels == label].mean(0) for label in labels.unique().tolist()])
        before, labels = labels, torch.cdist(white, centres).argmin(1)
        if torch.equal(labels, before):
            break
    return labels
