"""Calibration: converged runs over a grid, kept as they come, and the law that the command line fits to them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loramem_cli import main

from loramem.errors import InputError
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.placement import Placement
from loramem.planning import calibrate
from loramem.planning import runs as runs_module
from loramem.planning.calibrate import CalibrationGrid, spread
from loramem.planning.calibration import cached
from loramem.planning.runs import Run, append_run, read_runs
from loramem.records.record import Record
from loramem.training.trainer import NetworkSchedule


@pytest.fixture
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base))


def request_of(
    loaded: BaseModel, ranks: tuple[int, ...] = (1, 2), lengths: tuple[int, ...] = (30, 60)
) -> CalibrationGrid:
    return CalibrationGrid("phonebook", Placement.named(loaded.model, ["down_proj"], [1]), lengths, ranks)


def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "IDLE_PASSES", 2)
    monkeypatch.setattr(calibrate, "IDLE_STEPS", 4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that stop early: what a run is, not what it comes to."""
    fast(monkeypatch)


def test_a_run_says_what_was_measured(loaded: BaseModel, tmp_path: Path, quick: None) -> None:
    (run,) = calibrate.calibrate(loaded, request_of(loaded, (2,), (30,)), tmp_path / "runs.jsonl")
    assert (run.kind, run.rank, run.length, run.records) == ("phonebook", 2, 30, 3)
    assert run.parameters == 2 * (128 + 64)
    assert 0 < run.final_loss < run.base_loss
    assert run.bits <= 30 * run.base_loss / math.log(2)
    assert run.point.loss_reduction == pytest.approx(run.base_loss - run.final_loss)
    assert run.conditions["base_weights"] == loaded.fingerprint.weights[:12]
    assert run.conditions["torch"] == torch.__version__


