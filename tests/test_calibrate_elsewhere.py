"""A calibration whose runs are made in other processes comes to the same, and each run is kept here."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.placement import Placement
from loramem.planning import base_calibration, calibration
from loramem.planning.base_calibration import calibrate_base
from loramem.planning.calibrate import Bench, CalibrationGrid, calibrate
from loramem.planning.calibrate_elsewhere import calibrate_base_there, calibrate_there
from loramem.planning.feature_samples import FeatureSample
from loramem.planning.runs import Run, default_file, read_runs
from loramem.training.jobs import JobBase


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base_calibration, "RANKS", (1, 2))
    monkeypatch.setattr(base_calibration, "FILLS", {"phonebook": (0.2,), "random": (0.2,)})


@pytest.fixture
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base))


def untimed(runs: list[Run]) -> list[Run]:
    return [replace(run, elapsed_s=0.0, training_s=0.0) for run in runs]


def test_the_lengths_of_a_grid_are_made_by_workers_and_never_twice(
    loaded: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = CalibrationGrid("phonebook", Placement.ladder(loaded.model)[0], (30, 60), (1, 2))
    out, told = tmp_path / "there.jsonl", list[tuple[Run, float]]()
    with ThreadPoolExecutor(1) as worker:
        base = JobBase.of(loaded)
        runs = calibrate_there(base, grid, out, worker, progress=lambda *each: told.append(each))
        assert untimed(runs) == untimed(calibrate(loaded, grid, tmp_path / "here.jsonl"))
        assert read_runs(out) == runs == [each for each, _ in told]
        assert told[-1][1] == 0.0 < told[0][1]
        monkeypatch.setattr(Bench, "run", lambda *_: pytest.fail("a run was made again"))
        assert calibrate_there(base, grid, out, worker) == runs
        assert calibrate_there(base, grid, tmp_path / "none.jsonl", worker, budget_s=-1) == []


def test_what_a_first_write_would_measure_is_measured_there_and_kept_here(
    loaded: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(1) as worker:
        found = calibrate_base_there(JobBase.of(loaded), None, worker)
        made = read_runs(default_file())
        assert found == calibration.load(found.base_weights) and found.complete and made
        monkeypatch.setattr(FeatureSample, "run", lambda *_: pytest.fail("a point was made again"))
        assert calibrate_base_there(JobBase.of(loaded), None, worker) == found
        monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    monkeypatch.setattr(base_calibration, "RANKS", (1, 2))
    monkeypatch.setattr(base_calibration, "FILLS", {"phonebook": (0.2,), "random": (0.2,)})
    here = calibrate_base(AdaptedModel(loaded))
    assert untimed(read_runs(default_file())) == untimed(made)
    assert here == found


def test_the_command_asks_workers(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def pool(workers: int) -> ThreadPoolExecutor:
        asked.append(workers)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr("loramem.process_pool", pool)
    command = ["calibrate", "--model", str(base), "--workers", "3"]
    assert run(command) == run([*command, "--kind", "phonebook", "--lengths", "30", "--ranks", "1"]) == 0
    assert asked == [3, 3]
    assert {(each.kind, each.length) for each in read_runs(default_file())} >= {("phonebook", 30)}
