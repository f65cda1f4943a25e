"""The law suite: a run is made once, one that ships is read, and the fits stand beside the published ones."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from scipy.stats import t as student_t

from loramem.errors import InputError
from loramem.planning import calibrate
from loramem.planning.law_tables import FittedRuns, fit_groups
from loramem.planning.runs import Run, append_run, read_runs, shipped_file
from loramem.suites import memory_law
from loramem.suites.figures import HeatMap, Plot
from loramem.suites.runner import SuiteOptions

from . import planning_samples as samples

RUN = replace(samples.RUN, modules=("o_proj",))


def made(kind: str, offset: float = 0.0) -> list[Run]:
    """Runs that follow ΔL = 9·r^0.4·ℓ^−0.3 + offset exactly, and one that is saturated."""
    runs = [
        replace(RUN, kind=kind, rank=r, length=n, parameters=r, final_loss=12 - 9 * r**0.4 * n**-0.3 - offset)
        for r in (1, 2, 4)
        for n in (200, 400, 800)
    ]
    return [*runs, replace(RUN, kind=kind, rank=8, length=200, final_loss=0.5)]


def lines(*runs: Run, shipped: bool = False) -> list[dict]:
    return [{"cell": {"kind": run.kind}, "result": {"run": asdict(run), "shipped": shipped}} for run in runs]


# Cells


def test_the_grid_is_the_one_that_ships() -> None:
    cells = {(cell.kind, cell.length, cell.rank) for cell in memory_law.cells(SuiteOptions(), lambda _: {})}
    shipped = [run for run in read_runs(shipped_file()) if run.modules == ("o_proj",)]
    assert cells == {(run.kind, run.length, run.rank) for run in shipped if run.seed == 0}
    assert len(cells) == 120


def test_ranks_and_lengths_take_the_place_of_the_grid_s() -> None:
    cells = list(memory_law.cells(SuiteOptions(ranks=(2,), lengths=(50, 70), seeds=2), lambda _: {}))
    assert {(cell.length, cell.rank, cell.seed) for cell in cells} == {(n, 2, s) for n in (50, 70) for s in (0, 1)}
    assert {cell.kind for cell in cells} == {"phonebook", "text", "mixed", "random"}
    assert max(cell.length for cell in memory_law.cells(SuiteOptions(paper=True), lambda _: {})) == 32_000
    (down, *_) = memory_law.cells(SuiteOptions(unit="down_proj", layer=1), lambda _: {})
    assert (down.module, down.layer) == ("down_proj", 1)
    with pytest.raises(InputError, match="down_proj"):
        list(memory_law.cells(SuiteOptions(unit="branch"), lambda _: {}))


# A run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that stop early: what a run is, not what it comes to."""
    monkeypatch.setattr(calibrate, "IDLE_PASSES", 2)
    monkeypatch.setattr(calibrate, "IDLE_STEPS", 4)


def cell(base: Path, **fields: object) -> memory_law.Cell:
    known = {"kind": "phonebook", "length": 30, "rank": 2, "module": "o_proj", "layer": None, "seed": 0}
    return memory_law.Cell(**{**known, **fields}, model=str(base), device="cpu")


class Failing:
    """In the place of what makes a run."""

    def __init__(self, *_: object, **__: object) -> None:
        pytest.fail("made")

    of = __init__


def test_a_run_that_ships_is_read_and_any_other_made(
    base: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = memory_law.run(cell(base))
    run = Run.of(json.loads(json.dumps(result))["run"])
    assert not result["shipped"]
    assert (run.rank, run.length, run.records, run.modules, run.layers) == (2, 30, 3, ("o_proj",), (2,))
    assert 0 < run.final_loss < run.base_loss

    append_run(tmp_path / "shipped.jsonl", replace(run, final_loss=0.125))
    monkeypatch.setattr(memory_law, "shipped_file", lambda: tmp_path / "shipped.jsonl")
    again = memory_law.run(cell(base))
    assert again["shipped"]
    assert again["run"]["final_loss"] == 0.125

    for name in ("train_adapter", "FeatureSample"):
        monkeypatch.setattr(calibrate, name, Failing)
    for other in ({"rank": 1}, {"length": 40}, {"seed": 1}, {"layer": 1}, {"module": "down_proj"}):
        with pytest.raises(pytest.fail.Exception, match="made"):
            memory_law.run(cell(base, **other))


def test_a_module_or_layer_that_is_not_there_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"layers are 0 to 2, not 9.*--layer"):
        memory_law.run(cell(base, layer=9))


# Tables


