"""The phone-book suite: cells, equal parameters, how decoding is scored, a tiny cell of each method, the remarks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramem.errors import InputError, UnsupportedBaseModel
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.placement import Placement
from loramem.planning.samples import generate
from loramem.suites import figures, phonebook, phonebook_results, placements, scoring
from loramem.suites.paper_unit import PaperUnit
from loramem.suites.phonebook import Cell
from loramem.suites.placements import candidates, describe, equal_placement, first_within
from loramem.suites.runner import METHODS, SuiteOptions
from loramem.suites.timing import count_exact, lowest_probability

from .conftest import SHARED


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base), device="cpu")


def cell_of(model: str, method: str = "sft", **changes: Any) -> Cell:
    return replace(Cell(method, 40, 8, 0, "branch", None, 1, None, None, model, "cpu"), **changes)


def listed(**request: Any) -> list[Cell]:
    return list(phonebook.cells(SuiteOptions(**request), lambda cell: {}))


# Cells


def test_the_default_grid_has_every_method_at_every_length_rank_and_seed() -> None:
    cells = listed()
    assert len(cells) == 2 * 6 * 2 * 4
    assert {cell.method for cell in cells} == set(METHODS)
    assert len({json.dumps(cell.identity) for cell in cells}) == len(cells)


def test_the_published_grid_is_that_of_the_paper() -> None:
    cells = listed(paper=True)
    assert sorted({cell.length for cell in cells}) == [1000, 2000, 4000, 8000, 12_000, 16_000, 24_000, 32_000]
    assert sorted({cell.rank for cell in cells}) == [1, 2, 4, 8, 16, 32, 64]


def test_what_is_asked_for_is_taken() -> None:
    asked = {"lengths": (50,), "ranks": (3,), "seeds": 1, "methods": ("memft-ot",), "unit": "down_proj", "layer": 1}
    (cell,) = listed(**asked)
    assert (cell.length, cell.rank, cell.method, cell.unit, cell.layer, cell.cut) == (
        50,
        3,
        "memft-ot",
        "down_proj",
        1,
        1,
    )
    assert {cell.cut for cell in listed(quick=True)} == {10}


def write_file(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "book.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


PAPER_ROWS = [
    {"id": 7, "query": "Jerry Becerra:", "target": "9100672710", "target_len": 10},
    {"id": 8, "query": "Francisco Laramee:", "target": "6780438158", "target_len": 10},
]


def test_a_file_is_part_of_the_cell_and_its_place_is_not(tmp_path: Path) -> None:
    identities = []
    for number, rows in enumerate([PAPER_ROWS, PAPER_ROWS, PAPER_ROWS[:1]]):
        (folder := tmp_path / str(number)).mkdir()
        (cell,) = listed(data=write_file(folder, rows), methods=("sft",), ranks=(1,), lengths=(10,), seeds=1)
        identities.append(cell.identity)
    assert identities[0] == identities[1] != identities[2]
    assert str(tmp_path) not in json.dumps(identities)


def test_lengths_that_a_file_cannot_reach_are_left_out(tmp_path: Path) -> None:
    rows = [{"key": f"k{number}:", "value": str(6 * 10**9 + number)} for number in range(150)]
    assert {cell.length for cell in listed(data=write_file(tmp_path, rows))} == {1000}


def test_a_file_of_the_paper_and_one_s_own_are_read(tmp_path: Path) -> None:
    records = phonebook.file_records(write_file(tmp_path, PAPER_ROWS))
    assert [(record.key, record.value) for record in records] == [(r["query"], r["target"]) for r in PAPER_ROWS]
    (record,) = phonebook.file_records(write_file(tmp_path, [{"key": "a", "value": "1"}]))
    assert (record.key, record.value) == ("a", "1")


@pytest.mark.skipif(not (SHARED / "data" / "phonebook").is_dir(), reason="the paper's files are not there")
def test_the_published_file_has_its_length_in_the_embedded_vocabulary() -> None:
    base = load_base_model(device="cpu")
    cell = cell_of("loramem-tiny", length=1000, file=SHARED / "data" / "phonebook" / "qwen_PB1000.jsonl")
    records = phonebook.encoded_records(base, cell)
    assert (len(records), sum(record.length for record in records)) == (100, 1000)


def test_the_first_records_of_a_file_are_taken_and_a_short_one_is_refused(loaded: BaseModel, tmp_path: Path) -> None:
    cell = cell_of("", length=11, file=write_file(tmp_path, [*PAPER_ROWS, {"query": "x:", "target": "12"}]))
    assert [record.record.key for record in phonebook.encoded_records(loaded, cell)] == [r["query"] for r in PAPER_ROWS]
    with pytest.raises(InputError, match=r"book.jsonl has 22 answer tokens .* 23 are asked for"):
        phonebook.encoded_records(loaded, replace(cell, length=23))


def test_generated_records_have_about_the_length(loaded: BaseModel) -> None:
    records = phonebook.encoded_records(loaded, cell_of("", length=390, seed=5))
    assert [record.record for record in records] == generate("phonebook", 40, 5)
    assert sum(record.length for record in records) == 400


# Equal parameters


@given(st.lists(st.integers(1, 10_000), max_size=8), st.integers(1, 100_000))
def test_the_first_placement_within_a_tenth_is_taken_at_its_nearest_rank(costs: list[int], budget: int) -> None:
    def error(cost: int) -> float:
        return min(abs(rank * cost - budget) for rank in (max(1, budget // cost), budget // cost + 1))

    found = first_within(costs, budget)
    fitting = [place for place, cost in enumerate(costs) if error(cost) <= 0.1 * budget]
    if found is None:
        assert fitting == []
    else:
        place, rank = found
        assert place == fitting[0]
        assert abs(rank * costs[place] - budget) == error(costs[place])


@pytest.mark.parametrize("kind", ["branch", "down_proj"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 32, 64])
def test_on_the_embedded_base_every_rank_has_an_equal_placement(kind: str, rank: int) -> None:
    model = load_base_model(device="cpu").model
    budget = PaperUnit(model, rank, 0, kind).parameter_count
    placement, ours = equal_placement(model, budget)
    assert Placement.named(model, placement.modules, placement.layers) == placement
    assert abs(ours * placement.parameters_per_rank(model) - budget) <= 0.1 * budget


def test_candidates_begin_where_writes_begin_and_exist(loaded: BaseModel) -> None:
    found = candidates(loaded.model)
    ladder = Placement.ladder(loaded.model)
    assert found[: len(ladder)] == ladder
    assert all(Placement.named(loaded.model, one.modules, one.layers) == one for one in found)
    assert len(set(found)) == len(found)
    assert [describe(one, Placement.default(loaded.model).modules) for one in found[:7]] == [
        "down_proj of layer 2",
        "down_proj, gate_proj, up_proj of layer 2",
        "down_proj, gate_proj, o_proj, up_proj of layer 2",
        "all linear modules of layers 1, 2",
        "all linear modules of layer 2",
        "down_proj of layers 1, 2",
        "o_proj of layer 2",
    ]


def test_where_nothing_is_equal_that_is_said(loaded: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "candidates", lambda model: [Placement.default(model)])
    with pytest.raises(UnsupportedBaseModel, match="costs 128 parameters within 10 %"):
        equal_placement(loaded.model, 128)


# Scores


def test_decoding_is_scored_by_record_and_by_token(loaded: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    records = phonebook.encoded_records(loaded, cell_of(""))

    def decode(model, records, batches):
        answers = [list(record.answer_ids[:-1]) for record in records]
        yield 0, answers[0]
        yield 1, [*answers[1], answers[1][0]]  # all right, but no end
        yield 2, answers[2][:4]  # ended early
        yield 3, [*answers[3][:9], records[0].answer_ids[-1] + 1]

    monkeypatch.setattr(scoring, "decode_records", decode)
    scored = scoring.score(loaded, records)
    assert (scored.exact, scored.token_accuracy) == (1, (10 + 10 + 4 + 9) / 40)
    assert scored.min_prob == lowest_probability(loaded, records)


def test_probabilities_are_scored_with_and_without_the_end_token(
    loaded: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = phonebook.encoded_records(loaded, cell_of("", length=20))
    found = [torch.tensor([0.5] * 10 + [1.0]), torch.tensor([0.25] * 5 + [0.75] * 5 + [0.51])]
    monkeypatch.setattr(scoring, "answer_probabilities", lambda *_: enumerate(found))
    scored = scoring.score(loaded, records)
    assert scored.ordered == round(7 / 22, 4)
    assert scored.min_prob == 0.25
    assert scored.loss == pytest.approx((10 * 0.693147 + 5 * 1.386294 + 5 * 0.287682) / 20, abs=1e-5)
    found[0][3] = float("nan")
    broken = scoring.score(loaded, records)
    assert (broken.min_prob, broken.loss) == (0.0, None)


# A tiny cell


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_cell_of_each_method(base: Path, method: str) -> None:
    result = phonebook.run(cell_of(str(base), method, rank=16, cut=2))
    assert json.loads(json.dumps(result)).keys() == result.keys()
    assert (result["records"], result["answer_tokens"]) == (4, 40)
    assert abs(result["parameters"] - 2 * 64 * 16) <= 0.1 * 2 * 64 * 16
    assert result["exact"] == 4
    assert result["token_accuracy"] == result["ordered"] == 1
    assert result["min_prob"] > 0.5
    assert result["loss"] < 0.69 < result["base_loss"]
    assert result["visits"] >= result["steps"] > 0
    assert result["curve"][-1][0] == result["steps"]
    assert (result["certified"] is None) == (method != "loramem")


def test_ours_keeps_its_rank_and_is_scored_as_it_is(base: Path, loaded: BaseModel) -> None:
    result = phonebook.run(cell_of(str(base), "loramem", length=200, rank=1, cut=10))
    assert (result["rank"], result["placement"]) == (1, "o_proj of layer 2")
    assert result["parameters"] == 128
    assert result["certified"] < 20 == result["records"]
    assert result["exact"] < 20
    assert count_exact(loaded, phonebook.encoded_records(loaded, cell_of(str(base), length=200))) == 0


# The table, the remarks, the plots

PLACED = {512: "o_proj of layer 4", 2048: "down_proj of layers 4, 5"}


def line(method: str, exact: int, *, length: int = 1000, rank: int = 1, seed: int = 0, **cell: Any) -> dict[str, Any]:
    parameters, batch = 512 * rank, 10 if method == "memft-sw" else 4
    fields = {"unit": "branch", "layer": None, "cut": 1, "data": None, **cell}
    return {
        "cell": {"method": method, "length": length, "rank": rank, "seed": seed, **fields},
        "result": {
            "exact": exact, "records": 100, "parameters": parameters, "placement": PLACED.get(parameters, "elsewhere"),
            "rank": 1, "seconds": 10.0 * rank, "visits": 2000, "curve": [[10, 0.25], [20, exact / 100]],
            "schedule": None if method == "loramem" else {"family": "qwen", "batch_records": batch},
        },
    }  # fmt: skip


LINES = [
    *(line("sft", exact, seed=seed) for seed, exact in enumerate([10, 20])),
    *(line("memft-sw", exact, seed=seed) for seed, exact in enumerate([10, 10])),
    *(line("loramem", exact, seed=seed) for seed, exact in enumerate([14, 15])),
    *(line(method, 100, rank=4) for method in ("sft", "memft-sw")),
    line("loramem", 100, rank=4),
    *(line(method, exact, length=2000, rank=4) for method, exact in [("sft", 30), ("memft-sw", 40), ("loramem", 60)]),
]


def test_the_table_has_a_row_per_length_and_rank_and_means_beside_the_published_ones() -> None:
    table = phonebook.table(LINES)
    assert {len(row) for row in table.rows} == {len(table.columns)}
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row == {
        "set-up": "branch, generated", "length": "1,000", "rank": "1", "sft exact %": "15.0 (10.0–20.0)",
        "memft-sw exact %": "10.0", "loramem exact %": "14.5 (14.0–15.0)", "unit: parameters": "512",
        "ours: parameters": "512", "ours: placement": "o_proj of layer 4, rank 1", "sft s": "10.0",
        "memft-sw s": "10.0", "loramem s": "10.0", "sft visits/record": "20.0", "memft-sw visits/record": "20.0",
        "loramem visits/record": "20.0",
    }  # fmt: skip
    means = [row[1:6] for row in table.rows if row[1] == "mean of 1,000, 2,000"]
    assert means == [
        ("mean of 1,000, 2,000", "1", "-", "-", "-"),
        ("mean of 1,000, 2,000", "4", "65.0", "70.0", "80.0"),
    ]
    assert ("published, Qwen3-8B", "mean of 1,000 to 32,000", "4", "37.5", "37.8", "-") in {r[:6] for r in table.rows}
    assert len(table.rows) == 3 + 2 + 14


def test_the_remarks_are_what_the_numbers_say() -> None:
    notes = phonebook.table(LINES).notes
    assert notes[2:] == (
        "memft-sw beats sft in 1 of 3 cells. It is behind at 1,000 tokens, rank 1 (10.0 against 15.0). It is equal at "
        "1,000 tokens, rank 4 (both 100.0).",
        "Of 2 cells in which some method is between 2 and 98 %, loramem is at least the best published method in 1. It "
        "is behind at 1,000 tokens, rank 1 (14.5 against 15.0 of sft).",
        "Fewest parameters with every record exact at 1,000 tokens, at every seed: sft 2,048, memft-sw 2,048, loramem "
        "2,048.",
        "Fewest parameters with every record exact at 2,000 tokens, at every seed: sft none, memft-sw none, loramem "
        "none.",
        "Ours has as many parameters as the unit within 10 %, at a placement of its own: down_proj of layers 4, 5, "
        "rank 1 at 2,048; o_proj of layer 4, rank 1 at 512.",
    )


def test_one_seed_that_is_not_complete_is_not_every_seed() -> None:
    lines = [line("sft", 100), line("sft", 99, seed=1), line("sft", 100, rank=4), line("sft", 100, rank=4, seed=1)]
    assert "at every seed: sft 2,048." in phonebook.table(lines).notes[2]


def test_a_seed_that_was_measured_on_two_devices_counts_once() -> None:
    lines = [line("sft", 10, device="auto"), line("sft", 20, seed=1), line("sft", 10, device="cpu")]
    (group,) = phonebook_results.groups(lines)
    assert group.exact(1000, 1, "sft") == [10, 20]


def test_generated_records_fill_the_published_batches(loaded: BaseModel) -> None:
    counts = [len(phonebook.encoded_records(loaded, cell_of("", length=n))) for n in (40, 200, 1000, 1470, 2000)]
    assert counts == [4, 20, 100, 140, 200]


def test_a_batch_that_is_not_the_row_s_is_told() -> None:
    other = line("sft", 10)
    other["result"] |= {"records": 103, "schedule": {"family": "qwen", "batch_records": 1}}
    notes = phonebook.table([other, line("memft-sw", 10), line("loramem", 10)]).notes
    assert [note for note in notes if "batches" in note] == [
        "sft at 1,000 tokens, rank 1: batches of 1 in place of the published row's 4."
    ]


def test_set_ups_are_kept_apart() -> None:
    lines = [line("sft", 10), line("sft", 90, unit="down_proj", layer=3, data="0a1b"), line("sft", 0, cut=10)]
    table = phonebook.table(lines)
    assert [row[0] for row in table.rows[::2]][:3] == [
        "branch, generated",
        "down_proj of layer 3, file 0a1b",
        "branch, generated, epochs / 10",
    ]
    assert table.notes[-1].startswith("branch, generated, epochs / 10: Fewest")
    names = [plot.name for plot in phonebook.plots(lines)]
    assert names == ["learning", "learning-2", "learning-3"]


def test_the_plots_show_means_grids_and_the_cell_that_differs_most() -> None:
    plots = {plot.name: plot for plot in phonebook.plots(LINES)}
    assert list(plots) == ["by-rank-1000", "by-rank-2000", "grid-sft", "grid-memft-sw", "grid-loramem", "learning"]
    (sft, *_) = plots["by-rank-1000"].series
    assert [(one.x, one.y, one.low, one.high) for one in sft.points] == [(1, 15, 10, 20), (4, 100, 100, 100)]
    assert plots["grid-loramem"].values == ((14.5, 100.0), (None, 60.0))
    assert "2,000 answer tokens at rank 4" in plots["learning"].title  # 30 to 60 %
    assert [one.y for one in plots["learning"].series[-1].points] == [25, 60]
    for plot in plots.values():
        assert figures.draw(plot, "", "png").startswith(b"\x89PNG")
