"""How an adapter is trained: every choice of a write, with its measured default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from loramem._util.choices import check_choice
from loramem.errors import ArgumentError, StoreFormatError

ObjectiveName = Literal["sft", "memft-ot", "memft-sw"]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
"""What each of them is, `loramem.training.objectives` says."""
MAX_RANK = 128
"""Highest rank of an adapter where nobody allows more. Servers have maxima of their own (`loramem.serving.rules`)."""
RETIRED = frozenset(
    "curriculum start optimizer learning_rate batch_records batch_tokens precision max_grad_norm patience_passes "
    "restarts".split()
)
"""Settings that once tuned training through the network, and that stores and journals may still name."""


@dataclass(frozen=True)
class WriterSettings:
    """How an adapter is trained, behind the last attention and through the network alike unless a field says so.

    Raises:
        UnknownChoice: No such objective.
        ArgumentError: A contradiction.
    """

    objective: ObjectiveName = "memft-sw"
    """One of `OBJECTIVES`; "memft-sw" takes the sliding window for records longer than ``long_tokens``."""
    train_threshold: float = 0.9
    """Probability that training aims at; above what is certified, or tokens hover at the boundary."""
    certify_threshold: float = 0.6
    """Probability that every answer token and end token must reach."""
    feature_rate: float = 0.2
    """Of training behind the last attention alone, relative (`loramem.training.whitening`): the share of an adapter's
    entries, and of what its output is added to, that one step can change."""
    long_tokens: int = 200
    """A shard of a single answer longer than this is trained with the sliding window."""
    max_rank: int = MAX_RANK
    """Highest rank: of the first one asked for, of plans, and of what training grows to."""
    seed: int = 0
    """Of random directions in new rows of A; through the network also of the order of batches."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if self.max_rank < 1:
            raise ArgumentError(
                f"max_rank must be at least 1, not {self.max_rank}", argument="max_rank", value=self.max_rank
            )
        if not 0.5 <= self.certify_threshold <= self.train_threshold < 1:
            raise ArgumentError(
                "thresholds must satisfy 0.5 <= certify_threshold <= train_threshold < 1, not "
                f"{self.certify_threshold} and {self.train_threshold}",
                argument="certify_threshold",
                value=self.certify_threshold,
            )

    @classmethod
    def saved(cls, settings: Mapping[str, Any]) -> "WriterSettings":
        """Settings as a journal, an adapter's row or a manifest holds them, without those that were `RETIRED` since.

        Raises:
            StoreFormatError: There are others, of a newer version.
        """
        kept = {name: value for name, value in settings.items() if name not in RETIRED}
        if unknown := kept.keys() - cls.__dataclass_fields__:
            raise StoreFormatError(
                f"The store was written with the setting {min(unknown)!r}, which this version of loramem does not "
                "know. Upgrade loramem."
            )
        return cls(**kept)
