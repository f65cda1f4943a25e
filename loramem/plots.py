"""Figures of a memory law: what was measured against what it says, and what it predicts for one length.

After figure 2 of arXiv 2605.30260. What is drawn is computed by functions that do without matplotlib, an optional extra
imported when a figure is made. No display and no pyplot; the same input gives the same bytes.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loramem.errors import LawError, LoramemError
from loramem.files import write_synced
from loramem.law import FORMS, MemoryLaw
from loramem.law_fit import SATURATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
DPI, LAW_INCHES, PLAN_INCHES = 150, (13.0, 11.0), (8.0, 5.0)
CONFIDENCE = 0.9
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito: told apart with any colour vision
NUMBERED_CELLS, LABELS = 80, 12  # more cells have no room for numbers, a longer axis none for every label
UNIT = "nats per token"


class MeasuredRun(Protocol):
    """What is drawn of a converged run: `loramem.calibrate.Run` without what needs torch; units as there."""

    @property
    def rank(self) -> float: ...
    @property
    def length(self) -> float: ...
    @property
    def base_loss(self) -> float: ...
    @property
    def final_loss(self) -> float: ...
    @property
    def ordered(self) -> float: ...


@dataclass(frozen=True)
class Prediction:
    """ΔL of one run in nats per token: measured, and what the law says of it."""

    measured: float
    predicted: float
    low: float
    high: float
    saturated: bool


@dataclass(frozen=True)
class Grid:
    """A quantity over ranks and lengths: ``values[length][rank]``, NaN where there is no run."""

    ranks: tuple[float, ...]
    lengths: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]


def draw_law(runs: Sequence[MeasuredRun], law: MemoryLaw, title: str, path: Path) -> None:
    """Draw a law and its runs: the plane, prediction against measurement, final loss and ordered tokens.

    Args:
        runs: Of one base model, placement and kind of data, saturated ones as well.
        path: Ends in .png, .svg or .pdf; created with its folder, an existing file is replaced.

    Raises:
        LoramemError: Another suffix, or matplotlib is not installed.
        LawError: No runs, or a law that is not about ranks and lengths.
    """
    _save(path, law, lambda: law_figure(runs, law, title))


def draw_plan(
    law: MemoryLaw, base_loss: float, length: float, ranks: Mapping[str, float], title: str, path: Path
) -> None:
    """Draw the final loss that a law predicts for one length over the rank, with its 90 % interval.

    Args:
        base_loss: Nats per answer token before training.
        length: Answer tokens.
        ranks: The ranks to be marked, by what each is called.
        path: As for `draw_law`.

    Raises:
        LoramemError: As `draw_law`.
        LawError: A number that is not positive, or a law that is not about ranks and lengths.
    """
    _save(path, law, lambda: plan_figure(law, base_loss, length, ranks, title))


def plane(law: MemoryLaw, log_rank: float, log_length: float) -> float:
    """log(ΔL − b) by the law: log C + α·log r − β·log ℓ."""
    return math.log(law.C) + law.alpha * log_rank - law.beta * log_length


def plane_points(runs: Iterable[MeasuredRun], law: MemoryLaw) -> list[tuple[float, float, float]]:
    """log r, log ℓ and log(ΔL − b) of the unsaturated runs whose ΔL is above b."""
    return [
        (math.log(run.rank), math.log(run.length), math.log(run.base_loss - run.final_loss - law.b))
        for run in runs
        if run.final_loss >= SATURATED and run.base_loss - run.final_loss > law.b
    ]


def predictions(runs: Iterable[MeasuredRun], law: MemoryLaw) -> list[Prediction]:
    """Every run beside what the law says of its rank and length, with the 90 % interval of one new run."""
    return [
        Prediction(
            run.base_loss - run.final_loss,
            law.predict(run.rank, run.length),
            *law.predict_interval(run.rank, run.length, CONFIDENCE),
            run.final_loss < SATURATED,
        )
        for run in runs
    ]


def mean_grid(runs: Iterable[MeasuredRun], quantity: Callable[[MeasuredRun], float]) -> Grid:
    """A quantity over ranks and lengths, its mean where several runs (seeds) have the same."""
    cells: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        cells.setdefault((run.length, run.rank), []).append(quantity(run))
    means = {cell: math.fsum(values) / len(values) for cell, values in cells.items()}
    lengths, ranks = (tuple(sorted({cell[axis] for cell in cells})) for axis in (0, 1))
    return Grid(ranks, lengths, tuple(tuple(means.get((n, r), math.nan) for r in ranks) for n in lengths))


def boundary(grid: Grid, threshold: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The edges between neighbouring cells of which one is below the threshold and the other is not.

    In units of cells, (0, 0) the middle of the first, rank before length. Beside a missing cell there is no edge.
    """
    cells = {(x, y): value < threshold for y, row in enumerate(grid.values) for x, value in enumerate(row)
             if not math.isnan(value)}
    edges = []
    for (x, y), below in cells.items():
        if cells.get((x + 1, y), below) != below:
            edges.append(((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)))
        if cells.get((x, y + 1), below) != below:
            edges.append(((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)))
    return edges


