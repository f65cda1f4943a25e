"""The benchmarks run, measure what they say, and run no cell twice."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from loramem import MemoryStore, Record, WriterSettings
from loramem.models import shard_sizes
from loramem.models.placement import Placement
from loramem.planning.runs import append_run, read_runs, shipped_file
from loramem.suites import runner

from .benchmarks import (
    contexts,
    density,
    eight_bits,
    endpoint_load,
    first_rank,
    first_rank_rules,
    last_layer_laws,
    llama_cpp,
    parent_model,
    rounding,
    same_answers,
    shard_size,
    store_growth,
    store_size,
    warm_recall,
    write_grid,
)
from .benchmarks.command import command
from .benchmarks.whole_write import make_deep, timed_write
from .conftest import numbers

SETTINGS = WriterSettings()


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def processes(_: runner.SuiteOptions) -> Iterator[object]:
        yield runner.measure

    monkeypatch.setattr(runner, "_processes", processes)


def lines_of(suite: str, base: Path, results: Path) -> tuple[list[dict], str]:
    """The lines of a quick run and its table, which asking again without running prints once more."""
    arguments = ["--quick", "--model", str(base), "--results", str(results), "--threads", "1"]
    first = CliRunner().invoke(command(suite, "unused"), arguments, catch_exceptions=False)
    content = results.read_text()
    again = CliRunner().invoke(command(suite, "unused"), arguments, catch_exceptions=False)
    printed = CliRunner().invoke(command(suite, "unused"), [*arguments, "--no-run"], catch_exceptions=False)
    assert (first.exit_code, again.exit_code, printed.exit_code) == (0, 0, 0)
    assert again.stdout == printed.stdout
    assert first.stdout == again.stdout
    assert results.read_text() == content
    return [json.loads(line) for line in content.splitlines()], first.stdout


def test_the_grid_writes_each_data_with_both_engines(base: Path, tmp_path: Path) -> None:
    lines, table = lines_of("tests.benchmarks.write_grid", base, tmp_path / "grid.jsonl")
    cells = [(line["cell"]["data"], line["cell"]["engine"]) for line in lines]
    engines = (write_grid.DEFAULTS, write_grid.NETWORK)
    assert cells == [(data, engine) for data in ("phonebook", "text") for engine in engines]
    for line in lines:
        result, ours = line["result"], line["cell"]["engine"] == write_grid.DEFAULTS
        if ours:
            assert result["exact"] == result["written"] == result["records"]
            assert set(result["min_prob"]) == {"float32", "bfloat16"}
            assert result["placements"] == [[["down_proj"], [2]]]
        elif result["written"]:
            assert set(result["min_prob"]) == {"float32"}
            assert result["placements"][0][1] == [1, 2]
        else:
            assert result["error"].startswith("stopped after")
    assert f"| {base.name} | phonebook | 0 | 3/3 | 3/3 |" in table
    assert lines[0]["command"].startswith("python -m tests.benchmarks.write_grid --threads 1 --model tiny-qwen3")


def test_density_counts_the_source_bits_of_what_was_decoded(base: Path, tmp_path: Path) -> None:
    lines, table = lines_of("tests.benchmarks.density", base, tmp_path / "density.jsonl")
    assert [line["cell"]["rank"] for line in lines] == [None, 8]
    for line in lines:
        result = line["result"]
        assert result["exact"] == 2
        # Two values of one digit out of four and nine out of ten.
        assert result["source_bits_per_parameter"] == pytest.approx(2 * 31.897 / result["parameters"], rel=1e-2)
    assert lines[1]["result"]["ranks"] == [8]
    assert "| rank 8 | 0 | 2/2 | 2/2 |" in table


def test_a_deep_store_trains_through_the_network_in_one_dtype(base: Path, tmp_path: Path) -> None:
    make_deep(tmp_path / "deep", str(base), "cpu")
    with MemoryStore(tmp_path / "deep", create=False) as store:
        report = store.write(numbers(2))
        placements = {Placement(tuple(a.placement["modules"]), tuple(a.placement["layers"])) for a in store.adapters()}
        assert placements == {Placement.ladder(store.base.model)[-1]}
        assert report.served == {}
        assert store.verify().ok


def test_a_write_that_uses_up_its_seconds_is_stopped_and_says_so(base: Path, tmp_path: Path) -> None:
    records = [Record(key, value) for key, value in numbers(3).items()]
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        result = timed_write(store, records, 0.0, SETTINGS)
    assert result["written"] == 0
    assert result["error"].startswith("stopped after")
    assert result["failed"] == [record.key for record in records]


def line(engine: str, **result: object) -> dict[str, object]:
    usual = {"records": 2, "refused": {}, "written": 2, "failed": [], "error": None}
    usual |= {"seconds": 2.0, "cpu_s": 2.0, "training_cpu_s": 1.0}
    said = {"training_s": 1.0, "steps": 5, "min_prob": {"float32": 0.9, "bfloat16": 0.8}, "exact": 2, "adapters": 1}
    held = {"ranks": [4], "parameters": 100, "placements": [[["a.down_proj"], [3]]]}
    cell = {"model": "m", "data": "hex", "seed": 0, "engine": engine}
    return {"cell": cell, "result": {**usual, **said, **held, **result}}


def test_the_grid_names_what_is_not_as_it_should_be() -> None:
    ours = line(write_grid.DEFAULTS, written=1, failed=["k"], exact=0)
    table = write_grid.table([ours, line(write_grid.NETWORK, seconds=1.0)])
    assert table.notes[1:] == (
        "m, hex, 0: not certified: 'k'.",
        "m, hex, 0: decoded exactly: 0 of 1.",
        "m, hex, 0: through the network it took 1.00 s, less than 2.00.",
    )
    stopped = line(write_grid.NETWORK, written=0, failed=["k"], seconds=3.0, cpu_s=4.0, error="stopped after 3.0 s")
    table = write_grid.table([line(write_grid.DEFAULTS), stopped])
    assert table.rows[0][-2:] == ("> 1.5", "> 2.0")
    assert table.notes[1:] == ()


def test_density_orders_by_density_and_names_what_failed() -> None:
    def cell(rank: int, **result: object) -> dict[str, object]:
        made = line("", **result)
        return {**made, "cell": {"model": "m", "records": 2, "rank": rank, "seed": 0}}

    thin, dense = cell(8, source_bits_per_parameter=0.2), cell(4, source_bits_per_parameter=0.4)
    none = cell(1, written=0, failed=["k", "l"], error="stopped after 600.0 s")
    table = density.table([dense, none, thin])
    assert [row[2] for row in table.rows] == ["rank 1", "rank 8", "rank 4"]
    assert table.notes == ("m, 2 records, rank 1: stopped after 600.0 s.",)


def test_eight_bits_are_measured_with_and_without_training_for_them(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eight_bits.main([str(base), "--records", "3", "--rank", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bfloat16: moved by 0.") and lines[1].startswith("eight bits: moved by 0.")
    assert [line.partition(" outcomes")[0] for line in lines[-2:]] == ["trained over 0", "trained over 3"]
    assert lines[-1].count("0 wrong") == eight_bits.UNSEEN


def test_rounding_is_measured_in_each_way_of_decoding(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounding.rounding(str(base), rounding.near_keys(3))
    moved = [line for line in capsys.readouterr().out.splitlines() if "moved by" in line]
    assert [line.partition(":")[0] for line in moved] == ["one pass", "decoded in a batch", "decoded alone"]
    assert all(0 < float(line.split("moved by ")[1].split()[0]) < 1 for line in moved)


def test_chats_are_asked_that_were_trained_and_others_and_no_cell_twice(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "contexts.jsonl"
    asked = [str(base), "--records", "2", "--chats", "2", "--routed", "--out", str(out)]
    contexts.main(asked)
    contexts.main(asked)
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["alone"], line["in_trained_chats"], len(line["in_untrained_chats"])) == (2, [2, 2], 4)
    assert len(line["in_other_chats"]) == 6 and line["kept"] == []
    assert json.loads(capsys.readouterr().out) == line


def test_answers_are_compared_after_a_rounding_of_the_base(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert same_answers.first_difference([1, 2, 3], [1, 2]) == 3
    assert same_answers.first_difference([1, 2, 3], [1, 4, 3]) == 1
    monkeypatch.setattr("sys.argv", ["same_answers", str(base)])
    monkeypatch.setattr(same_answers, "held_out_questions", lambda: ["a", "b", "c"])
    same_answers.main()
    assert "float32, together and alone: 3 of 3 answers are the same" in capsys.readouterr().out


def test_a_smaller_shard_makes_more_adapters_in_the_table(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_sizes, "FILL", shard_sizes.FILL)  # which a measurement sets
    few, many = (
        dict(zip(shard_size.COLUMNS, shard_size.measure(str(base), 4, 0, fill, "fast", False), strict=True))
        for fill in (8.0, 0.2)
    )
    assert (few["records"], few["fill"], few["adapters"]) == ("4", "8", "1")
    assert int(many["adapters"]) > 1
    assert float(few["lowest p"]) >= SETTINGS.certify_threshold


def test_warm_recall_is_timed_beside_plain_generate(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_recall, "BATCH", 3)
    monkeypatch.setattr(warm_recall, "rate", lambda _: 1e9)  # of large matrices
    warm_recall.main([str(base), "--turns", "1", "--also", "bfloat16"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[2:]] == [
        *("plain generate", "recall", "recall_many of 3 in float32", "recall_many of 3 in bfloat16"),
        *("float32", "bfloat16"),
    ]
    assert "1.00 and 1.00 times" in lines[2] and "GFLOP a record" in lines[-1]


def test_the_endpoint_is_asked_by_many_clients(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        endpoint_load.compare(store, records=3, requests=12, clients=4, changing=True, model=str(base))
    out = capsys.readouterr().out
    assert "20 records written, 2 adapters compacted" in out
    assert "recall_many: 12 right" in out and "served: 12 answers, 0 wrong, 0 failed" in out


def test_llama_cpp_is_asked_on_each_file_of_a_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(numbers(3))
    llama_cpp.main([str(tmp_path / "memory"), "--of", str(base), "--types", "F32", "F16"])
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        ("tiny-qwen3-F32.gguf", "3/3"),
        ("tiny-qwen3-F16.gguf", "3/3"),
    ]
    assert float(rows[0][3]) == pytest.approx(float(rows[0][4]), abs=0.1)  # its cache of keys has half precision


def test_a_job_is_trained_at_one_rank_after_the_other_until_one_fails(base: Path, tmp_path: Path) -> None:
    lines, table = lines_of("tests.benchmarks.first_rank", base, tmp_path / "first-rank.jsonl")
    (result,) = (line["result"] for line in lines)
    (shard,) = result["shards"]
    assert (shard["length"], shard["tokens"]) == (20, 22)  # two phone numbers and their end tokens
    assert 5 < shard["vocabulary"] <= shard["distinct"] <= 11
    assert [trial["rank"] for trial in result["trials"]] == [8, 2][: len(result["trials"])]
    assert result["trials"][0]["certified"]
    assert "| fast: law of loramem-tiny | tiny-qwen3 | 1 | 1/1 |" in table
    assert "| small: law | tiny-qwen3 |" not in table  # nothing is known of it


def test_losses_are_crossed_with_schedules(base: Path, tmp_path: Path) -> None:
    lines, table = lines_of("tests.benchmarks.memft_schedules", base, tmp_path / "schedules.jsonl")
    assert [(line["cell"]["method"], line["result"]["steps"]) for line in lines] == [
        ("memft-ot", 3 * 2),  # 3 epochs of two batches of 10
        ("memft-sw", 1 + 5),  # 4 records once, all of them once
        ("sft", 3 * 2),
        ("memft-sw", 1 + 2 * 2),  # shortened, even no curriculum begins with a part
    ]
    assert "| tiny-qwen3 | 20 | 16 | memft-sw | curriculum, 200 passes, batches of 4 | 1 | 6 |" in table


def test_two_bases_whose_law_is_one_of_parameters_are_on_one_law(tmp_path: Path) -> None:
    run, *_ = (one for one in read_runs(shipped_file()) if one.over_features)
    runs = tmp_path / "runs.jsonl"
    for base, per_rank in (("small", 1000), ("wide", 2000)):
        for rank in (1, 2, 4, 8):
            for length in (100, 200, 400):
                fields = {"kind": "random", "rank": rank, "length": length, "parameters": rank * per_rank}
                law = 3 * (rank * per_rank / 1000) ** 0.5 * (length / 100) ** -0.3
                losses = {"base_loss": 20.0, "final_loss": 20.0 - law}
                append_run(runs, replace(run, **fields, **losses, conditions={**run.conditions, "base_model": base}))
    out = CliRunner().invoke(last_layer_laws.main, ["--runs", str(runs)], catch_exceptions=False).stdout
    assert out.count("| 1.0000 | 0.0 | 0.0 | 0.0 | 12 | 0 |") == 2
    row = next(line for line in out.splitlines() if line.startswith("| random | ") and line.count("|") == 7)
    _, kind, by_rank, by_parameters, *_, worth, _ = (cell.strip() for cell in row.split("|"))
    assert (kind, by_parameters, worth) == ("random", "1.000, 0.0", "2.0 (2.0–2.0), 1.000")
    assert by_rank < by_parameters


def job(shards: tuple[float, ...] = (100.0,)) -> dict:
    """A job that takes rank 4, in shards of these vocabularies."""
    trials = [{"rank": rank, "certified": rank >= 4, "cpu_s": 10.0 / rank, "stopped": False} for rank in (8, 4, 2)]
    return {
        "cell": {"model": "loramem-tiny", "ladder": [1, 2, 4, 8, 16]},
        "result": {
            "shards": [{"vocabulary": each, "cost_bits": 1000.0, "length": 100} for each in shards],
            "trials": trials,
            "parameters_per_rank": 500,
        },
    }


@pytest.mark.parametrize(
    ("asked", "rank", "certified", "cpu_s"),
    [(1, 1, False, 5.0), (2, 2, False, 5.0), (2.1, 4, True, 2.5), (7, 8, True, 1.25), (9, 16, True, 1.25)],
)
def test_a_rule_is_judged_by_the_trial_of_its_rank(asked: float, rank: int, certified: bool, cpu_s: float) -> None:
    found = first_rank_rules.choose(job(), lambda *_: asked)
    assert found == first_rank_rules.Choice(rank, 4, certified, cpu_s)


def test_the_highest_rank_of_a_jobs_shards_counts_and_a_rule_may_have_no_answer() -> None:
    found = first_rank_rules.choose(job((3.0, 7.0, 1.0)), lambda shard, _: shard["vocabulary"])
    assert found is not None and found.rank == 8
    assert first_rank_rules.choose(job((3.0, 7.0)), lambda shard, _: None if shard["vocabulary"] > 5 else 1) is None


def test_the_density_in_hindsight_is_the_highest_that_certifies_enough() -> None:
    lines = [job()] * 3  # rank 4 is half a bit per parameter
    density = first_rank_rules._densest(lines)
    assert 0.5 <= density < 1.0 and all(
        (choice := first_rank_rules.choose(line, first_rank_rules._dense(density))) and choice.certified
        for line in lines
    )
    assert first_rank.MIDDLE in first_rank.LADDER


class Thread(ThreadPoolExecutor):
    """In place of a process."""

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, fn: Callable[..., object], /, *args: object, **kwargs: object) -> Future:
        return super().submit(store_growth.timed, fn, *args, **kwargs)

    def took(self) -> store_growth.Took:
        return replace(super().submit(store_growth.told).result())


def test_a_growing_store_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_growth, "Worker", Thread)
    asked = [str(tmp_path), "--batch", "2", "--records"]
    store_growth.main([*asked, "2"])
    store_growth.main([*asked, "6", "--stream"])
    lines = [json.loads(line) for line in (tmp_path / store_growth.RESULTS).read_text().splitlines()]
    assert [(line["records"], line["stream"]) for line in lines] == [(2, False), (4, True), (6, True)]
    assert all(line["exact_match"] == 1 and line["parent_ms"] > 0 for line in lines)
    with MemoryStore(tmp_path / "memory", create=False) as store:
        steps = [adapter.training["steps"] for adapter in store.adapters()]
    assert [line["steps"] for line in store_growth.with_steps(tmp_path)] == steps
    assert sum(line["worker_ms"] for line in lines) > 0  # of a stream some is done in the batch before


def test_a_store_is_measured_as_it_is_and_smaller(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_sizes.Size, "shard_tokens", lambda *_: 6)  # two records of two digits
    monkeypatch.setattr(store_size, "ran", lambda *_: (1.0, 2.0))
    monkeypatch.setattr(store_size, "called", lambda *_: (3.0, 4.0))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(numbers(6, 2))
    asked = [str(tmp_path), "--sizes", "2,4", "--turns", "1", "--results", str(tmp_path / "results.jsonl")]
    for _ in range(2):
        store_size.main(asked)
        lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert [line["records"] for line in lines] == [6, 4, 2]
        assert lines[0]["commands"]["stats"] == [1.0, 2.0] and lines[0]["calls"]["delete"] == [3.0, 4.0]
    with MemoryStore(tmp_path / "memory", create=False) as store:
        assert len(store) == 6


def test_the_parent_model_measures_a_process_and_counts_on(tmp_path: Path) -> None:
    measured = parent_model.measure(tmp_path, 40, None)
    assert measured.syncs >= 4 and measured.records == 40 and min(measured.computing_ms, measured.job_kb) > 0
    # By hand: 200 records of 0.125 ms; 4 syncs of 1 ms by eight threads; 12 s / 500 workers.
    parent = parent_model.Parent(0.125, 0.0, 2_000, 4, 1.0, 200, 30, 30)
    assert parent.shard_s(500) == pytest.approx(0.025) and parent.saturated(500) == "this process"
    assert parent.used(500) == pytest.approx(24 / 25)
    assert parent.shard_s(100) == pytest.approx(0.120) and parent.saturated(100) == "workers"
    assert replace(parent, sync_ms=80.0).shard_s(10_000) == pytest.approx(0.040)
    assert replace(parent, alone_s=1.6).shard_s(10_000) == pytest.approx(0.185)  # a tenth of a batch's
