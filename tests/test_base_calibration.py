"""The calibration that a first write makes: its points, what is kept of them, and what may go wrong without harm."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.errors import UnsupportedBaseModel
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.planning import base_calibration, calibration
from loramem.planning.base_calibration import calibrate_base
from loramem.planning.calibration import outcomes_of
from loramem.planning.feature_runs import converged_losses
from loramem.planning.feature_samples import FeatureSample
from loramem.planning.runs import default_file, read_runs

from .conftest import numbers


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(base_calibration.SWITCH, "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four points at most, of short samples."""
    monkeypatch.setattr(base_calibration, "RANKS", (1, 2))
    monkeypatch.setattr(base_calibration, "FILLS", {"phonebook": (0.2,), "random": (0.2,)})


@pytest.fixture
def adapted(base: Path) -> AdaptedModel:
    return AdaptedModel(load_base_model(str(base)))


def weights_of(adapted: AdaptedModel) -> str:
    return adapted.base.fingerprint.weights[:12]


def test_an_unknown_base_is_calibrated_where_writes_begin(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_calibration, "FILLS", {"phonebook": (0.3, 0.8), "random": (0.2, 0.3, 0.4)})
    known = calibrate_base(adapted)
    placement = adapted.ladder[0]
    assert known.place == (placement.modules, placement.layers)
    runs = read_runs(default_file())
    for kind, fills in base_calibration.FILLS.items():
        mine = [one for one in runs if one.kind == kind]
        assert len({one.length for one in mine}) == len(fills)
        for one in mine:  # ranks go upwards until one is certified
            assert not any(other.certified and other.rank < one.rank for other in mine if other.length == one.length)
    placed = known.placed(known.place)
    assert placed is not None and placed.boundary is not None
    assert placed.law is not None
    assert 0 < placed.boundary.certified < placed.boundary.trials == len(runs)
    assert known.law("random", known.place) is not None
    assert calibration.load(weights_of(adapted)) == known


def test_a_shorter_length_is_a_prefix_with_the_end_token_last(adapted: AdaptedModel) -> None:
    for sample, _ in base_calibration._samples(adapted, adapted.ladder[0], 60.0):
        short = sample.prefix(30)
        assert short.length == 30
        assert torch.equal(short.features.entering, sample.features.entering[: len(short.features)])
        ends = short.features.targets[~short.is_answer]
        assert set(ends.tolist()) == {value[-1] for value in short.values}
        assert torch.equal(
            short.features.targets[short.is_answer],
            torch.tensor([token for value in short.values for token in value[:-1]]),
        )


def test_more_rank_and_more_steps_end_lower(adapted: AdaptedModel) -> None:
    placement = adapted.ladder[0]
    sample = base_calibration._samples(adapted, placement, 60.0)[0][0].prefix(40)

    def mean(rank: int, steps: int) -> float:
        return float(converged_losses(adapted, sample.features, rank, placement, steps=steps).mean())

    assert float(sample.base_losses.mean()) > mean(1, 10) > mean(1, 80) > mean(3, 80)
    assert converged_losses(adapted, sample.features, 1, placement, steps=5).equal(
        converged_losses(adapted, sample.features, 1, placement, steps=5)
    )


