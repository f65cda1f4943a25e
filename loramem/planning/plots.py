"""Figures of a memory law: what was measured against what it says, and what it predicts for one length.

After figure 2 of arXiv 2605.30260. What is drawn is computed by functions that do without matplotlib, an optional extra
imported when a figure is made. No display and no pyplot; the same input gives the same bytes.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loramem._util.files import write_synced
from loramem.errors import LawError, LoramemError
from loramem.planning.law import MemoryLaw
from loramem.planning.law_fit import SATURATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SUFFIXES = (".png", ".svg", ".pdf")
MISSING = "matplotlib, which is not installed: pip install 'loramem[plots]'"
DPI, LAW_INCHES, PLAN_INCHES = 150, (13.0, 11.0), (8.0, 5.0)
CONFIDENCE, LIKELY = 0.9, "90 %"
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito: told apart with any colour vision
NUMBERED_CELLS, LABELS = 80, 12  # more cells leave no room for numbers, a longer axis none for every label
UNIT = "nats per token"


class MeasuredRun(Protocol):
    """What is drawn of a converged run: `loramem.planning.calibrate.Run` without what needs torch; units as there."""

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


Edge = tuple[tuple[float, float], tuple[float, float]]


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


def boundary(grid: Grid, threshold: float) -> list[Edge]:
    """The edges between neighbouring cells of which one is below the threshold and the other is not.

    In units of cells, (0, 0) the middle of the first, rank before length. Beside a missing cell there is no edge.
    """
    cells = {
        (x, y): value < threshold
        for y, row in enumerate(grid.values)
        for x, value in enumerate(row)
        if not math.isnan(value)
    }
    edges: list[Edge] = []
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
    figure.suptitle(title, fontsize="x-large", parse_math=False)
    _draw_plane(figure, runs, law)
    _draw_predictions(figure.add_subplot(2, 2, 2), predictions(runs, law), law)
    losses = mean_grid(runs, lambda run: run.final_loss)
    percent = mean_grid(runs, lambda run: 100 * run.ordered)
    edges = boundary(losses, SATURATED)
    for place, name, unit, grid, number, look in (
        (3, "Final loss", UNIT, losses, ".2f", {"cmap": "viridis_r", "vmin": 0}),
        (4, "Ordered tokens (p > 0.5)", "% of tokens", percent, ".3g", {"cmap": "viridis", "vmin": 0, "vmax": 100}),
    ):
        axes = figure.add_subplot(2, 2, place)
        figure.colorbar(_draw_grid(axes, name, grid, edges, number, look), ax=axes, label=unit)
    return figure


def plan_figure(law: MemoryLaw, base_loss: float, length: float, ranks: Mapping[str, float], title: str) -> "Figure":
    """The figure of `draw_plan`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not 0 < base_loss < math.inf:
        raise LawError(f"The base loss must be a positive number, not {base_loss}.")
    marked = {name: base_loss - law.predict(rank, length) for name, rank in ranks.items()}
    low, high = min(*law.rank_range, *ranks.values()) / 1.2, max(*law.rank_range, *ranks.values()) * 1.2
    x = [low * (high / low) ** (step / 200) for step in range(201)]
    loss = [base_loss - law.predict(rank, length) for rank in x]
    known = [math.nan if law.extrapolates(rank, length) else y for rank, y in zip(x, loss, strict=True)]
    least, greatest = zip(*(law.predict_interval(rank, length, CONFIDENCE) for rank in x), strict=True)
    band = [base_loss - reduction for reduction in greatest], [base_loss - reduction for reduction in least]

    figure = Figure(PLAN_INCHES, DPI, layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.add_subplot()
    axes.plot(x, known, color=BLUE, linewidth=2.2, label="law")
    axes.plot(x, loss, color=BLUE, linewidth=1.2, linestyle="--", label="law, extrapolated")
    axes.fill_between(x, *band, color=BLUE, alpha=0.2, linewidth=0, label=f"{LIKELY} of new runs")
    axes.axhline(base_loss, color=GREY, linestyle=":", label=f"before training: {base_loss:.3g}")
    axes.axhline(SATURATED, color=RED, label=f"{SATURATED}: no law below")
    for (name, rank), style in zip(ranks.items(), itertools.cycle(("-", "--", "-.", ":"))):
        axes.axvline(rank, color="black", linewidth=1, linestyle=style, label=f"{name}: rank {rank:.3g}")
        axes.plot([rank], [marked[name]], "o", color=BLUE)
    axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.08 * max(base_loss, SATURATED)))
    axes.set(xlabel="rank r", ylabel=f"final loss at {length:.6g} answer tokens ({UNIT})")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _draw_plane(figure: "Figure", runs: Sequence[MeasuredRun], law: MemoryLaw) -> None:
    import numpy as np

    points = plane_points(runs, law)
    x = _spaced([*map(math.log, law.rank_range), *(point[0] for point in points)])
    y = _spaced([*map(math.log, law.length_range), *(point[1] for point in points)])
    heights = np.array([[plane(law, log_rank, log_length) for log_rank in x] for log_length in y])
    axes = figure.add_subplot(2, 2, 1, projection="3d")
    axes.plot_surface(*np.meshgrid(x, y), heights, color=BLUE, alpha=0.15, edgecolor=BLUE, linewidth=0.5, shade=False)
    for log_rank, log_length, height in points:
        stem = (plane(law, log_rank, log_length), height)
        axes.plot([log_rank] * 2, [log_length] * 2, stem, color=RED, linewidth=2, marker="o", markevery=[1])
    axes.set_xticks(x, [f"{math.exp(value):.6g}" for value in x])
    axes.set_yticks(y, [f"{math.exp(value):.6g}" for value in y])
    axes.set_xlabel("rank r (log scale)", labelpad=8)
    axes.set_ylabel("length ℓ, answer tokens (log scale)", labelpad=16)
    axes.set_zlabel(f"log(ΔL − b), ΔL in {UNIT}", labelpad=6)
    axes.set_title(rf"$\Delta L = {law.C:.4g}\, r^{{{law.alpha:.3f}}}\, \ell^{{-{law.beta:.3f}}} {law.b:+.3f}$")
    axes.view_init(elev=22, azim=-125)
    axes.set_box_aspect((1, 1, 0.8), zoom=0.92)


