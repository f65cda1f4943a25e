"""What the figures of a law show is what was measured and what the law says; files are whole or not made."""

import math
import struct
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from loramem.errors import LawError, LoramemError
from loramem.planning.law import Point
from loramem.planning.law_fit import fit
from loramem.planning.plots import (
    Grid,
    Prediction,
    boundary,
    draw_law,
    draw_plan,
    law_figure,
    mean_grid,
    plan_figure,
    plane,
    plane_points,
    predictions,
)

from . import planning_samples as samples

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")


@dataclass(frozen=True)
class Run:
    rank: int
    length: int
    base_loss: float
    final_loss: float
    ordered: float = 0.0


LAW = replace(samples.LAW, r_squared=0.98765, mape=3.21, dropped=2, reduction_range=(1.0, 4.0))

# loramem calibrate --kind random --modules down_proj --layers 4, on loramem-tiny with torch 2.13.0 on a CPU:
# rank, length, base loss, final loss, ordered.
MEASURED = [
    Run(*row)
    for row in (
        (1, 1600, 12.521, 8.473, 0.0),
        (2, 1600, 12.521, 7.777, 0.0006),
        (3, 1600, 12.521, 7.116, 0.0006),
        (4, 1600, 12.521, 6.381, 0.0019),
        (6, 1600, 12.521, 5.509, 0.0019),
        (1, 400, 12.692, 7.801, 0.0),
        (2, 400, 12.692, 6.212, 0.0),
        (3, 400, 12.692, 4.616, 0.0),
        (1, 800, 12.6, 8.186, 0.0012),
        (2, 800, 12.6, 6.907, 0.0012),
        (3, 800, 12.6, 5.619, 0.0012),
        (4, 800, 12.6, 4.864, 0.0025),
        (6, 800, 12.6, 3.282, 0.0075),
    )
]
SATURATED = [Run(4, 400, 4.0, 0.6, 0.75), Run(8, 400, 4.0, 0.1, 0.98)]


# --- what is drawn


def test_the_plane_is_the_law_in_logarithms() -> None:
    assert plane(LAW, math.log(4), math.log(900)) == pytest.approx(math.log(2))  # 30 · 2 / 30
    for rank in (1, 3, 16):
        for length in (100, 777, 5000):
            assert math.exp(plane(LAW, math.log(rank), math.log(length))) + 1 == pytest.approx(
                LAW.predict(rank, length)
            )


def test_points_beside_the_plane_are_the_unsaturated_runs_above_b() -> None:
    runs = [
        Run(4, 900, 8.0, 4.5),
        Run(2, 100, 3.69, 0.69),  # at the threshold: fitted
        Run(8, 100, 8.0, 0.689),  # saturated
        Run(1, 900, 8.0, 7.0),  # ΔL = b has no logarithm
        Run(1, 800, 8.0, 7.5),
    ]
    assert plane_points(runs, LAW) == [
        pytest.approx((math.log(4), math.log(900), math.log(2.5))),
        pytest.approx((math.log(2), math.log(100), math.log(2.0))),
    ]


def test_predictions_are_the_law_s_with_its_interval_and_say_what_was_not_fitted() -> None:
    usual, saturated = predictions([Run(4, 900, 8.0, 4.5), Run(9, 100, 8.0, 0.5)], LAW)
    assert (usual.measured, usual.predicted) == pytest.approx((3.5, 3.0))
    assert (usual.low, usual.high) == pytest.approx((3 - 0.2015, 3 + 0.2015), abs=1e-5)
    assert (saturated.measured, saturated.predicted) == pytest.approx((7.5, 10.0))
    assert isinstance(usual, Prediction) and not usual.saturated and saturated.saturated


def test_a_grid_has_the_mean_over_seeds_and_nan_where_nothing_ran() -> None:
    runs = [Run(10, 400, 9, 5.0), Run(2, 400, 9, 3.0), Run(2, 400, 9, 4.0), Run(2, 400, 9, 8.0), Run(2, 1000, 9, 7.0)]
    for order in (runs, runs[::-1]):
        grid = mean_grid(order, lambda run: run.final_loss)
        assert (grid.ranks, grid.lengths) == ((2, 10), (400, 1000))
        assert grid.values[0] == (5.0, 5.0)
        assert grid.values[1][0] == 7.0 and math.isnan(grid.values[1][1])
    assert mean_grid(runs, lambda run: run.rank).values[0] == (2, 10)


