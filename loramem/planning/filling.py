"""How full the adapters of a plan for few parameters are. No torch.

A rank costs the same parameters however many records share it, so those are fewest where every adapter is full. What
fills one is what it has to tell apart: each answer or end token is one of V, which takes log2 V bits, and a parameter
of one linear module over constant inputs carries about one such bit (docs/engine.md).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from loramem.models.shard_sizes import Size, cut
from loramem.planning.limits import RankLimits, whole_rank

CARRIED = 1.1
"""Bits per parameter that a first try certifies; measured, docs/engine.md."""
SCATTER = 1.02
"""Factor on what one shard's tokens ask for, for the others of a write: they differ in V."""


def rank_that_carries(tokens: int, vocabulary: float, size: Size) -> float:
    """The least rank of an adapter that tells so many answer and end tokens apart, not yet rounded up; 0 for several
    modules, which are not linear in their inputs.

    Args:
        vocabulary: V, effective, of these tokens.
    """
    if size.matrices > 2:
        return 0.0
    return tokens * math.log2(max(vocabulary, 1.0)) / (CARRIED * size.parameters_per_rank)


def fullest(tokens: Sequence[int], needed: Callable[[int], float], most: int, limits: RankLimits) -> int:
    """Most answer and end tokens of one shard with which all shards together take the fewest parameters.

    Of equals the smallest shards, whose training takes the fewest steps.

    Args:
        tokens: Of each record.
        needed: The rank that a shard of so many tokens takes, not yet rounded up; it grows with them.
        most: Of one shard, whatever its rank.
    """
    if not tokens or needed(1) > limits.most:  # fewer records need no less
        return most
    sizes, reach = range(1, most + 1), whole_rank(needed(most))
    ranks = sorted({limits.at_least(rank) for rank in range(whole_rank(needed(1)) or 1, max(reach, 1) + 1)})
    filled = {rank: max(1, bisect_right(sizes, float(rank), key=needed)) for rank in ranks}
    return filled[min(ranks, key=lambda rank: rank * len(cut(tokens, filled[rank])))]