def _draw_predictions(axes: "Axes", shown: Sequence[Prediction], law: MemoryLaw) -> None:
    for saturated, color, fill, label in (
        (False, BLUE, BLUE, "fitted"),
        (True, GREY, "white", f"not fitted: final loss < {SATURATED}"),
    ):
        some = [one for one in shown if one.saturated == saturated]
        if some:
            bars = [[one.predicted - one.low for one in some], [one.high - one.predicted for one in some]]
            at = [one.measured for one in some], [one.predicted for one in some]
            axes.errorbar(*at, bars, fmt="o", color=color, mfc=fill, elinewidth=1, capsize=2, label=label)
    ends = [end for one in shown for end in (one.measured, one.low, one.high)]
    slack = 0.04 * (max(ends) - min(ends))
    limits = (min(ends) - slack, max(ends) + slack)
    axes.plot(limits, limits, color="black", linewidth=0.8, label="predicted = measured")
    axes.set(xlim=limits, ylim=limits, aspect="equal", title=f"Prediction; bars: {LIKELY} of new runs")
    axes.set(xlabel=f"measured ΔL ({UNIT})", ylabel=f"predicted ΔL ({UNIT})")
    text = f"R² = {law.r_squared:.4f}\nMAPE = {law.mape:.1f} %\n{law.points} fitted runs"
    axes.text(0.97, 0.03, text, transform=axes.transAxes, ha="right", va="bottom")
    axes.legend(loc="upper left")


def _draw_grid(
    axes: "Axes", name: str, grid: Grid, edges: Sequence[Edge], number: str, look: Mapping[str, Any]
) -> "AxesImage":
    import numpy as np
    from matplotlib.collections import LineCollection

    image = axes.imshow(grid.values, origin="lower", aspect="auto", **look)
    axes.patch.set(hatch="////", edgecolor="#bbbbbb")
    shades = image.to_rgba(np.array(grid.values))
    cells = [(x, y, value) for y, row in enumerate(grid.values) for x, value in enumerate(row)]
    measured = [cell for cell in cells if not math.isnan(cell[2])]
    for x, y, value in measured if len(cells) <= NUMBERED_CELLS else ():
        dark = shades[y, x, :3].sum() < 1.2
        axes.text(x, y, format(value, number), ha="center", va="center", color="white" if dark else "black")
    for color, width in (("white", 5.0), ("black", 2.5)):  # seen on every colour
        axes.add_collection(LineCollection(edges, colors=color, linewidths=width, capstyle="round"), autolim=False)
    for axis, values in ((axes.xaxis, grid.ranks), (axes.yaxis, grid.lengths)):
        places = range(0, len(values), math.ceil(len(values) / LABELS))
        axis.set_ticks(places, [f"{values[place]:.6g}" for place in places])
    said = [f"line: loss {SATURATED}"] * bool(edges) + ["hatched: no run"] * (len(measured) < len(cells))
    axes.set(xlabel="rank r", ylabel="length ℓ (answer tokens)", title="; ".join([name, *said]))
    return image


def _spaced(values: Iterable[float]) -> list[float]:
    """The first, the last, and of those between them the ones that leave room for a label on either side."""
    first, *between, last = sorted(set(values))
    kept = [first]
    for value in between:
        if min(value - kept[-1], last - value) >= (last - first) / 9:
            kept.append(value)
    return [*kept, last]


def _save(path: Path, law: MemoryLaw, draw: Callable[[], "Figure"]) -> None:
    if path.suffix not in SUFFIXES:
        raise LoramemError(f"A figure's file must end in {', '.join(SUFFIXES)}, not {path.suffix!r}: {path}.")
    content = render(draw, path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, content, mode=0o644)


def render(draw: Callable[[], "Figure"], format_: str, **settings: object) -> bytes:
    """The content of a figure's file, the same for the same figure.

    Args:
        draw: Makes the figure, within matplotlib's default style: the user's own settings must not change sizes.
        format_: "png", "svg" or "pdf".
        settings: Of matplotlib, beside its defaults, with underscores for dots.

    Raises:
        LoramemError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise LoramemError(f"Figures need {MISSING}") from None
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    ours = {"svg.hashsalt": "loramem", **{name.replace("_", ".", 1): value for name, value in settings.items()}}
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", ours]):
        draw().savefig(buffer, format=format_, metadata=undated[format_])
    return buffer.getvalue()
