"""The plots of the suites: a plot is data (`Plot`), which a suite makes of its lines, and is drawn here.

matplotlib is an optional extra, imported when something is drawn. No display and no pyplot; the same plot gives the
same bytes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from loramem.planning.plots import render

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as DrawnAxis
    from matplotlib.figure import Figure

DPI, INCHES = 150, (6.4, 4.0)
BARS_INCHES, HEAD_INCHES, BAR_INCHES = 8.0, 1.7, 0.3  # width; title, axis and legend; one bar
# Okabe and Ito: told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCH = "////"
LEGEND_LETTERS = 75  # that fit beside each other
MOST_LABELLED = 16  # columns of a heat map whose fields are wide enough for a number
TICKS = 8  # measured sizes that an axis can be labelled with


@dataclass(frozen=True)
class Axis:
    """What is measured along an axis."""

    label: str
    """With its unit."""
    log: bool = False


@dataclass(frozen=True)
class Point:
    """One value; where there were several measurements, their median between the lowest and the highest."""

    x: float
    y: float
    low: float
    high: float
    at_least: bool = False
    """The measurement was stopped before its end: the value would be higher."""


@dataclass(frozen=True)
class Series:
    """Points of one colour."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Plot:
    """What one figure shows."""

    name: str
    """A word for its files."""
    title: str
    kind: Literal["bar", "line", "scatter"]
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    names: tuple[str, ...] = ()
    """Of bars: what is measured at x = 0, 1, …; drawn from top to bottom."""
    diagonal: str = ""
    """What it means for x and y to be equal; then this line is drawn."""
    note: str = ""
    """What one must know to read it."""


@dataclass(frozen=True)
class HeatMap:
    """A grid of values, each a coloured and labelled field."""

    name: str
    """A word for its files."""
    title: str
    x: Axis
    y: Axis
    value: str
    """What a field's number is, with its unit."""
    columns: tuple[str, ...]
    """Labels along x, from left to right."""
    rows: tuple[str, ...]
    """Labels along y, from top to bottom."""
    values: tuple[tuple[float | None, ...], ...]
    """By row; None where nothing was measured."""
    low: float = 0.0
    high: float = 1.0
    """Ends of the colour scale."""
    note: str = ""
    """What one must know to read it."""


def point(x: float, values: Sequence[float], at_least: bool = False) -> Point:
    """The median of some measurements, and their range."""
    return Point(x, median(values), min(values), max(values), at_least)


def installed() -> bool:
    """Whether plots can be drawn here."""
    return find_spec("matplotlib") is not None


def draw(plot: Plot | HeatMap, subtitle: str, format_: Literal["png", "svg"]) -> bytes:
    """The content of a plot's file.

    Raises:
        LoramemError: matplotlib is not installed.
    """
    # Names out of results are text, whatever dollar signs they have.
    return render(lambda: figure(plot, subtitle), format_, text_parse_math=False)


