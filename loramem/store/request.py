"""How a write is asked for: said once by the caller, kept by the journal, and by adapters to be rewritten alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from loramem.index.rows import Ended
from loramem.planning.limits import GoalName, RankLimits, check_request
from loramem.training.settings import WriterSettings

OnConflict = Literal["error", "skip", "replace"]
"""What becomes of a record whose key is there with another value."""


@dataclass(frozen=True)
class WriteRequest:
    """What a write is to be like, whatever its records."""

    goal: GoalName = "fast"
    rank: int | None = None
    """First rank of every adapter; None leaves it to the plan."""
    settings: WriterSettings = field(default_factory=WriterSettings)
    one_adapter: bool = False
    """One adapter for all records of a namespace, whatever it takes."""
    partial: bool = False
    """Commit what was certified even if other records could not be."""
    ended: tuple[Ended, ...] = ()
    """Records that end with it, beside those that it replaces."""

    @property
    def first_rank(self) -> int | None:
        """What every adapter begins with, where that is no matter of the plan."""
        keep = self.settings.keep_base
        if self.rank is not None or keep is None or keep.neurons is None:
            return self.rank
        return min(keep.neurons, self.settings.max_rank)

    @property
    def limits(self) -> RankLimits:
        """Ranks that its adapters may have."""
        return RankLimits(self.settings.max_rank)

    @property
    def kept(self) -> dict[str, Any]:
        """What the row of an adapter keeps of it, beside the settings: "training.request"."""
        return {"goal": self.goal, "rank": self.rank, "one_adapter": self.one_adapter}

    def check(self) -> None:
        """Refuse what no plan can follow.

        Raises:
            UnknownChoice: No such goal.
            ArgumentError: A rank that the settings do not allow.
        """
        check_request(self.goal, self.rank, self.limits)

    def to_json(self) -> dict[str, Any]:
        """As the journal has it."""
        return {
            **self.kept,
            "partial": self.partial,
            "settings": self.settings.to_json(),
            "ended": [list(each) for each in self.ended],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """What `to_json` gave, or a journal of an older version, which names less or settings that are retired.

        Raises:
            StoreFormatError: A setting of a newer version.
        """
        names = ("goal", "rank", "one_adapter", "partial")
        return cls(
            settings=WriterSettings.saved(fields["settings"]),
            ended=tuple(Ended(*each) for each in fields.get("ended", ())),
            **{name: fields[name] for name in names if name in fields},
        )

    @classmethod
    def of_adapter(cls, training: Mapping[str, Any]) -> Self:
        """How an adapter was asked to be written, as far as its row says (see `kept`).

        Raises:
            StoreFormatError: A setting of a newer version.
        """
        return cls.from_json({**training.get("request", {}), "settings": training["settings"]})