def test_runs_are_kept_as_they_come_and_never_made_twice(
    loaded: BaseModel, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, request = tmp_path / "deep" / "runs.jsonl", request_of(loaded)
    made: list[Run] = []

    def stop_after_two(run: Run, left_s: float) -> None:
        made.append(run)
        if len(made) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(loaded, request, out, progress=stop_after_two)
    assert read_runs(out) == made
    with out.open("a") as file:
        file.write('{"kind": "phone')  # as if the power had gone
    rest: list[Run] = []
    runs = calibrate.calibrate(loaded, request, out, progress=lambda run, _: rest.append(run))
    assert [(run.length, run.rank) for run in runs] == [(60, 1), (60, 2), (30, 1), (30, 2)]
    assert runs[:2] == made
    assert runs[2:] == rest
    assert read_runs(out) == runs
    monkeypatch.setattr(calibrate, "train_adapter", lambda *_, **__: pytest.fail("a finished run was made again"))
    assert calibrate.calibrate(loaded, request, out) == runs


def test_behind_the_last_attention_a_run_is_one_over_features(loaded: BaseModel, tmp_path: Path) -> None:
    grid = replace(request_of(loaded, (1,), (30,)), placement=Placement.ladder(loaded.model)[0])
    (run,) = calibrate.calibrate(loaded, grid, tmp_path / "runs.jsonl")
    assert run.over_features and run.for_law and "learning_rate" not in run.conditions
    assert run.identity == calibrate.Bench(AdaptedModel(loaded), grid, 30).identity(1)
    assert 0 < run.final_loss < run.base_loss
    assert calibrate.calibrate(loaded, grid, tmp_path / "runs.jsonl") == [run]


def test_another_rate_is_another_run(loaded: BaseModel, tmp_path: Path, quick: None) -> None:
    request = request_of(loaded, (1,), (30,))
    for rate in (0.06, 0.1):
        calibrate.calibrate(loaded, replace(request, learning_rate=rate), tmp_path / "runs.jsonl")
    assert [run.conditions["learning_rate"] for run in read_runs(tmp_path / "runs.jsonl")] == [0.06, 0.1]


def test_no_time_no_runs(loaded: BaseModel, tmp_path: Path) -> None:
    assert calibrate.calibrate(loaded, request_of(loaded), tmp_path / "runs.jsonl", budget_s=-1) == []
    assert not (tmp_path / "runs.jsonl").exists()


def test_what_a_saturated_run_answers_is_not_run(loaded: BaseModel, tmp_path: Path, monkeypatch) -> None:
    def pretend(bench: calibrate.Bench, rank: int) -> Run:
        loss = 0.5 if rank >= 2 else 2.0
        return replace(template, rank=rank, length=bench.length, final_loss=loss)

    fast(monkeypatch)
    (template,) = calibrate.calibrate(loaded, request_of(loaded, (1,), (30,)), tmp_path / "one.jsonl")
    monkeypatch.setattr(calibrate.Bench, "run", pretend)
    runs = calibrate.calibrate(loaded, request_of(loaded, (1, 2, 4), (30, 60, 90)), tmp_path / "runs.jsonl")
    # Rank 2 is saturated at the longest: rank 4 there, and 2 and 4 where it is shorter, would say nothing.
    assert [(run.length, run.rank) for run in runs] == [(90, 1), (90, 2), (30, 1), (60, 1)]


def test_lengths_furthest_apart_come_first() -> None:
    assert spread([500, 700, 1000, 1400, 2000, 500]) == [2000, 500, 1000, 700, 1400]
    assert spread([7]) == [7]


def test_longer_training_converges_further(loaded: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(loaded, (1,), (60,))
    (converged,) = calibrate.calibrate(loaded, request, tmp_path / "runs.jsonl")
    fast(monkeypatch)
    (stopped,) = calibrate.calibrate(loaded, request, tmp_path / "runs.jsonl")
    assert converged.steps > stopped.steps
    assert converged.final_loss < stopped.final_loss


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "songs"}, {"ranks": ()}, {"lengths": (0,)}, {"ranks": (1, -2)}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_nonsense_is_refused(loaded: BaseModel, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(request_of(loaded), **wrong)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(InputError, match="Line 1 of"):
        read_runs(tmp_path / "runs.jsonl")


# --- the command line


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """Runs that follow ΔL = 9·r^0.4·ℓ^−0.3 − 0.2 exactly."""
    run = Run(
        kind="random", rank=1, length=1, seed=0, modules=("down_proj",), layers=(4,), records=1, parameters=1, bits=1.0,
        cost_bits=1.0,
        base_loss=12.0, final_loss=0.0, ordered=0.0, certified=False, steps=1, visits=1, training_s=1.0, elapsed_s=1.0,
        conditions={"base_model": "tiny", "objective": "sft"},
    )  # fmt: skip
    path = tmp_path / "runs.jsonl"
    for rank in (1, 2, 4, 8):
        for length in (200, 400, 800, 1600):
            reduction = 9 * rank**0.4 * length**-0.3 - 0.2
            append_run(path, replace(run, rank=rank, length=length, final_loss=12.0 - reduction))
    return path


def test_the_law_command_shows_the_constants(synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["law", "--runs", str(synthetic), "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    law = json.loads(shown["law"])
    assert [law[name] for name in ("C", "alpha", "beta", "b")] == pytest.approx([9, 0.4, 0.3, -0.2], rel=1e-3)
    assert float(shown["held_out_mape"]) < 0.1
    assert main.run(["law", "--runs", str(synthetic)]) == 0
    assert "0.400" in capsys.readouterr().out


def test_without_runs_the_law_command_says_how_to_make_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["law", "--runs", str(tmp_path / "none.jsonl")]) == 2
    assert "loramem calibrate" in capsys.readouterr().err


def test_the_calibrate_command_makes_runs_and_says_what_is_missing_for_a_law(
    base: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs.jsonl"
    place = ["--modules", "down_proj", "--layers", "1", "--model", str(base), "--runs", str(runs)]
    assert main.run(["calibrate", "--ranks", "1,2", "--lengths", "30", *place, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == []
    assert "rank 2, 30 tokens" in told.err
    assert "Measure" in told.err
    assert len(read_runs(runs)) == 2


@pytest.mark.parametrize(
    "options",
    [["--modules", "songs"], ["--layers", "99"], ["--layers", "x"], ["--ranks", "0"], ["--kind", "songs"]],
    ids=" ".join,
)
def test_the_calibrate_command_refuses_nonsense(
    base: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["calibrate", "--model", str(base), "--runs", str(tmp_path / "runs.jsonl"), *options]) == 2
    assert "Traceback" not in capsys.readouterr().err


# --- data of one's own, and lengths that suit a placement


def test_records_of_a_file_are_calibrated_with_under_its_name(
    base: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data, runs = tmp_path / "codes.jsonl", tmp_path / "runs.jsonl"
    data.write_text("".join(json.dumps({"id": f"key {i}", "code": f"{i:06}"}) + "\n" for i in range(20)))
    place = ["--modules", "down_proj", "--layers", "1", "--model", str(base), "--runs", str(runs)]
    fields = ["--key-field", "id", "--value-field", "code"]
    arguments = ["calibrate", "--data", str(data), *fields, *place, "--ranks", "1"]
    assert main.run([*arguments, "--lengths", "30"]) == 0
    (run,) = read_runs(runs)
    assert (run.kind, run.records, run.length) == ("codes.jsonl", 5, 30)
    assert "the others at most" in capsys.readouterr().err
    assert main.run([*arguments, "--lengths", "1000"]) == 1
    assert "The data have 120 answer tokens, 1,000 are asked for." in capsys.readouterr().err


def test_a_seed_draws_other_records(loaded: BaseModel) -> None:
    data = [Record(f"key {i}", f"{i:04}") for i in range(50)]
    drawn = [calibrate.encode_sample(loaded, "own", 40, seed, data) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len({entry.record.key for entry in some}) == 10 for some in drawn)


def test_lengths_grow_with_the_placement_and_shrink_with_the_cost(loaded: BaseModel) -> None:
    small = Placement.named(loaded.model, ["o_proj"], [1])
    large = Placement.default(loaded.model)
    lengths = calibrate.default_lengths(loaded, "phonebook", small)
    assert len(lengths) == len(calibrate.LAW_BITS)
    times = large.parameters_per_rank(loaded.model) / small.parameters_per_rank(loaded.model)
    assert calibrate.default_lengths(loaded, "phonebook", large)[0] == pytest.approx(times * lengths[0], rel=0.1)
    (sample,) = calibrate.price_sample(loaded, "phonebook", calibrate.PROBE).samples
    at_rank_1 = sample.cost_bits / sample.length * lengths[0] / small.parameters_per_rank(loaded.model)
    assert at_rank_1 == pytest.approx(calibrate.LAW_BITS[0], rel=0.06)


def test_one_module_alone_is_trained_at_a_higher_rate(loaded: BaseModel) -> None:
    assert calibrate.default_rate(Placement.named(loaded.model, ["o_proj"], [1])) == calibrate.LEARNING_RATE
    for many in (Placement.default(loaded.model), Placement.named(loaded.model, ["o_proj"], [1, 2])):
        assert calibrate.default_rate(many) == NetworkSchedule.learning_rate


def test_what_is_learnt_anew_of_the_embedded_model_keeps_what_shipped(
    base: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ["--modules", "down_proj", "--layers", "1", "--model", str(base), "--ranks", "1"]
    shipped, own = tmp_path / "shipped.jsonl", tmp_path / "own.jsonl"
    assert main.run(["calibrate", *place, "--lengths", "30", "--runs", str(shipped)]) == 0
    monkeypatch.setattr(runs_module, "shipped_file", lambda: shipped)
    weights = read_runs(shipped)[0].conditions["base_weights"]
    for options, known in ([], [30, 60]), (["--save", str(tmp_path / "mine.json")], [60]):
        assert main.run(["calibrate", *place, "--lengths", "60", "--runs", str(own), *options]) == 0
        saved = Path(options[1]) if options else cached(weights)
        (kind,) = json.loads(saved.read_text())["kinds"]
        assert [sample["length"] for sample in kind["samples"]] == known
