"""How many records share an adapter, and where one that must hold all of them begins. No torch.

Both are about what features carry, which no rank changes: behind the last attention an adapter on `down_proj` is a
perceptron over inputs that no training moves, and tells as many answer tokens apart as there are inputs, times a small
number. Long before that it takes many times the steps (docs/engine.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

FILL = 2.4
"""Answer and end tokens of one shard, by the mean width of the adapted modules; measured in docs/engine.md."""


@dataclass(frozen=True)
class Size:
    """Of a placement."""

    parameters_per_rank: int
    matrices: int
    """A and B of every adapted module."""

    @property
    def width(self) -> float:
        """Mean number of inputs and outputs of the adapted modules."""
        return self.parameters_per_rank / self.matrices

    def shard_tokens(self) -> int:
        """Most answer and end tokens of one shard, beside a single record that has more."""
        return max(1, round(FILL * self.width))

    def carries(self, tokens: int) -> bool:
        """Whether one adapter can be expected to tell so many answer and end tokens apart.

        One module is linear in its inputs, which are constants. A whole MLP is not, and holds far more: only its
        parameters bound it.
        """
        return self.matrices > 2 or tokens <= self.shard_tokens()


def cut(tokens: Sequence[int], most: int, least: int = 1) -> list[tuple[int, int]]:
    """Half-open ranges of nearly equal size; a record larger than a shard gets one of its own.

    Args:
        tokens: Answer and end tokens of each record.
        most: Of one shard.
        least: Shards to make at least, if there are as many records.
    """
    if not tokens:
        return []
    target = sum(tokens) / max(math.ceil(sum(tokens) / most), least)
    cuts, size = [0], 0
    for index, more in enumerate(tokens):
        if index > cuts[-1] and (size >= target or size + more > most):
            cuts.append(index)
            size = 0
        size += more
    return list(pairwise([*cuts, len(tokens)]))


def cut_groups(sizes: Sequence[int], tokens: Sequence[int], most: int | None) -> list[tuple[int, int]]:
    """`cut` for consecutive groups of so many records, no two of them in one range; whole ones without ``most``."""
    ranges, start = list[tuple[int, int]](), 0
    for size in sizes:
        group = tokens[start : start + size]
        ranges += [(start + first, start + last) for first, last in cut(group, most or sum(group))]
        start += size
    return ranges
