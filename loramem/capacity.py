"""Planning a write: how many shards, and the rank each starts with. No torch.

Until a law is fitted for the base model, the rank is a guess from the cost of the values in bits. A wrong guess
costs time, not correctness: the writer raises the rank when progress stops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_RANK = 128


@dataclass(frozen=True)
class Goal:
    """What a write is planned for; measured in docs/writing.md."""

    density: float
    """Bits of value cost per adapter parameter that the first rank is chosen for."""
    min_rank: int
    shard_records: int
    """Most records of one shard: many adapters with exact routing, none too large to rewrite."""
    shard_tokens: int
    """Most answer tokens of one shard (one record may exceed it alone)."""


GOALS = {
    "fast": Goal(density=0.03, min_rank=8, shard_records=200, shard_tokens=4000),
    # A large shard holds more per parameter: rank 2 held 400 phone numbers where rank 1 left three of 200.
    "small": Goal(density=1.1, min_rank=2, shard_records=400, shard_tokens=8000),
}


@dataclass(frozen=True)
class ShardPlan:
    """One adapter to be."""

    first: int
    """Index of its first record among those planned."""
    records: int
    length: int
    """Answer tokens of all its records, end tokens not counted."""
    cost_bits: float
    rank: int
    parameters: int

    def moved(self, by: int) -> "ShardPlan":
        """The same shard with its first record ``by`` places later."""
        return replace(self, first=self.first + by)


@dataclass(frozen=True)
class Plan:
    """What a write would do."""

    goal: str
    shards: tuple[ShardPlan, ...]

    @property
    def parameters(self) -> int:
        return sum(shard.parameters for shard in self.shards)

    @property
    def cost_bits(self) -> float:
        return sum(shard.cost_bits for shard in self.shards)


def check_request(goal: str, rank: int | None, max_rank: int = MAX_RANK) -> None:
    """Refuse what no plan can follow.

    Raises:
        ValueError: Unknown goal, or a rank outside 1..max_rank.
    """
    if goal not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}, not {goal!r}")
    if rank is not None and not 1 <= rank <= max_rank:
        raise ValueError(f"rank must be between 1 and {max_rank}, not {rank}")


def plan_write(
    lengths: Sequence[int],
    costs_bits: Sequence[float],
    parameters_per_rank: int,
    *,
    goal: str = "fast",
    rank: int | None = None,
    max_rank: int = MAX_RANK,
) -> Plan:
    """Cut records into shards of nearly equal size, in order, and choose each one's first rank.

    Args:
        lengths: Answer tokens of each record.
        costs_bits: Cost of each value: Σ over its tokens of max(0, −log2 p_base − 1).
        parameters_per_rank: Adapter parameters of one rank at the placement.
        goal: "fast" (seconds) or "small" (parameters).
        rank: Use this rank for every shard.

    Raises:
        ValueError: See `check_request`.
    """
    check_request(goal, rank, max_rank)
    limits, shards = GOALS[goal], []
    for first, last in _cut(lengths, limits):
        cost = sum(costs_bits[first:last])
        guess = math.ceil(cost / (limits.density * parameters_per_rank))
        chosen = rank or min(max(guess, limits.min_rank), max_rank)
        shards.append(
            ShardPlan(first, last - first, sum(lengths[first:last]), cost, chosen, chosen * parameters_per_rank)
        )
    return Plan(goal, tuple(shards))


def _cut(lengths: Sequence[int], limits: Goal) -> list[tuple[int, int]]:
    """Half-open ranges of nearly equal length; a record longer than a shard gets one of its own."""
    if not lengths:
        return []
    shards = max(math.ceil(len(lengths) / limits.shard_records), math.ceil(sum(lengths) / limits.shard_tokens))
    target = sum(lengths) / shards
    cuts, size = [0], 0.0
    for index, length in enumerate(lengths):
        full = size >= target or size + length > limits.shard_tokens or index - cuts[-1] >= limits.shard_records
        if index > cuts[-1] and full:
            cuts.append(index)
            size = 0.0
        size += length
    return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))