def test_the_boundary_runs_between_cells_on_either_side_and_not_beside_missing_ones() -> None:
    nan = math.nan
    grid = Grid((1, 2, 4), (100, 200), ((2.0, 0.5, nan), (3.0, 0.69, 0.1)))
    assert sorted(boundary(grid, 0.69)) == [
        ((0.5, -0.5), (0.5, 0.5)),  # 2.0 | 0.5
        ((0.5, 0.5), (1.5, 0.5)),  # 0.5 below 0.69, which is not saturated
        ((1.5, 0.5), (1.5, 1.5)),  # 0.69 | 0.1
    ]
    assert boundary(grid, 0.01) == boundary(grid, 5.0) == []


def test_every_calibration_run_has_what_is_drawn() -> None:
    import loramem.planning.calibrate

    assert {field.name for field in fields(Run)} <= {field.name for field in fields(loramem.planning.calibrate.Run)}


# --- how


@needs_matplotlib
def test_the_law_s_figure_shows_these_numbers() -> None:
    import numpy as np

    runs = [*MEASURED, *SATURATED]
    law = fit([Point(run.rank, run.length, run.base_loss, run.final_loss) for run in runs])
    figure = law_figure(runs, law, "a $ and a title")
    space, beside, losses, loss_bar, ordered, ordered_bar = figure.axes
    assert figure.get_suptitle() == "a $ and a title"
    assert [bar.get_ylabel() for bar in (loss_bar, ordered_bar)] == ["nats per token", "% of tokens"]

    stems = [line.get_data_3d() for line in space.lines]
    assert [(x[1], y[1], z[1]) for x, y, z in stems] == plane_points(MEASURED, law)
    assert all(z[0] == plane(law, x[0], y[0]) and x[0] == x[1] and y[0] == y[1] for x, y, z in stems)
    assert [label.get_text() for label in space.get_xticklabels()] == ["1", "2", "3", "4", "6"]
    assert [label.get_text() for label in space.get_yticklabels()] == ["400", "800", "1600"]

    for bars, members in zip(beside.containers, (MEASURED, SATURATED), strict=True):
        line, _, (spans,) = bars.lines
        found = predictions(members, law)
        assert list(line.get_xdata()) == [one.measured for one in found]
        assert list(line.get_ydata()) == [one.predicted for one in found]
        assert [tuple(span[:, 1]) for span in spans.get_segments()] == [pytest.approx((o.low, o.high)) for o in found]
    assert line.get_markerfacecolor() == "white"
    said = [text.get_text() for text in beside.get_legend().get_texts()]
    assert sorted(said) == ["fitted", "not fitted: final loss < 0.69", "predicted = measured"]
    assert beside.texts[0].get_text() == f"R² = {law.r_squared:.4f}\nMAPE = {law.mape:.1f} %\n13 fitted runs"

    # Final losses with 400, 800 and 1600 tokens at ranks 1, 2, 3, 4, 6, 8.
    drawn = losses.images[0].get_array().filled(np.nan)
    assert drawn[0].tolist() == [7.801, 6.212, 4.616, 0.6, pytest.approx(np.nan, nan_ok=True), 0.1]
    assert drawn[1:, :5].tolist() == [[8.186, 6.907, 5.619, 4.864, 3.282], [8.473, 7.777, 7.116, 6.381, 5.509]]
    assert np.isnan(drawn[1:, 5]).all()
    assert ordered.images[0].get_array()[0, [3, 5]].tolist() == pytest.approx([75, 98])
    assert [text.get_text() for text in losses.texts][:5] == ["7.80", "6.21", "4.62", "0.60", "0.10"]
    for axes in (losses, ordered):
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4", "6", "8"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["400", "800", "1600"]
        assert axes.get_title().endswith("; line: loss 0.69; hatched: no run")
        edges = [[tuple(map(float, end)) for end in edge] for edge in axes.collections[-1].get_segments()]
        assert edges == [[(2.5, -0.5), (2.5, 0.5)], [(2.5, 0.5), (3.5, 0.5)]]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (space, beside, losses, ordered))


@needs_matplotlib
def test_a_large_grid_has_no_numbers_and_not_every_label() -> None:
    runs = [Run(rank, length, 8.0, 4.0) for rank in range(1, 31) for length in (100, 200, 300)]
    axes = law_figure(runs, LAW, "large").axes[2]
    assert not axes.texts and axes.get_title() == "Final loss"
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(rank) for rank in range(1, 31, 3)]


@needs_matplotlib
def test_runs_that_are_all_saturated_are_drawn_beside_the_plane_of_the_law() -> None:
    figure = law_figure(SATURATED, LAW, "saturated")
    assert not figure.axes[0].lines and len(figure.axes[1].containers) == 1


