"""`loramem law`: laws, residuals, success boundaries and what a store's writes taught, from files of runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from loramem_cli import main

from loramem import MemoryStore
from loramem.planning.runs import append_run

from .planning_samples import RUN


def reduction(rank: int, length: int) -> float:
    return 9 * rank**0.4 * length**-0.3 - 0.2


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A law's runs of two kinds, and writes that are certified from rank 16 upwards."""
    path = tmp_path / "runs.jsonl"
    for kind in ("random", "text"):
        for rank in (1, 2, 4, 8):
            for length in (200, 400, 800, 1600):
                run = replace(RUN, kind=kind, rank=rank, length=length, parameters=500 * rank, cost_bits=8.0 * length)
                append_run(path, replace(run, final_loss=12.0 - reduction(rank, length)))
    writes = {**RUN.conditions, "objective": "memft-sw"}
    for rank in (1, 2, 4, 8, 16, 32):
        run = replace(RUN, rank=rank, length=1000, parameters=500 * rank, vocabulary=11.0, conditions=writes)
        append_run(path, replace(run, certified=rank >= 16))
    return path


def law(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main.run(["law", *arguments]) == 0
    return capsys.readouterr().out


def test_every_kind_has_a_row_and_a_kind_can_be_chosen(runs: Path, tmp_path: Path, capsys) -> None:
    both = law(capsys, "--runs", str(runs), "--store", str(tmp_path / "none"))
    assert both.count("| 9 | 0.400 | 0.300 | -0.200 | 1.0000 |") == 2
    one = law(capsys, "--runs", str(runs), "--store", str(tmp_path / "none"), "--kind", "text")
    assert one.count("0.400") == 1
    assert main.run(["law", "--runs", str(runs), "--kind", "songs"]) == 2
    assert "no such calibration runs" in capsys.readouterr().err


def test_points_stand_beside_what_the_law_says_of_them(runs: Path, tmp_path: Path, capsys) -> None:
    append_run(runs, replace(RUN, kind="text", rank=3, length=1000, final_loss=0.5))
    shown = law(capsys, "--runs", str(runs), "--store", str(tmp_path / "none"), "--kind", "text", "--points")
    predicted = f"{reduction(4, 800):.3f}"
    assert f"| 4 | 800 | 12.000 | {12 - reduction(4, 800):.3f} | {predicted} | {predicted} |" in shown
    assert f"| 3 | 1,000 | 12.000 | 0.500 | 11.500 | {reduction(3, 1000):.3f} | saturated | 25.0 |" in shown


def test_the_boundary_and_its_reliability_are_shown(runs: Path, tmp_path: Path, capsys) -> None:
    shown = law(capsys, "--runs", str(runs), "--store", str(tmp_path / "none"))
    assert "| down_proj of layers 4, tiny | 6 | 2 |" in shown  # the law's runs were not certified: they say nothing
    assert "| down_proj of layers 4, tiny | 0.0–0.2 |" in shown


def test_a_plot_is_of_one_law(runs: Path, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "law.svg"
    assert main.run(["law", "--runs", str(runs), "--plot", str(picture)]) == 2
    assert "--plot draws one law, not 2" in capsys.readouterr().err
    assert not picture.exists()
    law(capsys, "--runs", str(runs), "--kind", "text", "--store", str(tmp_path / "none"), "--plot", str(picture))
    assert picture.read_text().startswith("<?xml")


def test_a_store_says_what_its_writes_taught(runs: Path, base: Path, tmp_path: Path, capsys) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write({"a": "123", "b": "456"}, rank=4)
        (outcome,) = store.outcomes()
    shown = law(capsys, "--runs", str(runs), "--store", str(tmp_path / "m"))
    assert "The last writes of" in shown
    assert f"| 4 | 6 | {outcome.vocabulary:.0f} | {outcome.cost_bits:,.0f} | " in shown
    assert "1 outcomes of this store move even odds from" in shown


def test_shipped_runs_are_shown_without_a_file(tmp_path: Path, capsys) -> None:
    laws = json.loads(law(capsys, "--json", "--store", str(tmp_path / "none"), "--model", "loramem-tiny"))
    assert {"random", "phonebook", "text", "mixed"} <= {entry["name"].partition(",")[0] for entry in laws}
