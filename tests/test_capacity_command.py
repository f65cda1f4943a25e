"""loramem capacity: what a write would take, from a file or a length alone, and what is no question."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.planning import calibration, plan, timings
from loramem.planning.calibration import Calibration, PlacedBoundary, cached
from loramem.planning.rank_law import KindSamples, Sample
from loramem.planning.visits import Pace
from loramem.records.outcome import Outcome

from .conftest import numbers
from .planning_samples import BOUNDARY, RANK_LAW

WEIGHTS = "0123456789ab"
SHIPPED = calibration.SHIPPED
MODULES, LAYERS = ("down_proj",), (5,)
OUTCOMES = tuple(Outcome("phonebook", rank, 400, 1000 * rank, 1000.0, rank > 2) for rank in (1, 2, 3, 4, 6, 8))


def known(
    name: str = "loramem-tiny",
    weights: str = WEIGHTS,
    modules: tuple[str, ...] = MODULES,
    layers: tuple[int, ...] = LAYERS,
) -> Calibration:
    """A base model to which every token of a phone book costs 6 nats, or 2.4 bits together with the others.

    They are as various as 400 different ones: the law's rank is where √r = (6 − 0.69 − 1) / 30 · √400, 8.26.
    """
    return Calibration(
        name,
        weights,
        4096,
        modules,
        layers,
        1000,
        kinds=(KindSamples("phonebook", (Sample(1000, 6.0, 2400.0, 400.0),)),),
        boundaries=(PlacedBoundary(modules, layers, 1000, OUTCOMES, RANK_LAW, BOUNDARY, Pace(20.0, 0.5, 9)),),
    )


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # no ./memory here


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The synthetic calibration ships, and a token takes 50 ms here."""
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "shipped.json")
    known().save(calibration.SHIPPED)
    timings.note_time(WEIGHTS, "cpu", training_s=5.0, tokens_visited=100)


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("capacity") / "memory"
    with MemoryStore(path, str(base)) as opened:
        opened.write(numbers(1))
    return path


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in numbers(4).items()))
    return str(path)


def no_base_model(*_: object, **__: object) -> None:
    pytest.fail("the base model was loaded")


# --- from a length