def test_a_kind_has_its_law_beside_the_published_fits() -> None:
    table = memory_law.table(lines(*made("random")))
    (row,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert row["runs"] == "random, o_proj of layers 4, tiny"
    assert (row["C"], row["α"], row["β"], row["R²"], row["MAPE %"]) == ("9", "0.400", "0.300", "1.0000", "0.0")
    assert (row["points"], row["saturated"]) == ("9", "1")
    assert (row["R², Llama"], row["R², Qwen"], row["MAPE %, Llama"], row["MAPE %, Qwen"]) == (
        "0.996", "0.996", "2.6", "3.5",
    )  # fmt: skip
    assert table.notes[0].startswith("10 runs were made here; 0 ship")
    assert len(table.notes) == 2  # nothing is said of a combination that nobody asked for


def test_mixtures_are_combined_with_one_b() -> None:
    table = memory_law.table(lines(*made("random"), *made("text", 1.5), shipped=True))
    rows = {row[0].rpartition(", o_proj")[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert set(rows) == {"random", "text", "mixtures, one b"}
    assert float(rows["mixtures, one b"]["R²"]) < 0.5
    assert rows["mixtures, one b"]["R², Qwen"] == "0.983"
    assert table.notes[0].startswith("0 runs were made here; 20 ship")


def test_a_kind_without_a_law_is_named_and_still_drawn() -> None:
    short = lines(*made("phonebook")[:3])
    table = memory_law.table(short)
    assert table.rows == ()
    assert any("phonebook, o_proj" in note and "Measure" in note for note in table.notes)
    assert [type(plot) for plot in memory_law.plots(short)] == [HeatMap, Plot]


def test_shipped_runs_give_the_table_of_the_documentation() -> None:
    runs = [run for run in read_runs(shipped_file()) if run.modules == ("o_proj",)]
    table = memory_law.table(lines(*runs, shipped=True))
    fits = {row[0].partition(",")[0]: row for row in table.rows if not row[0].startswith("mixtures")}
    documented = (Path(__file__).parent.parent / "docs" / "lab" / "law.md").read_text()
    for kind, row in fits.items():
        shown = " | ".join((*row[:5], *row[9:17]))
        assert f"| {shown} |" in documented, kind


def test_half_widths_are_student_s_times_the_standard_errors() -> None:
    noisy = [replace(run, final_loss=run.final_loss + 0.05 * (-1) ** i) for i, run in enumerate(made("random"))]
    (one,), _ = fit_groups([("noisy", noisy)])
    widths = one.law.half_widths(0.9)
    errors = [one.law.covariance[i][i] ** 0.5 for i in range(4)]
    assert widths == pytest.approx([student_t.ppf(0.95, 9 - 4) * error for error in errors])
    assert min(widths) > 0


def test_groups_without_a_law_say_why() -> None:
    fitted, remarks = fit_groups([("few", made("random")[:2]), ("enough", made("text"))])
    assert [one.name for one in fitted] == ["enough"]
    assert any(remark.startswith("few: ") for remark in remarks)


def test_what_lies_beyond_half_the_lengths_is_predicted_where_it_can_be() -> None:
    (one,), _ = fit_groups([("text", made("text"))])
    assert one.held_out_mape == pytest.approx(0, abs=0.01)
    assert FittedRuns("text", one.law, made("text")[:4]).row[7] == "-"


def test_means_over_seeds_have_columns_of_their_own() -> None:
    """The second text is easier by as much as the third is harder."""
    runs = [replace(run, seed=s, base_loss=12 + d) for s, d in enumerate((0, 0.4, -0.4)) for run in made("text")]
    (one,), _ = fit_groups([("text", runs)])
    assert one.held_out_mape is not None
    assert one.held_out_mape > 5
    assert one.row[8:11] == ("1.0000", "0.0", "0.0")
    assert FittedRuns("text", one.law, made("text")).row[8:11] == ("-",) * 3


# Plots


def test_figure_two_has_every_unsaturated_run_on_the_diagonal() -> None:
    predicted, *others = memory_law.plots(lines(*made("random"), *made("text", 1.5)))
    assert isinstance(predicted, Plot)
    assert [series.name for series in predicted.series] == ["random", "text"]
    assert [len(series.points) for series in predicted.series] == [9, 9]
    assert all(one.x == pytest.approx(one.y, rel=1e-3) for series in predicted.series for one in series.points)
    assert [plot.name for plot in others] == ["loss-random", "reduction-random", "loss-text", "reduction-text"]


def test_the_heat_map_has_ranks_upwards_and_gaps_where_nothing_ran() -> None:
    _, losses, reductions = memory_law.plots(lines(*made("random")))
    assert isinstance(losses, HeatMap)
    assert (losses.rows, losses.columns) == (("8", "4", "2", "1"), ("200", "400", "800"))
    assert losses.values[0] == (0.5, None, None)
    assert losses.values[3][0] == pytest.approx(12 - 9 * 200**-0.3)
    assert (losses.low, losses.high) == (0.5, pytest.approx(12 - 9 * 800**-0.3))
    assert isinstance(reductions, Plot)
    assert [series.name for series in reductions.series] == ["rank 1", "rank 2", "rank 4", "rank 8"]


def test_placements_do_not_share_a_plot() -> None:
    elsewhere = [replace(run, layers=(5,)) for run in made("random")]
    predicted, *others = memory_law.plots(lines(*made("random"), *elsewhere))
    assert isinstance(predicted, Plot)
    assert len(predicted.series) == 2
    assert len({plot.name for plot in others}) == 4
