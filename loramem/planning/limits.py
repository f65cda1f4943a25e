"""What a write may ask of its plan: a goal, a first rank, and the ranks that adapters may have. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loramem._util.choices import check_choice
from loramem.errors import ArgumentError
from loramem.training.settings import MAX_RANK

GoalName = Literal["fast", "small"]


@dataclass(frozen=True)
class Goal:
    """What a write is planned for; measured, docs/law.md."""

    probability: float
    """That no higher rank is needed, by the success boundary: "small" begins low, since growing costs seconds."""
    times: float
    """That rank is the first one, since with rank to spare a write takes fewer steps."""
    density: float
    """Bits of cost per parameter that the rank is chosen for where no law is known."""


GOALS: Mapping[GoalName, Goal] = {
    "fast": Goal(probability=0.95, times=2.1, density=0.08),
    "small": Goal(probability=0.3, times=1.0, density=1.0),
}


@dataclass(frozen=True)
class RankLimits:
    """Ranks that an adapter may have.

    Raises:
        ArgumentError: They allow none.
    """

    highest: int = MAX_RANK
    choices: tuple[int, ...] = ()
    """What a server takes; any up to ``highest`` if empty."""

    def __post_init__(self) -> None:
        if self.highest < 1 or any(rank < 1 for rank in self.choices):
            least = min(self.highest, *self.choices, 1)
            raise ArgumentError(f"ranks must be at least 1, not {least}", argument="limits", value=least)
        if self.choices and min(self.choices) > self.highest:
            choices = ", ".join(map(str, self.choices))
            raise ArgumentError(
                f"none of the ranks {choices} is at most {self.highest}", argument="limits", value=self.choices
            )

    @property
    def most(self) -> int:
        return max((rank for rank in self.choices if rank <= self.highest), default=self.highest)

    def at_least(self, rank: int) -> int:
        """The lowest allowed rank that is not below this one, or the highest there is."""
        allowed = [choice for choice in self.choices if rank <= choice <= self.highest]
        return min(allowed, default=min(rank, self.most) if not self.choices else self.most)


ANY_RANK = RankLimits()


def whole_rank(rank: float) -> int:
    """Rounded up, but for what floats leave behind."""
    return math.ceil(rank - 1e-9)


def check_request(goal: GoalName, rank: int | None, limits: RankLimits = ANY_RANK) -> None:
    """Refuse what no plan can follow.

    Raises:
        UnknownChoice: No such goal.
        ArgumentError: A rank outside the limits.
    """
    check_choice("goal", goal, tuple(GOALS))
    if rank is not None and not 1 <= rank <= limits.highest:
        remedy = f". Give a lower one, or allow it with max_rank={rank} (--max-rank {rank})" if rank > 0 else ""
        raise ArgumentError(
            f"rank must be between 1 and {limits.highest}, not {rank}{remedy}", argument="rank", value=rank
        )
    if rank is not None and limits.choices and rank not in limits.choices:
        raise ArgumentError(
            f"rank must be one of {', '.join(map(str, limits.choices))}, not {rank}", argument="rank", value=rank
        )