def figure(plot: Plot | HeatMap, subtitle: str = "") -> "Figure":
    """A plot, drawn; the subtitle says where it was measured."""
    from matplotlib.figure import Figure

    if isinstance(plot, HeatMap):
        drawn = Figure((max(INCHES[0], 2.2 + 0.55 * len(plot.columns)), 1.8 + 0.34 * len(plot.rows)), DPI)
        drawn.set_layout_engine("constrained")
        _title(axes := drawn.add_subplot(), plot, subtitle)
        _draw_fields(axes, plot)
        return drawn
    bars = sum(len(series.points) for series in plot.series)
    inches = (BARS_INCHES, max(3.0, HEAD_INCHES + BAR_INCHES * bars)) if plot.kind == "bar" else INCHES
    drawn = Figure(inches, DPI, layout="constrained")
    axes = drawn.add_subplot()
    _title(axes, plot, subtitle)
    if plot.kind == "bar":
        _draw_bars(axes, plot)
    else:
        _draw_points(axes, plot)
    axes.grid(color="#dddddd", axis="x" if plot.kind == "bar" else "both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if any(one.at_least for series in plot.series for one in series.points):
        handles.append(_bound(plot.kind))
    if len(handles) > 1:
        columns = max(1, min(5, LEGEND_LETTERS // max(len(str(handle.get_label())) for handle in handles)))
        drawn.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
    return drawn


def _title(axes: "Axes", plot: Plot | HeatMap, subtitle: str) -> None:
    axes.set_title(f"{plot.title}\n", loc="left", fontsize="large")
    axes.annotate(subtitle, (0, 1), (0, 6), "axes fraction", "offset points", color="#555555", fontsize="small")


def _draw_fields(axes: "Axes", plot: HeatMap) -> None:
    grid = [[math.nan if value is None else value for value in row] for row in plot.values]
    image = axes.imshow(grid, cmap="cividis", vmin=plot.low, vmax=plot.high, aspect="auto")
    axes.set_xticks(range(len(plot.columns)), plot.columns)
    axes.set_yticks(range(len(plot.rows)), plot.rows)
    axes.set(xlabel=plot.x.label, ylabel=plot.y.label)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, label=plot.value)
    if len(plot.columns) > MOST_LABELLED:
        return
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            # cividis is dark at its lower end
            color = "white" if value < (plot.low + plot.high) / 2 else "black"
            text = "–" if math.isnan(value) else _number(value)
            axes.annotate(text, (column, row), ha="center", va="center", color=color, fontsize="small")


def _draw_bars(axes: "Axes", plot: Plot) -> None:
    height = 0.8 / len(plot.series)
    for place, (series, color) in enumerate(zip(plot.series, itertools.cycle(COLORS))):
        shift = (place - (len(plot.series) - 1) / 2) * height
        label: str | None = series.name
        for one in series.points:
            at = one.x + shift
            hatch = HATCH if one.at_least else None
            axes.barh(at, one.y, height, color=color, edgecolor="white", hatch=hatch, label=label)
            label = None
            if one.low < one.high:
                axes.plot([one.low, one.high], [at, at], color="black", linewidth=1.2, marker="|", markersize=5)
            text = f"{'> ' if one.at_least else ''}{_number(one.y)}"
            axes.annotate(text, (one.high, at), (4, 0), textcoords="offset points", va="center", fontsize="small")
    ends = [end for series in plot.series for one in series.points for end in (one.low, one.high)]
    axes.set_yticks(range(len(plot.names)), plot.names)
    axes.invert_yaxis()
    axes.set_xlabel(plot.y.label)
    if plot.y.log and min(ends) > 0:
        axes.set_xscale("log")
        axes.set_xlim(0.5 * min(ends), max(ends) * (max(ends) / min(ends)) ** 0.15 * 1.3)
        _label_log(axes.xaxis, axes.get_xlim())
    else:
        axes.xaxis.set_major_formatter(_plainly)
        axes.set_xlim(0, 1.15 * max(ends) or 1)


def _draw_points(axes: "Axes", plot: Plot) -> None:
    line = "-" if plot.kind == "line" else "none"
    for series, color, marker in zip(plot.series, itertools.cycle(COLORS), itertools.cycle(MARKERS)):
        x, y = ([getattr(one, name) for one in series.points] for name in "xy")
        spread = [[one.y - one.low for one in series.points], [one.high - one.y for one in series.points]]
        look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "capsize": 3}
        axes.errorbar(x, y, spread if any(map(any, spread)) else None, label=series.name, **look)
        bounds = [one for one in series.points if one.at_least]
        axes.plot([one.x for one in bounds], [one.y for one in bounds], marker, color=color, mfc="white")
    across, up = (sorted({getattr(one, name) for s in plot.series for one in s.points}) for name in "xy")
    if plot.diagonal:
        ends = [min(across[0], up[0]), max(across[-1], up[-1])]
        axes.plot(ends, ends, color=GREY, linewidth=1, label=plot.diagonal, zorder=1)
    axes.set(xlabel=plot.x.label, ylabel=plot.y.label)
    if plot.x.log and across[0] > 0:
        axes.set_xscale("log")
        _label_log(axes.xaxis, axes.get_xlim(), across)
    if plot.y.log and up[0] > 0:
        axes.set_yscale("log")
        _label_log(axes.yaxis, axes.get_ylim())
    else:
        axes.yaxis.set_major_formatter(_plainly)
        lowest = min(one.low for series in plot.series for one in series.points)
        highest = max(one.high for series in plot.series for one in series.points)
        axes.set_ylim(1.1 * min(lowest, 0), 1.1 * max(highest, 0) or (0 if lowest < 0 else 1))


def _bound(kind: str) -> "Artist":
    """What the legend shows for values that would be higher."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    label = "stopped: a lower bound"
    if kind == "bar":
        return Patch(facecolor=GREY, edgecolor="white", hatch=HATCH, label=label)
    return Line2D([], [], color=GREY, marker="o", mfc="white", linestyle="none", label=label)


def _label_log(axis: "DrawnAxis", limits: tuple[float, float], measured: Sequence[float] = ()) -> None:
    """Label a logarithmic axis with plain numbers: the few that were measured, or round ones."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    if 0 < len(measured) <= TICKS:
        axis.set_major_locator(FixedLocator(list(measured)))
    else:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if limits[1] / limits[0] < 1000 else (1,)))
    axis.set_major_formatter(_plainly)
    axis.set_minor_formatter(NullFormatter())


def _plainly(value: float, _: object) -> str:
    return f"{value:,.10g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