def test_the_text_for_a_known_base_model(calibrated: None, capsys: pytest.CaptureFixture[str]) -> None:
    # The law's rank: 0.69 at √r = (5.31 − 1 ∓ 0.2015) / 1.5. Even odds are at twice it, 16.5, and rank 20 has odds of
    # (20 / 16.5)⁴ = 2.15. 400 tokens cost 960 bits. Visits: 20 · √0.048 = 4.4 of 400 tokens at 50 ms. Files:
    # 4 · 20,000 + 150 · 2 + 1400 bytes.
    assert run(["capacity", "--length", "400", "--goal", "small", "--rank", "20"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out == (
        "base model            loramem-tiny\n"
        "records               40\n"
        "answer tokens         400\n"
        "cost of the values    960 bits\n"
        "goal                  small\n"
        "adapters              1\n"
        "parameters            20,000\n"
        "bits per parameter    0.048\n"
        "size                  0.08 MB\n"
        "success at first try  79%\n"
        "training              about 88 s\n"
        "\n"
        "| adapter | records | tokens | different | optimistic rank | law (90%) | rank | base loss | success |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| 1 | 40 | 400 | 400 | 1 | 8.3 (7.5–9) | 20 | 6.00 | 79% |\n"
    )


def test_what_the_shipped_calibration_says_of_four_thousand_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["capacity", "--length", "4000"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out == (
        "base model            loramem-tiny\n"
        "records               400\n"
        "answer tokens         4,000\n"
        "cost of the values    10,425 bits\n"
        "goal                  fast\n"
        "adapters              4\n"
        "parameters            42,240\n"
        "bits per parameter    0.247\n"
        "size                  0.18 MB\n"
        "success at first try  100%\n"
        "training              not timed on this machine yet\n"
        "\n"
        "| adapter | records | tokens | different | optimistic rank | law (90%) | rank | base loss | success |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| 1–4 | 100 | 1,000 | 11 | 2 | 1.5 (1.4–1.8) | 11 | 3.89 | 100% |\n"
    )


def test_the_json_for_a_known_base_model(calibrated: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["capacity", "--length", "400", "--records", "50", "--goal", "small", "--rank", "20", "--json"]) == 0
    told = capsys.readouterr()
    plan = json.loads(told.out)
    [shard] = plan.pop("shards")
    half = 2.0150 * 0.1
    law_rank, training_s = (4.31 / 1.5) ** 2, 20 * math.sqrt(0.048) * 400 * 0.05
    success = 1 / (1 + (2 * law_rank * (400 / 1000) ** 0.15 / 20) ** 4)
    assert shard.pop("law_rank") == {
        "rank": pytest.approx(law_rank),
        "low": pytest.approx(((4.31 - half) / 1.5) ** 2, rel=2e-3),
        "high": pytest.approx(((4.31 + half) / 1.5) ** 2, rel=2e-3),
        "extrapolated": False,
    }
    assert shard == {
        "first": 0,
        "records": 50,
        "length": 400,
        "cost_bits": pytest.approx(960),
        "rank": 20,
        "parameters": 20_000,
        "size_bytes": 81_700,
        "base_loss": 6.0,
        "vocabulary": pytest.approx(400.0),
        "success": pytest.approx(success),
        "training_s": pytest.approx(training_s),
        "optimistic_rank": 1,
        "rung": 0,
    }
    assert plan == {
        "base_model": "loramem-tiny",
        "goal": "small",
        "calibrated": True,
        "kind": "phonebook",
        "warnings": [],
        "one_adapter": False,
        "parameters": 20_000,
        "size_bytes": 81_700,
        "cost_bits": pytest.approx(960),
        "length": 400,
        "success": pytest.approx(success),
        "training_s": pytest.approx(training_s),
    }
    assert told.err == ""


def test_adapters_that_look_alike_share_a_row_and_large_ranks_are_whole(
    calibrated: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # Modules of a mean width of 500: at most 1,200 answer and end tokens in one adapter, of 109 of these records.
    assert run(["capacity", "--length", "10800"]) == 0
    shown = capsys.readouterr()
    [row] = [line for line in shown.out.splitlines() if line.startswith("| ") and line[2].isdigit()]
    # 2 · 19^(1/4) · 8.26 · 1.08^0.15 = 34.9, and 2.1 times as much for speed.
    assert row.startswith("| 1–10 | 108 | 1,080 | 400 | 2 | 8.3 (7.5–9) | 74 |")


def test_a_law_that_is_asked_beyond_its_runs_says_so(calibrated: None, capsys: pytest.CaptureFixture[str]) -> None:
    few = known()
    replace(few, kinds=(KindSamples("phonebook", (Sample(1000, 6.0, 2400.0, 11.0),)),)).save(calibration.SHIPPED)
    assert run(["capacity", "--length", "400"]) == 0
    shown = capsys.readouterr()
    # √r = 4.31 / 30 · √11, with no lower end near.
    assert "| 0.23 (0.21–0.25), extrapolated |" in shown.out
    assert "law's ranks lie outside" in shown.err


def test_only_the_ranks_of_a_server_are_planned(calibrated: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["capacity", "--length", "400", "--goal", "small", "--ranks", "8,32", "--json"]) == 0
    # Odds of 3 to 7 are at 1.618 · 8.26 · 0.4^0.15 = 11.6.
    assert json.loads(capsys.readouterr().out)["shards"][0]["rank"] == 32
    assert run(["capacity", "--length", "400", "--goal", "small", "--max-rank", "1", "--json"]) == 0
    # As many different tokens whatever the number of records: more adapters would not help.
    assert [shard["rank"] for shard in json.loads(capsys.readouterr().out)["shards"]] == [1]
    assert run(["capacity", "--length", "400", "--rank", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"][0]["rank"] == 5


def planned_without_torch(*arguments: str) -> dict[str, Any]:
    """What `loramem capacity` prints in a process that imports nothing heavy for it."""
    code = (
        "import sys\nfrom loramem_cli.main import run\n"
        f"assert run({['capacity', '--length', '400', '--json', *arguments]}) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ})
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def test_a_known_base_model_is_planned_for_without_torch() -> None:
    weights = json.loads(SHIPPED.read_text())["base_weights"]
    known(weights=weights).save(cached(weights))
    assert planned_without_torch()["shards"][0]["base_loss"] == 6.0  # as calibrated above, not as shipped


def test_a_calibrated_folder_is_planned_for_without_torch_too(base: Path) -> None:
    from loramem.models.fingerprint import fingerprint

    weights = fingerprint(base).weights[:12]
    known(base.name, weights).save(cached(weights))
    plan = planned_without_torch("--model", str(base))
    assert (plan["base_model"], plan["calibrated"]) == (base.name, True)


@pytest.mark.parametrize("named", [False, True])
def test_a_length_is_planned_for_the_base_model_of_the_store_and_with_what_its_writes_taught(
    store: Path, base: Path, named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with MemoryStore(store, create=False) as opened:
        manifest, outcomes = opened.manifest, opened.outcomes()
    place = tuple(manifest.placement["modules"]), tuple(manifest.placement["layers"])
    weights = manifest.fingerprint["weights"][:12]
    known(base.name, weights, *place).save(cached(weights))
    monkeypatch.setattr("loramem.models.base_model.load_base_model", no_base_model)
    asked: list[object] = []
    whole = calibration.plan_inputs
    monkeypatch.setattr(calibration, "plan_inputs", lambda *args: asked.append(args[4]) or whole(*args))
    arguments = ["--model", str(base.resolve())] if named else []
    assert run(["capacity", "--length", "400", "--store", str(store), "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["base_model"] == base.name
    assert asked == [outcomes]
    assert len(outcomes) == 1


def test_an_uncalibrated_base_model_is_asked_what_the_data_cost_and_the_plan_says_so(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["capacity", "--length", "60", "--model", str(base)]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert f"{base.name} (uncalibrated)\n" in shown.out
    assert "success at first try  unknown\n" in shown.out
    assert "not timed on this machine yet" in shown.out
    assert f"loramem calibrate --model {base.resolve()}" in shown.err
    assert run([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["calibrated"], plan["success"], plan["length"]) == (False, None, 60)
    # A random model spreads its mass over 512 tokens.
    assert plan["shards"][0]["base_loss"] == pytest.approx(math.log(512), abs=4)


# --- from a file


def test_a_file_is_planned_without_making_a_store(
    base: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "m"
    assert run(["capacity", source, "--store", str(place), "--model", str(base), "--json"]) == 0
    [shard] = json.loads(capsys.readouterr().out)["shards"]
    assert (shard["records"], shard["length"]) == (4, 16)
    assert not place.exists()


def test_records_that_the_store_holds_are_left_out(
    store: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["capacity", source, "--store", str(store)]) == 0
    shown = capsys.readouterr()
    assert "records               3\n" in shown.out
    assert "loramem calibrate" in shown.err
    written = tmp_path / "written.jsonl"
    written.write_text(Path(source).read_text().splitlines()[0] + "\n")
    assert run(["capacity", str(written), "--store", str(store)]) == 0
    assert "adapters              0\n" in capsys.readouterr().out


def test_the_law_is_asked_for_a_file_of_any_kind(
    store: Path, source: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MemoryStore(store, create=False) as opened:
        manifest = opened.manifest
    place = tuple(manifest.placement["modules"]), tuple(manifest.placement["layers"])
    weights = manifest.fingerprint["weights"][:12]
    known(base.name, weights, *place).save(cached(weights))
    for arguments, kind in (([], "phonebook"), (["--kind", "text"], "text")):
        assert run(["capacity", source, "--store", str(store), "--json", *arguments]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["kind"], plan["calibrated"]) == (kind, True)
        assert plan["shards"][0]["law_rank"]["rank"] > 0


# --- figures


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_the_law_is_drawn(calibrated: None, tmp_path: Path) -> None:
    assert run(["capacity", "--length", "400", "--plot", str(tmp_path / "law.svg"), "--json"]) == 0
    assert b"<svg" in (tmp_path / "law.svg").read_bytes()


def test_without_a_law_nothing_is_drawn(
    store: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "guess", lambda: None)
    assert run(["capacity", source, "--store", str(store), "--plot", str(tmp_path / "law.svg")]) == 2
    assert "no law of this base model" in capsys.readouterr().err
    assert not (tmp_path / "law.svg").exists()


# --- nonsense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a FILE (- for stdin), or --length."),
        (["records.jsonl", "--length", "400"], "Give a FILE (- for stdin), or --length."),
        (["records.jsonl", "--records", "4"], "--records goes with --length; a FILE says how many it holds."),
        (["--length", "0"], "0 is not in the range 1<=x<=10000000."),
        (["--length", "-5"], "-5 is not in the range 1<=x<=10000000."),
        (["--length", "99999999999"], "99999999999 is not in the range 1<=x<=10000000."),
        (["--length", "x"], "'x' is not a valid integer range."),
        (["--length", "1.5"], "'1.5' is not a valid integer range."),
        (["--length", "400", "--records", "0"], "0 is not in the range x>=1."),
        (["--length", "4", "--records", "5"], "--records 5 cannot share 4 answer tokens: each needs one."),
        (
            ["--length", "5000", "--records", "1"],
            "A value of 5000 tokens exceeds the context of loramem-tiny, 4096 tokens. Give more --records.",
        ),
        (
            ["--length", "400", "--kind", "songs"],
            "--kind 'songs' is not one of phonebook, text, r20, mixed, r60, r80, random, nor a file that was "
            "calibrated with.",
        ),
        (["--length", "400", "--goal", "huge"], "'huge' is not one of 'fast', 'small'."),
        (["--length", "400", "--max-rank", "0"], "0 is not in the range x>=1."),
        (["--length", "400", "--ranks", "8,0"], "'8,0' is not a list of numbers above 0, such as 100,400."),
        (["--length", "400", "--ranks", "8,16", "--max-rank", "4"], "none of the ranks 8, 16 is at most 4."),
        (
            ["--length", "400", "--ranks", "8,16", "--rank", "9"],
            "rank must be one of 8, 16, not 9.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_ends_in_one_line_that_says_what_is_wrong(
    calibrated: None, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["capacity", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    # Before it stand the two lines of usage that click prints for every command.
    usage, _, blank, error = shown.err.splitlines()
    assert usage.startswith("Usage: ") and blank == ""
    assert error.startswith("Error: ") and error.endswith(message)


def test_what_does_not_fit_exits_5_with_the_rank_that_would_do(
    calibrated: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # One value of 2000 tokens costs 4800 bits; rank 1 holds 3600.
    assert run(["capacity", "--length", "2000", "--records", "1", "--max-rank", "1"]) == 5
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Error: Values that cost 4,800 bits do not fit into one adapter of rank 1")
    assert "Allow a rank of 2 or more" in shown.err
    assert len(shown.err.splitlines()) == 1
    assert run(["capacity", "--length", "2000", "--records", "2", "--max-rank", "1"]) == 0


def test_a_file_that_does_not_fit_exits_5_too(
    base: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "MOST_BITS", 1e-6)
    assert run(["capacity", source, "--model", str(base)]) == 5
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run(["write", source, "--model", str(base), "--store", "m"]) == 5


def test_a_damaged_calibration_is_one_line(calibrated: None, capsys: pytest.CaptureFixture[str]) -> None:
    cached(WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    cached(WEIGHTS).write_text("{")
    assert run(["capacity", "--length", "400"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert shown.err.startswith(f"Error: {cached(WEIGHTS)} is not a calibration")
