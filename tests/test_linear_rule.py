"""The linear-rule suite: its pairs, how answers are scored, intervals, and tiny cells."""

from pathlib import Path
from typing import Any

import pytest

from loramem.errors import InputError
from loramem.suites import figures, linear_rule
from loramem.suites.linear_rule import Cell, pairs, rule
from loramem.suites.runner import SuiteOptions


@pytest.mark.parametrize(("x", "y", "value"), [(0, 0, 7), (1, 0, 10), (0, 1, 12), (2, 3, 28), (99, 99, 799)])
def test_the_rule_by_hand(x: int, y: int, value: int) -> None:
    assert rule(x, y) == value


def test_pairs_are_seeded_and_no_pair_is_both_trained_and_unseen() -> None:
    trained, unseen = pairs(100, 200, seed=1)
    assert (trained, unseen) == pairs(100, 200, seed=1)
    assert trained != pairs(100, 200, seed=2)[0]
    assert len({record.key for record in trained + unseen}) == 300
    assert pairs(40, 200, seed=1) == (trained[:40], unseen)
    for record in trained + unseen:
        x, y = map(int, record.key.removeprefix("f(").removesuffix(") =").split(", "))
        assert int(record.value) == 3 * x + 5 * y + 7


def test_more_pairs_than_there_are_is_refused() -> None:
    assert len(pairs(9_800, 200, seed=0)[0]) == 9_800
    with pytest.raises(InputError, match="There are 10,000 pairs"):
        pairs(9_801, 200, seed=0)


def test_errors_are_those_of_answers_that_are_numbers() -> None:
    values, texts = [10, 20, 30, 40, 50], ["10", "25", "-30", "", "1 000"]
    assert linear_rule.errors(values, texts) == {"records": 5, "parsed": 2, "mean_error": 2.5}
    assert linear_rule.errors([7], ["12345"]) == {"records": 1, "parsed": 0, "mean_error": None}


def test_the_error_of_the_mean_by_hand() -> None:
    assert linear_rule.error_of_mean([10, 20, 60], [30, 20, 0]) == pytest.approx((0 + 10 + 30) / 3, abs=0.01)


def test_the_interval_is_that_of_the_textbook() -> None:
    # t(0.975, 4) = 2.776 (printed tables); the standard deviation of 1 to 5 is √2.5
    assert linear_rule.half_width([1, 2, 3, 4, 5]) == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=1e-3)
    assert linear_rule.half_width([4.0, 4.0, 4.0]) == 0
    assert linear_rule.half_width([4.0]) is None


def test_five_seeds_of_three_methods_at_five_ranks() -> None:
    cells = list(linear_rule.cells(SuiteOptions(), lambda cell: {}))
    assert len({str(cell.identity) for cell in cells}) == 75
    assert {cell.method for cell in cells} == {"sft", "memft-ot", "memft-sw"}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert {cell.unit for cell in cells} == {"branch"}


def test_options_choose_the_cells_and_the_writer_has_layers_of_its_own() -> None:
    request = SuiteOptions(records=(8,), ranks=(3,), methods=("sft", "loramem"), seeds=1, unit="down_proj", layer=2)
    (sft, ours) = linear_rule.cells(request, lambda cell: {})
    assert (sft.trained, sft.rank, sft.unit, sft.layer) == (8, 3, "down_proj", 2)
    assert (ours.unit, ours.layer) == ("down_proj", None)


def line(method: str, rank: int, seed: int, memory: int, unseen: int, parsed: int = 20) -> dict[str, Any]:
    cell = {"method": method, "rank": rank, "trained": 40, "unseen": 20, "unit": "branch", "layer": None, "seed": seed}
    result = {
        "seconds": 2.0, "steps": 5, "visits": 9, "parameters": 512 * rank, "error_of_mean": 150.0,
        "placement": "branch of layer 4",
        "memory": {"records": 40, "exact": memory, "parsed": 40, "mean_error": 0.0},
        "generalisation": {
            "records": 20, "exact": unseen, "parsed": parsed, "mean_error": 10.0 + seed if parsed else None
        },
    }  # fmt: skip
    return {"cell": cell, "result": result}


def test_a_row_is_the_mean_over_seeds_with_its_interval_beside_the_paper() -> None:
    table = linear_rule.table([line("sft", 2, 0, 40, 4), line("sft", 2, 1, 36, 4), line("sft", 2, 2, 38, 4)])
    (row,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    # 100, 90 and 95 %: t(0.975, 2) = 4.303, standard deviation 5
    assert row["memory, %"] == f"95.0 ± {4.303 * 5 / 3**0.5:.1f}"
    assert row["generalisation, %"] == "20.0 ± 0.0"
    assert (row["seeds"], row["parameters"], row["mean error"]) == ("3", "1,024", "11.0")
    assert (row["paper: memory, %"], row["paper: generalisation, %"]) == ("100", "38")


def test_methods_are_compared_on_the_same_pairs() -> None:
    lines = [line("sft", 1, seed, 20 + seed, 2, parsed=0) for seed in range(3)]
    lines += [line("memft-ot", 1, seed, 24 + seed, 2) for seed in range(4)]  # the fourth has no counterpart
    notes = " ".join(linear_rule.table(lines).notes)
    assert "Memory of memft-ot minus sft, 40 pairs, percentage points: rank 1 +10.0 ± 0.0." in notes
    assert "minus sft" not in " ".join(linear_rule.table(lines[3:]).notes)
    assert [row[9] for row in linear_rule.table(lines).rows] == ["-", "11.5"]


def test_the_plots_show_means_with_intervals_that_end_at_all_pairs() -> None:
    memory, generalisation = linear_rule.plots(
        [
            line("sft", 2, 0, 40, 4),
            line("sft", 2, 1, 36, 2),
            line("memft-ot", 1, 0, 40, 4),
            line("memft-ot", 2, 0, 8, 4),
        ]
    )
    assert (memory.name, generalisation.name) == ("memory", "generalisation")
    sft, ot = memory.series
    assert (sft.name, ot.name) == ("sft", "memft-ot")
    (point,) = sft.points
    assert (point.x, point.y, point.high) == (2, 95.0, 100.0)
    assert 0 < point.low < 90
    assert [(one.x, one.y, one.low, one.high) for one in ot.points] == [(1, 100, 100, 100), (2, 20, 20, 20)]
    pytest.importorskip("matplotlib")
    for plot in (memory, generalisation):
        assert figures.draw(plot, "here", "png").startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["sft", "memft-sw", "loramem"])
def test_a_tiny_cell_remembers_its_pairs(base: Path, method: str) -> None:
    result = linear_rule.run(Cell(method, 8, 4, 3, "branch", None, 0, str(base), "cpu"))
    assert result["memory"]["records"] == 4
    assert result["memory"]["exact"] == result["memory"]["parsed"] == 4
    assert result["memory"]["mean_error"] == 0
    assert result["generalisation"]["records"] == 3
    assert result["generalisation"]["exact"] < 3
    assert result["parameters"] == pytest.approx(2 * 64 * 8, rel=0.1)
