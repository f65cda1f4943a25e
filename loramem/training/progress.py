"""What a training tells: after every step, and at its end. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WriteProgress:
    """What a progress callback is told after every step, and once more when a shard is proved."""

    step: int
    tokens_ordered: int
    """Answer and end tokens at or above the certified probability when last seen."""
    tokens_total: int
    min_prob: float
    """Lowest probability among tokens seen so far; 0 while some were never seen."""
    loss: float
    """Mean cross-entropy of the last batch in nats per token."""
    rank: int
    elapsed_s: float
    records_ordered: int = 0
    """Records of the shard all whose tokens were at or above the certified probability when last seen."""
    records: int = 0
    """Of the shard."""
    shard: int = 1
    shards: int = 1
    records_total: int = 0
    """Of all shards."""
    proved: bool = False
    """Whether the shard is done: its ordered records were decoded from the adapter as saved, and are certified."""


ProgressCallback = Callable[[WriteProgress], None]


@dataclass(frozen=True)
class Training:
    """The outcome of training one shard."""

    stubborn: tuple[int, ...]
    """Indices of records that are not certified; empty when the shard is done."""
    rank: int
    parameters: int
    steps: int
    visits: int
    """Times a record was in a training batch, over all records."""
    elapsed_s: float

    def after(self, spent: "Iterable[Training]") -> "Training":
        """This outcome at the cost of all: what was tried in vain before it counts."""
        every = [*spent, self]
        return replace(
            self,
            steps=sum(each.steps for each in every),
            visits=sum(each.visits for each in every),
            elapsed_s=sum(each.elapsed_s for each in every),
        )
