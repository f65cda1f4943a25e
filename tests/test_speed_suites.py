"""The comparisons of speed: the paper's unit and schedule, the Trainer's loop, and the runner that times them."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loramem_cli.main import run
from peft import LoraConfig

from loramem import Record
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.layers import decoder_layers
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.suites import baselines, large_base, recall_speed, report, runner, write_scaling, write_speed
from loramem.suites import paper_recipe as paper
from loramem.suites.baselines import same_placement, trainer_loop
from loramem.suites.paper_recipe import paper_recipe
from loramem.suites.paper_schedule import Schedule
from loramem.suites.paper_unit import PaperUnit, attached, paper_layer
from loramem.suites.timing import count_exact, warm_up

from .conftest import ROOT, numbers


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base), device="cpu")


@pytest.fixture(scope="module")
def records(loaded: BaseModel) -> list[EncodedRecord]:
    return encode_records(
        [Record(key, value) for key, value in numbers(5).items()], loaded.tokenizer, loaded.template, loaded.max_tokens
    )


def logits(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=torch.arange(4, 16)[None]).logits


# The paper's unit


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_neox"])
def test_the_unit_adds_x_a_b_to_the_output_of_layer_k(base_of: Callable[..., Path], architecture: str) -> None:
    base = load_base_model(str(base_of(architecture)), device="cpu")
    layer = decoder_layers(base.model)[paper_layer(3)]
    seen: dict[str, torch.Tensor] = {}

    def outputs() -> torch.Tensor:
        handles = [
            layer.mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
            layer.register_forward_hook(lambda _, __, out: seen.update(h=out if torch.is_tensor(out) else out[0])),
        ]
        result = logits(base)
        for handle in handles:
            handle.remove()
        return result

    plain = outputs()
    block, x = seen["h"], seen["x"]
    unit = PaperUnit(base.model, 4, seed=0).eval()
    with attached(unit, base.model):
        assert torch.equal(logits(base), plain)  # B is zero
        torch.nn.init.normal_(unit.B)
        changed = outputs()
    by_hand = block + torch.einsum("btd,dr,re->bte", x, unit.A, unit.B)
    assert torch.allclose(seen["h"], by_hand, atol=1e-5)
    assert not torch.allclose(changed, plain)
    assert torch.equal(logits(base), plain)  # detached


def test_the_unit_starts_and_drops_out_as_published(loaded: BaseModel) -> None:
    # The reference code was run: max |A| 0.5 at rank 4, that is 1/√r, not the usual 1/√d.
    unit = PaperUnit(loaded.model, 4, seed=0).requires_grad_(False)
    assert 0.45 < float(unit.A.abs().max()) <= 0.5
    assert float(unit.B.abs().max()) == 0
    assert unit.parameter_count == 2 * 64 * 4
    torch.nn.init.normal_(unit.B)
    x = torch.ones(4, 50, 64)
    kept, whole = unit.train()(x), unit.eval()(x)
    dropped = kept == 0
    assert 0.05 < float(dropped.float().mean()) < 0.15
    assert torch.allclose(kept[~dropped], whole[~dropped] / 0.9)


def test_the_unit_sits_at_the_papers_depth() -> None:
    assert (paper_layer(36), paper_layer(6)) == (24, 4)


# The paper's recipe


def test_the_recipe_runs_its_schedule_and_leaves_the_base_alone(
    loaded: BaseModel, records: list[EncodedRecord]
) -> None:
    before = logits(loaded)
    result = paper_recipe(
        loaded, records, seed=0, cap_s=60, rank=8, schedule=Schedule(1e-2, 80, 5, (20, 40, 60, 70, 80))
    )
    assert (result["steps"], result["planned_steps"], result["capped"]) == (80, 80, False)
    assert result["parameters"] == 2 * 64 * 8
    assert result["exact"] > 0
    assert torch.equal(logits(loaded), before)


def test_a_capped_recipe_says_so(loaded: BaseModel, records: list[EncodedRecord]) -> None:
    result = paper_recipe(loaded, records, seed=0, cap_s=0)
    assert (result["steps"], result["planned_steps"], result["capped"]) == (0, 300, True)


def test_a_batch_without_stubborn_tokens_changes_nothing(
    loaded: BaseModel, records: list[EncodedRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = PaperUnit(loaded.model, 4, seed=0)
    optimizer = torch.optim.AdamW(unit.parameters(), lr=1e-2)
    paper._paper_step(loaded, unit, [records], optimizer, bfloat16=False)
    before = [parameter.clone() for parameter in unit.parameters()]
    monkeypatch.setattr(paper, "memft_ot", lambda losses, *_, **__: torch.zeros_like(losses))
    paper._paper_step(loaded, unit, [records], optimizer, bfloat16=False)
    assert all(torch.equal(old, new) for old, new in zip(before, unit.parameters(), strict=True))


# The Trainer


def test_the_trainer_trains_until_every_record_is_exact(
    loaded: BaseModel, records: list[EncodedRecord], capfd: pytest.CaptureFixture[str]
) -> None:
    before = logits(loaded)
    result = trainer_loop(
        loaded, records, same_placement(loaded, 8), learning_rate=1e-2, batch_records=3, seed=0, cap_s=60
    )
    assert (result["exact"], result["records"], result["capped"]) == (5, 5, False)
    assert result["steps"] == 2 * result["epochs"]
    assert 0 < result["min_prob"] <= 1
    assert 0 < result["loss"] < -math.log(result["min_prob"])
    assert result["seconds"] > 0 < result["eval_s"]
    assert torch.equal(logits(loaded), before)
    assert count_exact(loaded, records) == 0  # without the adapter
    assert capfd.readouterr().out == ""


def test_a_capped_trainer_is_scored_as_it_is(loaded: BaseModel, records: list[EncodedRecord]) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    result = trainer_loop(loaded, records, config, learning_rate=1e-4, batch_records=2, seed=0, cap_s=0)
    assert (result["capped"], result["steps"], result["exact"]) == (True, 1, 0)


def test_only_answer_and_end_token_are_supervised(records: list[EncodedRecord]) -> None:
    row, record = baselines._labelled(records[0]), records[0]
    assert row["input_ids"] == [*record.prompt_ids, *record.answer_ids]
    assert [label for label in row["labels"] if label != -100] == list(record.answer_ids)
    assert row["labels"][: len(record.prompt_ids)] == [-100] * len(record.prompt_ids)


# write-speed


SMALL, LARGE = 5_000_000, 135_000_000  # parameters of a base


def scripted(
    request: runner.SuiteOptions, seconds: Callable[[write_speed.Cell], float], base: int = SMALL
) -> list[dict[str, object]]:
    """Lines of a run in which every cell trains for the seconds given, or up to its cap; ours takes as long again."""
    results: dict[str, dict[str, object]] = {}
    lines: list[dict[str, object]] = []
    for cell in write_speed.cells(request, lambda cell: results[json.dumps(cell.identity)]):
        took = seconds(cell)
        capped = took > cell.cap_s
        ours = {"seconds": 2 * took, "training_s": took} if cell.method == write_speed.OURS else {}
        result = {
            **{"seconds": min(took, cell.cap_s), "capped": capped, "exact": cell.records - capped, "steps": 10},
            **{"records": cell.records, "min_prob": 0.7, "parameters": 1000, "source_bits_per_parameter": 1.0},
            **{"peak_memory_mb": 300.0, "learning_rate": cell.learning_rate, "batch": cell.batch},
            **{"bfloat16": cell.precision == "auto", "loss": took / 1000, "base": {"base_parameters": base}},
            **{"rank": 8, "planned_steps": 20, "cap_s": cell.cap_s, **ours},
        }
        results[json.dumps(cell.identity)] = result
        lines.append({"cell": {**cell.identity, "cap_s": cell.cap_s}, "result": result})
    return lines


def took(cell: write_speed.Cell) -> float:
    if cell.method == write_speed.OURS:
        return cell.records / 100 + cell.seed
    if cell.method == write_speed.PAPER:
        return 1e6
    slower = abs(math.log10((cell.learning_rate or 1) / 3e-3)) + abs((cell.batch or 0) - 16) / 16
    return 8 * (1 + slower) * (1.5 if cell.precision == "auto" else 1)


def test_baselines_are_tuned_at_the_smallest_size_and_capped_by_our_training() -> None:
    lines = scripted(runner.SuiteOptions(seeds=3), took)
    tuned = [line for line in lines if line["cell"]["tuning"]]
    assert {line["cell"]["records"] for line in tuned} == {100}
    assert len(tuned) == 6 * 3 + 5 * 3
    assert {line["cell"]["precision"] for line in tuned} == {"float32"}
    chosen = {
        (line["cell"]["method"], line["cell"]["learning_rate"], line["cell"]["batch"], line["cell"]["precision"])
        for line in lines
        if line["cell"]["method"] in write_speed.RATES and not line["cell"]["tuning"]
    }
    methods, precisions = (write_speed.PLACED, write_speed.USUAL), ("float32", "auto")
    assert chosen == {(method, 3e-3, 16, precision) for method in methods for precision in precisions}
    fastest = 25 * 2.0 / 1.1  # of our median at 100 records, 2 s of training
    for line in tuned[:18]:  # a candidate gets hardly more time than the best took
        assert line["cell"]["cap_s"] == pytest.approx(1.1 * fastest)
        fastest = min(fastest, line["result"]["seconds"] if not line["result"]["capped"] else math.inf)
    caps = {(c["method"], c["records"]): c["cap_s"] for c in (line["cell"] for line in lines) if not c["tuning"]}
    assert caps[write_speed.PAPER, 100] == 25 * 2  # median of 1, 2 and 3 s
    assert caps[write_speed.PLACED, 400] == 25 * 5
    seeds = [c["seed"] for c in (line["cell"] for line in lines) if c["method"] == write_speed.PAPER]
    assert seeds == [0, 1, 2, 0]  # three at 100 records, one at 400


def test_on_a_large_base_a_few_rates_are_tried_for_a_part_of_the_cap_and_the_others_run_once() -> None:
    lines = scripted(runner.SuiteOptions(records=(100,)), lambda cell: 20 * took(cell), LARGE)
    others = [line["cell"] for line in lines if line["cell"]["method"] != write_speed.OURS]
    cap_s = 25 * 20 * 2.0
    assert [(c["method"], c["tuning"], c["learning_rate"], c["precision"], c["cap_s"]) for c in others] == [
        (write_speed.PAPER, False, None, "auto", cap_s),
        (write_speed.USUAL, True, 1e-3, "float32", 0.4 * cap_s),
        (write_speed.USUAL, True, 3e-4, "float32", 1.1 * 20 * took(trial(1e-3))),  # the first was done by then
        (write_speed.USUAL, True, 3e-3, "float32", 1.1 * 20 * took(trial(1e-3))),
        (write_speed.USUAL, False, 3e-3, "float32", cap_s),
        (write_speed.USUAL, False, 3e-3, "auto", cap_s),
    ]
    assert {c["batch"] for c in others if c["method"] == write_speed.USUAL} == {8}


def test_of_candidates_that_were_all_stopped_the_one_with_the_lowest_loss_is_taken() -> None:
    lines = scripted(runner.SuiteOptions(records=(100,)), lambda cell: took(cell) * (100 if cell.batch else 1), LARGE)
    trials = [line for line in lines if line["cell"]["tuning"]]
    assert all(line["result"]["capped"] for line in trials)
    best = min(trials, key=lambda line: line["result"]["loss"])["cell"]["learning_rate"]
    assert {line["cell"]["learning_rate"] for line in lines if line["cell"]["batch"] and line not in trials} == {best}


def trial(rate: float) -> write_speed.Cell:
    return write_speed.Cell(
        write_speed.USUAL, 100, 0, "loramem-tiny", "auto", quick=False, tuning=True, learning_rate=rate, batch=8
    )


def test_the_table_has_medians_ranges_and_what_was_stopped() -> None:
    table = write_speed.table(scripted(runner.SuiteOptions(seeds=3), took))
    cells = {(row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert len(cells) == 12
    assert cells["100", "loramem"]["training seconds to every record exact"] == "2.00 (1.00–3.00)"
    assert cells["100", "loramem"]["whole write s"] == "4.00 (2.00–6.00)"
    assert cells["100", "paper recipe"]["training seconds to every record exact"] == "> 50.0, exact 99/100"
    assert cells["100", "paper recipe"]["times our training"] == "> 25.0"
    assert cells["100", "paper recipe"]["times our whole write"] == "> 12.5"
    assert cells["400", "Trainer, all-linear"]["times our training"] == "1.6"
    assert cells["400", "Trainer, all-linear, bfloat16"]["times our training"] == "2.4"
    assert cells["400", "Trainer, all-linear, bfloat16"]["times our whole write"] == "1.2"


def test_the_committed_results_of_the_suite_still_make_tables() -> None:
    lines, skipped = report.parse((ROOT / "docs/results/write-speed.jsonl").read_text(), "write-speed.jsonl")
    (section,) = report.build(lines, skipped).sections
    assert sum(len(part.lines) for part in section.parts) == len(lines) > 0


def cell_of(base: Path, method: str = write_speed.OURS, **settings: object) -> write_speed.Cell:
    return replace(write_speed.Cell(method, 4, 0, str(base), "cpu", quick=True), **settings)


def test_our_cell_is_exact_and_says_what_it_took(base: Path) -> None:
    result = write_speed.run(cell_of(base))
    assert (result["exact"], result["records"], result["capped"]) == (4, 4, False)
    assert 0 < result["training_s"] < result["seconds"] <= result["call_s"]
    assert result["source_bits_per_parameter"] == round(4 * 31.897 / result["parameters"], 4)
    line = {"cell": {"seed": 0}, "result": {**result, "peak_memory_mb": 300.0}}
    (row,) = write_scaling.table([line]).rows
    assert row[0] == "4"


def test_the_placed_trainer_spends_as_many_parameters_as_ours(base: Path) -> None:
    ours = 2 * 8 * 1000  # the rank is what comes nearest
    cell = cell_of(base, write_speed.PLACED, learning_rate=1e-2, batch=4, cap_s=0.0, parameters=ours)
    result = write_speed.run(cell)
    assert abs(result["parameters"] - ours) <= result["parameters"] / result["rank"] / 2


# recall-speed


def test_every_way_of_reading_gives_the_records_back(base: Path) -> None:
    cell = recall_speed.Cell(6, 0, str(base), "cpu", None, 4)
    result = recall_speed.run(cell)
    assert (result["records"], result["exact"], result["recall_many_exact"]) == (6, 6, 6)
    assert (result["sample"], result["generate_exact"]) == (4, 4)
    assert (len(result["cold_s"]), len(result["warm_s"])) == (1, 3)
    assert result["generate_s"] == pytest.approx(sum(result["generate_call_s"]) * 6 / 4)
    table = recall_speed.table([{"result": result}])
    assert [row[1] for row in table.rows][:3] == ["verify", "recall_many", "model.generate per record"]
    assert "scaled" in table.notes[0]


def quick_shard(records: int, model: str = "loramem-tiny") -> tuple[runner.Result, dict[str, str]]:
    """What a shard of the suite for large bases took, and its row of the table."""
    request = runner.SuiteOptions(records=(records,), model=model, device="cpu", quick=True)
    (cell,) = large_base.cells(request, lambda _: {})
    result = large_base.run(cell)
    table = large_base.table([{"result": {**result, "peak_memory_mb": 1.0}}])
    return result, dict(zip(table.columns, table.rows[0], strict=True))


def test_a_shard_on_a_random_base_of_a_given_shape_is_measured_by_phase_and_written() -> None:
    result, row = quick_shard(5)
    assert (result["exact"], result["written"], result["rank"]) == (5, 5, large_base.RANK)
    assert result["base"]["base_model"] == row["base"] == "random-qwen3"
    assert all(result[f"{phase}_s"] > 0 for phase in large_base.PHASES)
    assert (result["positions"], row["positions"]) == (55, "55")  # ten digits and the end token
    assert (row["exact"], row["written"], row["device MB at the peak of each phase"]) == ("5/5", "5/5", "-")
    assert set(result["batches"]) == {"features", "training", "proof"}


def test_a_shard_that_is_too_large_to_be_written_is_stepped_over(base: Path) -> None:
    result, row = quick_shard(40, str(base))
    assert result["steps"] == large_base.STEPS
    assert result["step_ms"] > 0
    assert (row["base"], row["written"], row["proof s"]) == (base.name, "-", "-")


def test_warming_up_changes_no_weights(loaded: BaseModel) -> None:
    before = logits(loaded)
    warm_up(loaded)
    assert torch.equal(logits(loaded), before)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


# The command


def test_the_list_names_every_suite_and_cells_are_listed_without_torch() -> None:
    code = (
        "import sys\nfrom loramem_cli.main import run\nrun(['suite', 'list'])\n"
        "from loramem.suites import linear_rule, long_context, runner\n"
        "assert all(list(suite.cells(runner.SuiteOptions(), None)) for suite in (linear_rule, long_context))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(runner.SUITES)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["write-speed", "--records", "0"], ["write-speed", "--seeds", "0"]]
)
def test_a_wrong_request_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["suite", "run", *arguments]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_quick_runs_have_every_method_and_ours_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "quick.jsonl")
    assert run(["suite", "run", "write-speed", "--quick", "--threads", "1", "--json", "--out", out]) == 0
    document = json.loads(capsys.readouterr().out)
    results = {line["cell"]["method"]: line["result"] for line in document["lines"]}
    assert set(results) == {write_speed.OURS, write_speed.PLACED, write_speed.USUAL, write_speed.PAPER}
    assert results[write_speed.OURS]["exact"] == results[write_speed.OURS]["records"] == 10
    assert {row[1].removesuffix(", bfloat16") for row in document["table"]["rows"]} == set(results)
    assert run(["suite", "run", "write-speed", "--quick", "--threads", "1", "--out", out]) == 0  # from the file
    assert capsys.readouterr().out.startswith("| records | method |")
    assert run(["suite", "run", "write-speed", "--no-run", "--threads", "1", "--out", out]) == 0
    assert capsys.readouterr().out.startswith("| records | method |")
    assert run(["suite", "run", "recall-speed", "--no-run", "--threads", "1", "--out", out]) == 2
    assert run(["suite", "run", "recall-speed", "--quick", "--threads", "1"]) == 0
    assert "| verify |" in capsys.readouterr().out