def law_figure(runs: Sequence[MeasuredRun], law: MemoryLaw, title: str) -> "Figure":
    """The four panels of `draw_law`."""
    from matplotlib.figure import Figure

    if not runs:
        raise LawError("There are no runs to draw.")
    figure = Figure(LAW_INCHES, DPI, layout="constrained")
    figure.suptitle(title, fontsize="x-large")
    losses = mean_grid(runs, lambda run: run.final_loss)
    edges = boundary(losses, SATURATED)
    ordered = mean_grid(runs, lambda run: 100 * run.ordered)
    _draw_plane(figure, runs, law)
    _draw_predictions(figure.add_subplot(2, 2, 2), predictions(runs, law), law)
    _draw_grid(figure.add_subplot(2, 2, 3), losses, edges, "Final loss", UNIT, "viridis_r")
    _draw_grid(figure.add_subplot(2, 2, 4), ordered, edges, "Ordered tokens (p > 0.5)", "% of tokens", "viridis", 100)
    return figure


def plan_figure(
    law: MemoryLaw, base_loss: float, length: float, ranks: Mapping[str, float], title: str
) -> "Figure":
    """The figure of `draw_plan`; dashed where the law extrapolates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    if not 0 < base_loss < math.inf:
        raise LawError(f"The base loss must be a positive number, not {base_loss}.")
    marked = [base_loss - law.predict(rank, length) for rank in ranks.values()]
    low, high = min(*law.rank_range, *ranks.values()) / 1.2, max(*law.rank_range, *ranks.values()) * 1.2
    x = [low * (high / low) ** (step / 200) for step in range(201)]
    loss = [base_loss - law.predict(rank, length) for rank in x]
    known = [math.nan if law.extrapolates(rank, length) else y for rank, y in zip(x, loss, strict=True)]
    least, greatest = zip(*(law.predict_interval(rank, length, CONFIDENCE) for rank in x), strict=True)

    figure = Figure(PLAN_INCHES, DPI, layout="constrained")
    figure.suptitle(title)
    axes = figure.add_subplot()
    axes.fill_between(x, [base_loss - y for y in greatest], [base_loss - y for y in least], color=BLUE, alpha=0.2,
                      linewidth=0, label=f"{CONFIDENCE:.0%} of runs")
    axes.plot(x, loss, color=BLUE, linestyle="--", linewidth=1.2, label="law, beyond what was measured")
    axes.plot(x, known, color=BLUE, linewidth=2.2, label="law")
    axes.axhline(base_loss, color=GREY, linestyle=":", label=f"before training: {base_loss:.3g}")
    axes.axhline(SATURATED, color=RED, label=f"{SATURATED}: below it the law says no more")
    axes.vlines(list(ranks.values()), 0, 1, transform=axes.get_xaxis_transform(), color=GREY, linewidth=0.8)
    axes.plot(list(ranks.values()), marked, "o", color=BLUE, clip_on=False)
    axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.08 * max(base_loss, SATURATED)), xlabel="rank r",
             ylabel=f"final loss at {length:.6g} answer tokens ({UNIT})")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    names = axes.secondary_xaxis("top")
    names.set_xticks(list(ranks.values()), [f"{name}: {rank:.3g}" for name, rank in ranks.items()], rotation=35, ha="left")
    axes.legend(loc="upper right", framealpha=0.95)
    return figure


def _draw_plane(figure: "Figure", runs: Sequence[MeasuredRun], law: MemoryLaw) -> None:
    import numpy as np

    points = plane_points(runs, law)
    x = _spaced([*map(math.log, law.rank_range), *(point[0] for point in points)])
    y = _spaced([*map(math.log, law.length_range), *(point[1] for point in points)])
    axes = figure.add_subplot(2, 2, 1, projection="3d")
    ...