@needs_matplotlib
def test_the_plan_shows_the_loss_of_every_rank_its_interval_and_the_named_ranks() -> None:
    axes = plan_figure(LAW, 8.0, 400, {"law": 4, "recommended": 25, "again": 25}, "a title").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    x, loss = lines["law, extrapolated"].get_data()
    assert list(loss) == pytest.approx([7 - 1.5 * math.sqrt(rank) for rank in x])  # 8 − (30 · √r / 20 + 1)
    assert (x[0], x[-1]) == pytest.approx((1 / 1.2, 30))
    known = lines["law"].get_ydata()  # ranks 1 to 16 were measured, and ΔL up to 4 ± 2 σ: that is rank 4.55
    assert [rank for rank, y in zip(x, known, strict=True) if not math.isnan(y)] == [r for r in x if 1 <= r <= 4.551]
    (band,) = axes.collections
    outline = band.get_paths()[0].vertices
    assert outline[:, 1].max() == pytest.approx(7 - 1.5 * math.sqrt(1 / 1.2) + 0.2015, abs=1e-4)
    assert outline[:, 1].min() == pytest.approx(7 - 1.5 * math.sqrt(30) - 0.2015, abs=1e-4)
    assert list(lines["0.69: no law below"].get_ydata()) == [0.69, 0.69]
    assert list(lines["before training: 8"].get_ydata()) == [8.0, 8.0]
    marked = [(label, line.get_xdata()[0]) for label, line in lines.items() if ": rank" in label]
    assert marked == [("law: rank 4", 4), ("recommended: rank 25", 25), ("again: rank 25", 25)]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [pytest.approx((4, 4.0)), pytest.approx((25, -0.5)), pytest.approx((25, -0.5))]


# --- files


def law_to(path: Path) -> None:
    draw_law([*MEASURED, *SATURATED], LAW, "a law", path)


def plan_to(path: Path) -> None:
    draw_plan(LAW, 8.0, 400, {"law": 4}, "a plan", path)


@needs_matplotlib
@pytest.mark.parametrize(("draw", "pixels"), [(law_to, (1950, 1650)), (plan_to, (1200, 750))])
def test_a_png_has_its_size_whatever_the_user_s_settings_and_is_replaced_whole(
    draw: Callable[[Path], None], pixels: tuple[int, int], tmp_path: Path
) -> None:
    import matplotlib
    from matplotlib.image import imread

    path = tmp_path / "new folder" / "figure.png"
    draw(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == pixels
    image = imread(path)
    assert image[..., :3].std() > 0.1 and (image[..., :3].min(axis=2) < 0.99).mean() > 0.02
    path.write_bytes(b"older")
    with matplotlib.rc_context({"savefig.bbox": "tight", "font.size": 30}):
        draw(path)
        assert matplotlib.rcParams["font.size"] == 30
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


@needs_matplotlib
def test_svg_and_pdf_are_made_too_and_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg", "one.pdf", "two.pdf"):
        plan_to(tmp_path / name)
    assert xml.etree.ElementTree.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    for suffix in ("svg", "pdf"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


# --- refusals


@pytest.mark.parametrize("draw", [law_to, plan_to])
@pytest.mark.parametrize("name", ["figure.jpg", "figure", "figure.PNG"])
def test_another_suffix_is_refused_before_anything_is_drawn(
    draw: Callable[[Path], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoramemError, match=r"must end in \.png, \.svg, \.pdf, not '(\.jpg||\.PNG)'"):
        draw(tmp_path / "folder" / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("draw", [law_to, plan_to])
def test_without_matplotlib_one_line_says_what_to_install(
    draw: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoramemError) as error:
        draw(tmp_path / "figure.png")
    assert str(error.value) == "Figures need matplotlib, which is not installed: pip install 'loramem[plots]'"
    assert not list(tmp_path.iterdir())


@needs_matplotlib
def test_what_makes_no_figure_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    with pytest.raises(LawError, match="no runs to draw"):
        draw_law([], LAW, "nothing", path)
    for base_loss in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LawError, match="base loss must be a positive number"):
            draw_plan(LAW, base_loss, 400, {}, "no base loss", path)
    for rank in (0, -1, math.nan, math.inf):
        with pytest.raises(LawError, match="rank must be a positive number"):
            draw_plan(LAW, 8.0, 400, {"wrong": rank}, "no rank", path)
    with pytest.raises(LawError, match="length must be a positive number"):
        draw_plan(LAW, 8.0, 0, {}, "no length", path)
    assert not list(tmp_path.iterdir())


@needs_matplotlib
def test_importing_costs_nothing_and_drawing_needs_neither_torch_nor_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom loramem.planning.law import MemoryLaw\n"
        "from loramem.planning.plots import draw_plan\n"
        "assert not {'matplotlib', 'numpy', 'scipy'} & set(sys.modules)\n"
        "draw_plan(MemoryLaw.from_json(sys.argv[1]), 8.0, 400, {'law': 4}, 'a plan', Path(sys.argv[2]))\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, LAW.to_json(), str(tmp_path / "figure.png")], check=True)