def test_what_was_interrupted_goes_on_point_by_point(
    adapted: AdaptedModel, few_points: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_point, made = FeatureSample.run, []

    def stop_after_two(*arguments: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(run_point(*arguments))
        return made[-1]

    monkeypatch.setattr(FeatureSample, "run", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        calibrate_base(adapted)
    assert read_runs(default_file()) == made
    assert calibration.load(weights_of(adapted)) is None
    monkeypatch.setattr(FeatureSample, "run", run_point)
    calibrate_base(adapted)
    runs = read_runs(default_file())
    assert runs[:2] == made
    assert len({one.identity for one in runs}) == len(runs) > 2
    monkeypatch.setattr(FeatureSample, "run", lambda *_: pytest.fail("a point was made again"))
    calibrate_base(adapted)


def test_without_time_no_point_is_begun(adapted: AdaptedModel) -> None:
    known = calibrate_base(adapted, budget_s=0.0)
    assert (known.kinds, known.laws, read_runs(default_file())) == ((), (), [])


def test_the_first_write_calibrates_and_the_next_does_not(
    base: Path, tmp_path: Path, few_points: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store, caplog.at_level(logging.WARNING):
        store.write(numbers(2))
        (said,) = [one for one in caplog.messages if "is calibrated, once" in one]
        assert "--no-calibrate" in said
        assert read_runs(default_file())
        monkeypatch.setattr(base_calibration, "calibrate_base", lambda *_: pytest.fail("calibrated again"))
        store.write({"another": "1234"})
        assert store.recall("another") == "1234"


def test_the_first_write_of_an_unknown_base_plans_by_its_own_law_and_certifies_at_its_first_rank(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_calibration, "FILLS", {"random": (0.1, 0.5, 0.25)})
    with MemoryStore(tmp_path / "m", str(base)) as store:
        records = numbers(6, 8)
        plan = store.plan(records)
        assert plan.calibrated and plan.success is not None
        assert store.write(records).rank == plan.shards[0].rank
        assert [outcome.certified for outcome in store.outcomes()] == [True]


def test_a_calibration_that_time_cut_short_goes_on_at_the_next_plan(
    base: Path, tmp_path: Path, few_points: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        with monkeypatch.context() as hurried:
            hurried.setattr(base_calibration, "calibrate_base", partial(calibrate_base, budget_s=0.0))
            store.plan(numbers(2))
        known = calibration.load(store.base.fingerprint.weights[:12])
        assert known is not None and not known.complete
        store.plan(numbers(2))
        known = calibration.load(store.base.fingerprint.weights[:12])
        assert known is not None and known.complete
        assert "is calibrated further, once" in caplog.text
        monkeypatch.setattr(base_calibration, "calibrate_base", lambda *_: pytest.fail("calibrated again"))
        store.plan(numbers(2))


@pytest.mark.parametrize("off", ["argument", "environment", "default", "option"])
def test_it_can_be_switched_off(base: Path, tmp_path: Path, off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_calibration, "calibrate_base", lambda *_: pytest.fail("calibrated"))
    if off == "environment":
        monkeypatch.setenv(base_calibration.SWITCH, "0")
    if off == "default":
        monkeypatch.delenv(base_calibration.SWITCH)
    if off == "option":
        assert run(["put", "key", "12", "--model", str(base), "--no-calibrate", "--store", "m"]) == 0
        return
    with MemoryStore(tmp_path / "m", str(base), calibrate=False if off == "argument" else None) as store:
        store.write({"key": "12"})


@pytest.mark.parametrize("error", [UnsupportedBaseModel("no end"), RuntimeError("shapes"), OSError("full")], ids=repr)
def test_a_calibration_that_fails_fails_no_write_and_is_not_tried_again(
    base: Path,
    tmp_path: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise error

    monkeypatch.setattr(base_calibration, "calibrate_base", fail)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write({"key": "12"})
        assert f"could not be calibrated ({error})" in caplog.text
        assert not store.plan({"other": "34"}).calibrated
        store.write({"another": "34"})
    assert tried == [1]


def test_exhausted_memory_is_no_failed_calibration(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(base_calibration, "calibrate_base", exhausted)
    with MemoryStore(tmp_path / "m", str(base)) as store, pytest.raises(Exception, match="memory"):
        store.write({"key": "12"})


def test_capacity_calibrates_once_and_then_needs_no_model(
    base_of: Callable[..., Path],
    few_points: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = base_of("llama")
    arguments = ["capacity", "--length", "40", "--model", str(base)]
    assert run(arguments) == 0
    first = capsys.readouterr()
    assert "is calibrated, once" in caplog.text
    monkeypatch.setattr("loramem.models.base_model.load_base_model", lambda *_, **__: pytest.fail("loaded"))
    assert run(arguments) == 0
    assert capsys.readouterr().out == first.out


def test_a_run_over_features_that_is_not_certified_is_an_outcome(adapted: AdaptedModel, few_points: None) -> None:
    calibrate_base(adapted)
    for one in read_runs(default_file()):
        assert one.for_law and one.over_features
        assert [outcome.certified for outcome in outcomes_of(one)] == [one.certified]


def test_the_calibrate_command_without_options_makes_what_a_first_write_makes(
    base: Path, few_points: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(["calibrate", "--model", str(base), "--json"]) == 0
    assert {one.kind for one in read_runs(default_file())} == {"phonebook", "random"}
    assert run(["capacity", "--length", "40", "--model", str(base)]) == 0
    assert "is calibrated, once" not in caplog.text
