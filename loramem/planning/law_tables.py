"""Laws of groups of calibration runs, as the rows of tables. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from loramem.errors import LawError
from loramem.planning.law import MemoryLaw, Point
from loramem.planning.law_fit import Agreement, HeldOut, fit, held_out, means_agreement
from loramem.planning.runs import Run

LAW_COLUMNS = (
    *("runs", "C", "α", "β", "b", "R²", "MAPE %", "MAPE % beyond half the lengths"),
    *("R² of means", "MAPE % of means", "of means beyond half", "points", "saturated"),
)
"""The means are those over seeds, where a kind was measured with several."""


@dataclass(frozen=True)
class FittedRuns:
    """The law of some runs."""

    name: str
    law: MemoryLaw
    runs: Sequence[Run]

    @cached_property
    def beyond(self) -> HeldOut | None:
        """A law fitted to the shorter half of the lengths, beyond it; None where none can be."""
        half = max(self.law.length_range) / 2

        def within(point: Point) -> bool:
            return point.length <= half

        try:
            return held_out([run.point for run in self.runs], within)
        except LawError:
            return None

    @property
    def held_out_mape(self) -> float | None:
        """Percent, of `beyond`."""
        return self.beyond.mape if self.beyond else None

    @property
    def of_means(self) -> Agreement | None:
        """The law beside the means over seeds; None where there is one seed."""
        return means_agreement(self.law, [run.point for run in self.runs])

    @property
    def row(self) -> tuple[str, ...]:
        """Under `LAW_COLUMNS`."""
        law, unseen, means = self.law, self.held_out_mape, self.of_means
        unseen_means = self.beyond.of_means if self.beyond else None
        return (
            self.name,
            f"{law.C:.4g}",
            f"{law.alpha:.3f}",
            f"{law.beta:.3f}",
            f"{law.b:.3f}",
            f"{law.r_squared:.4f}",
            f"{law.mape:.1f}",
            "-" if unseen is None else f"{unseen:.1f}",
            f"{means.r_squared:.4f}" if means else "-",
            f"{means.mape:.1f}" if means else "-",
            f"{unseen_means.mape:.1f}" if unseen_means else "-",
            str(law.points),
            str(law.dropped),
        )


def fit_groups(groups: Iterable[tuple[str, Sequence[Run]]]) -> tuple[list[FittedRuns], list[str]]:
    """The law of every group that determines one; and why others do not, and warnings, in words."""
    fitted, remarks = list[FittedRuns](), list[str]()
    for name, runs in groups:
        try:
            fitted.append(FittedRuns(name, fit([run.point for run in runs]), runs))
        except LawError as error:
            remarks.append(f"{name}: {error}")
    return fitted, remarks + [f"{one.name}: {warning}" for one in fitted for warning in one.law.warnings]
