"""Tokens that no hidden state can make certain, since another token's row of the head is the same.

Comparing every pair of 256,000 rows would take hours. So each row is divided by its norm and projected on a few random
directions, which moves two rows that are alike by at most `SPREAD` times their distance. Space is cut into cells of
twice that width, and only rows in one cell that are near along one more direction are compared. A wall may stand
between two rows that are alike: hence as many grids as there are ways to move each axis by half a cell or not, of which
at least one has the two in one cell.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

AXES, DIRECTIONS = 3, 16
"""Of the projection: those that make the cells, and all of them; the next one sorts the rows of a cell."""
SPREAD = 5.0
"""A difference's length along a random direction is normal, its norm the deviation: of a million pairs two stray
further, and only where the tolerance just allows them."""
CHUNK = 2**24
"""Numbers of the head that are held in float32 at once, 64 MiB, whatever its size."""
FLOOR = 1e-3
"""Rows shorter than this share of the median norm differ from one another by as little as they do from zero."""


@torch.inference_mode()
def unreachable_tokens(model: PreTrainedModel, tolerance: float = 0.005) -> frozenset[int]:
    """Ids whose probability is at most one half whatever the hidden state, since rows of the unembedding are equal.

    Logits of equal rows differ by their biases alone, where the head has some: then only the tokens that lose to their
    equals are unreachable. Scaling or capping logits changes none of this. Tokens that a base model never saw in
    training often share one row.

    Args:
        tolerance: Largest distance of two "equal" rows, as a share of the longer one's norm. Rows are compared in
            float32, so that the dtype of the head does not matter.
    """
    head = model.get_output_embeddings()
    rows: Tensor = head.weight
    bias = torch.zeros(len(rows), dtype=torch.float64)
    if isinstance(head, nn.Linear) and head.bias is not None:
        bias = head.bias.double().cpu()
    # exp(logit) of a token and all its equals, in units of its own: 1 / p at best.
    total = torch.ones_like(bias)
    places, scale = _project(rows)
    reach, grids = SPREAD * tolerance, list[Tensor]()
    for shift in product((0.0, 0.5), repeat=AXES):
        grids.append(_cells(places[:, :AXES] / (2 * reach) + torch.tensor(shift)))
        for first, second in _near_in_cell(grids[-1], places[:, AXES], reach, undecided=lambda: total < 2):
            met = torch.zeros(len(first), dtype=torch.bool)
            for grid in grids[:-1]:
                met |= grid[first] == grid[second]
            # The mean square along many directions strays less than the square along one.
            met |= (places[first] - places[second]).square().mean(1) > (reach / 2) ** 2
            first, second = first[~met], second[~met]
            allowed = tolerance * torch.maximum(scale[first], scale[second])
            equal = _distances(rows, first, second) <= allowed
            first, second = first[equal], second[equal]
            total.index_add_(0, first, (bias[second] - bias[first]).exp())
            total.index_add_(0, second, (bias[first] - bias[second]).exp())
    return frozenset((total >= 2).nonzero().flatten().tolist())


def _project(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (V, D) divided by their norms along random directions (V, `DIRECTIONS`), and the norms (V,), at least
    `FLOOR` of the median; both in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(rows.shape[1], DIRECTIONS, generator=generator).to(rows.device)
    places, norms = [], []
    for chunk in rows.split(max(1, CHUNK // rows.shape[1])):
        places.append((chunk.float() @ directions).cpu())
        norms.append(chunk.float().norm(dim=1).cpu())
    scale = torch.cat(norms)
    typical = float(scale[scale > 0].median()) if bool((scale > 0).any()) else 1.0
    scale = scale.clamp(min=FLOOR * typical)
    return torch.cat(places) / scale[:, None], scale


def _cells(places: Tensor) -> Tensor:
    """One number (V,) for the cell of each place (V, axes), whose cells have the width 1."""
    number = torch.zeros(len(places), dtype=torch.int64)
    for axis in places.floor().to(torch.int64).T:
        number = number * 2**20 + axis
    return number


def _near_in_cell(
    cells: Tensor, along: Tensor, reach: float, undecided: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of indices in one cell, at most ``reach`` apart along an axis, at least one of the two undecided.

    Of thousands of equal rows nearly all are decided by the first pairs, so that few of the many are looked at.
    """
    order = along.argsort()
    order = order[cells[order].argsort(stable=True)]
    cells, along = cells[order], along[order]
    left, step = torch.arange(len(order)), 1
    while len(left := left[left + step < len(order)]):
        left = left[(cells[left + step] == cells[left]) & (along[left + step] - along[left] <= reach)]
        first, second, wanted = order[left], order[left + step], undecided()
        either = wanted[first] | wanted[second]
        yield first[either], second[either]
        if step & (step - 1) == 0:  # now and then, since it looks at every row
            wanted = undecided()[order]
            _, cell, size = cells.unique_consecutive(return_inverse=True, return_counts=True)
            left = left[torch.zeros(len(size)).index_add_(0, cell, wanted.float())[cell[left]] > 0]
        step += 1


def _distances(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Between rows (V, D) of two lists of indices (N,), in float32 on the CPU."""
    size = max(1, CHUNK // rows.shape[1] // 2)
    parts = [
        (rows[a.to(rows.device)].float() - rows[b.to(rows.device)].float()).norm(dim=1).cpu()
        for a, b in zip(first.split(size), second.split(size), strict=True)
    ]
    return torch.cat(parts)
