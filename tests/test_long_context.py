"""The long-context suite: its texts, the score by position, means over lengths, and tiny cells."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loramem import Record, base_path
from loramem.embedded.corpus import is_held_out
from loramem.errors import InputError, TooLong
from loramem.models.base_model import load_base_model
from loramem.planning.long_text import noise_places, text_ids, with_noise
from loramem.records.prompts import EncodedRecord
from loramem.suites import figures, long_context, positions
from loramem.suites.long_context import Cell, documentation
from loramem.suites.positions import Forced, scores
from loramem.suites.runner import SuiteOptions
from loramem.training import shard_training, trainer
from loramem.training.trainer import NetworkSchedule

from .conftest import SHARED

# Texts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_path())


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@given(st.integers(1, 12_000), st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
def test_noise_is_spread_as_published(length: int, noise: float) -> None:
    count = round(length * noise)
    exactly = [math.floor((i + Fraction(1, 2)) * length / count) for i in range(count)]
    assert sorted(noise_places(length, noise)) == exactly
    for end in {1, length // 3, length - 1}:  # every prefix has the nominal share, to half a token
        assert abs(len([place for place in exactly if place < end]) - Fraction(count * end, length)) <= Fraction(1, 2)


MIXED = "Grüße, 漢字 🎲: f(x) = 3x\n" * 6


@settings(max_examples=40)
@given(st.integers(1, 60))
def test_a_text_is_cut_where_its_tokens_are_read_again(tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    found = text_ids(tokenizer, MIXED, length)
    assert found == ids(tokenizer, MIXED)[: len(found)]
    assert ids(tokenizer, tokenizer.decode(found)) == found
    assert length - 4 <= len(found) <= length  # a character has up to four bytes, and each may be a token


def test_a_text_that_is_too_short_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"has 1 tokens of this base model, 1,000 are asked for"):
        text_ids(tokenizer, "a", 1000)
    with pytest.raises(ValueError, match="length must be at least 1"):
        text_ids(tokenizer, "a", 0)


def test_excluded_tokens_are_not_drawn(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = text_ids(tokenizer, documentation(), 200)
    usual = set(ids(tokenizer, with_noise(tokenizer, plain, 1.0, 0)))
    excluded = set(range(1000, len(tokenizer)))
    assert usual & excluded
    assert not set(ids(tokenizer, with_noise(tokenizer, plain, 1.0, 0, excluded))) & excluded


def test_the_documentation_begins_with_what_the_embedded_base_never_saw() -> None:
    from pydoc_data.topics import topics

    held_out = [name for name in topics if is_held_out(f"topic:{name}")]
    begin = "\n\n".join(topics[name] for name in sorted(held_out))
    assert len(held_out) == 3
    assert documentation().startswith(begin)
    assert documentation(1) != documentation()
    assert len(documentation(1)) == len(documentation()) == sum(map(len, topics.values())) + 2 * (len(topics) - 1)


# Cells


def request(**fields: Any) -> SuiteOptions:
    return SuiteOptions(**{"ranks": (1,), "lengths": (10,), "methods": ("sft", "loramem"), **fields})


def cells(asked: SuiteOptions) -> list[Cell]:
    return list(long_context.cells(asked, lambda cell: {}))


def test_the_grid_has_three_texts_two_lengths_three_ranks_and_four_methods() -> None:
    found = cells(SuiteOptions())
    assert len({json.dumps(cell.identity) for cell in found}) == 3 * 2 * 3 * 4
    assert {cell.unit for cell in found} == {"branch"}


def test_the_published_grid_goes_as_far_as_the_context(base: Path) -> None:
    found = cells(SuiteOptions(model=str(base), paper=True, methods=("memft-ot",)))
    assert {cell.length for cell in found} == {50, 100, 200, 500}  # of 1,024 tokens
    assert {cell.noise for cell in found} == {0, 0.2, 0.4, 0.6, 0.8, 1}
    assert max(cell.rank for cell in found if cell.noise == 0.8) == 16
    assert max(cell.rank for cell in found if cell.noise == 1) == 512
    assert max(cell.length for cell in cells(SuiteOptions(paper=True, methods=("sft",)))) == 10_000


def test_a_file_of_ones_own_gets_noise_and_a_record_has_its_own(tmp_path: Path) -> None:
    text, record = tmp_path / "mine.txt", tmp_path / "r20.jsonl"
    text.write_text("Some words. " * 40)
    record.write_text(json.dumps({"question": "What is it?", "matching": "a text", "noise_ratio": 0.2}) + "\n")
    assert {cell.noise for cell in cells(request(data=text))} == {0, 0.4, 1}
    (cell, _) = cells(request(data=record))
    assert (cell.noise, cell.source) == (None, "r20.jsonl")
    assert long_context.read_source(record) == ("What is it?", "a text")
    assert long_context.text_name("r20.jsonl", None) == "r20.jsonl"
    assert long_context.text_name("topics", 0.4) == "r40"
    assert long_context.text_name("mine.txt", 0.4) == "mine.txt r40"


def test_results_name_no_folder_and_another_text_is_another_measurement(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Some words.")
    before = cells(request(data=path))[0].identity
    assert str(tmp_path) not in json.dumps(before)
    path.write_text("Other words.")
    assert cells(request(data=path))[0].identity != before


def test_files_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    two, binary = tmp_path / "two.jsonl", tmp_path / "image.txt"
    two.write_text('{"question": "a", "matching": "b"}\n{"question": "c", "matching": "d"}\n')
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"two\.jsonl has 2 records"):
        cells(request(data=two))
    with pytest.raises(InputError, match=r"image\.txt cannot be read"):
        cells(request(data=binary))


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the paper's data are not here")
@pytest.mark.parametrize("name", ["r0", "r40", "r100"])
def test_the_papers_files_are_taken_as_they_are(name: str) -> None:
    path = SHARED / "data" / "long_context" / f"{name}.jsonl"
    base = load_base_model(device="cpu")
    record = long_context.encoded(cells(request(data=path, lengths=(100,)))[0], base)
    assert record.record.key == "Please output the content of the vector memory injected into the activations."
    assert json.loads(path.read_text())["matching"].startswith(record.record.value)
    assert 96 <= record.length <= 100


# Scores


def entry(answer: list[int]) -> EncodedRecord:
    return EncodedRecord(Record("key", "value"), (1,), (*answer, 9))


def forced(probabilities: list[float], correct: list[bool]) -> Forced:
    return Forced(-torch.tensor(probabilities, dtype=torch.float64).log(), torch.tensor(correct))


def test_scores_by_hand() -> None:
    seen = forced([0.9, 0.5, 0.8, 0.4, 0.7], [True, True, True, False, False])
    found = scores(entry([5, 6, 7, 8]), [5, 6, 0, 8, 3, 3], seen)
    assert found["token_accuracy"] == 0.75
    assert found["forced_accuracy"] == 0.75  # the end token does not count
    assert (found["exact"], found["ended"]) == (False, False)
    assert (found["first_failure"], found["earliest_stubborn"]) == (2, 1)  # p = 0.5 is not learned
    assert (found["min_prob"], found["end_prob"]) == (0.4, 0.7)
    assert found["final_loss"] == pytest.approx(-math.log(0.9 * 0.5 * 0.8 * 0.4) / 4, rel=1e-5)


def test_an_exact_answer_without_its_end_is_exact_and_has_not_ended() -> None:
    seen = forced([0.9, 0.8, 0.1], [True, True, False])
    found = scores(entry([5, 6]), [5, 6, 3, 3], seen)
    assert (found["exact"], found["ended"], found["token_accuracy"]) == (True, False, 1.0)
    assert (found["first_failure"], found["earliest_stubborn"]) == (None, None)
    assert scores(entry([5, 6]), [5, 6], seen)["ended"]


def test_an_answer_that_ends_early_fails_where_it_ends() -> None:
    found = scores(entry([5, 6, 7, 8]), [5], forced([0.9] * 5, [True] * 5))
    assert (found["token_accuracy"], found["first_failure"], found["ended"]) == (0.25, 1, False)


def test_weights_that_are_not_finite_have_no_loss_and_nothing_learned() -> None:
    found = scores(entry([5, 6]), [0, 0, 0], forced([math.nan] * 3, [False] * 3))
    assert (found["final_loss"], found["min_prob"], found["earliest_stubborn"]) == (None, None, 0)
    json.dumps(found, allow_nan=False)


def test_teacher_forcing_and_decoding_agree_with_the_model(base: Path) -> None:
    loaded = load_base_model(str(base), device="cpu")
    record = long_context.encoded(cells(request(model=str(base), lengths=(12,)))[0], loaded)
    tokens = torch.tensor([[*record.prompt_ids, *record.answer_ids]])
    with torch.no_grad():
        logits = loaded.model(input_ids=tokens).logits[0, len(record.prompt_ids) - 1 : -1].float()
    seen = positions.teacher_forced(loaded, record)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(record.answer_ids), reduction="none")
    assert torch.allclose(seen.losses, expected, atol=1e-4)
    assert seen.correct.tolist() == (logits.argmax(-1) == torch.tensor(record.answer_ids)).tolist()
    assert seen.answer_loss == pytest.approx(float(expected[:-1].mean()), abs=1e-4)
    decoded = positions.free_running(loaded, record)
    assert (decoded[:1] == list(record.answer_ids[:1])) == bool(seen.correct[0])


# Tables and plots


def line(method: str, rank: int, length: int, accuracy: float, noise: float | None = 1.0) -> dict[str, Any]:
    cell = {
        "source": "topics", "digest": "0", "noise": noise, "length": length, "rank": rank, "method": method,
        "unit": "branch", "layer": None, "seed": 0, "cut": 1,
    }  # fmt: skip
    result = {
        "seconds": 1.0, "steps": 2000, "placement": "branch of layer 4", "parameters": 512 * rank, "length": length,
        "token_accuracy": accuracy, "forced_accuracy": 0.9,
        "base_accuracy": 0.1, "exact": accuracy == 1, "ended": False, "first_failure": 3, "earliest_stubborn": None,
        "base_loss": 9.25, "final_loss": 1.5,
    }  # fmt: skip
    return {"cell": cell, "result": result}


LINES = [
    line("sft", 1, 100, 0.5),
    line("sft", 1, 400, 0.1),
    line("sft", 4, 100, 1.0),
    line("loramem", 1, 100, 0.75),
    line("loramem", 1, 400, 0.25),
    line("sft", 1, 100, 0.2, noise=0.4),
]


def test_a_row_tells_what_was_decoded_and_where_it_failed() -> None:
    table = long_context.table(LINES)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["text"], row["tokens"], row["placement"], row["token accuracy, %"]) == (
        *("r100", "100", "branch of layer 4", "50.0"),
    )
    assert (row["exact"], row["ended"], row["first failure"], row["earliest stubborn"]) == ("no", "no", "3", "-")
    assert (row["base loss"], row["final loss"]) == ("9.250", "1.500")


def test_means_need_every_length() -> None:
    found = long_context.means(long_context.grids(LINES, "token_accuracy")["r100"])
    assert found == {"sft": {1: pytest.approx(30.0)}, "loramem": {1: pytest.approx(50.0)}}
    notes = " ".join(long_context.table(LINES).notes)
    assert "r100, sft: token accuracy, mean over 100, 400 tokens, %: rank 1 30.0." in notes
    assert "r40, sft: token accuracy, mean over 100 tokens, %: rank 1 20.0." in notes
    assert "Paper, r100, sft, Qwen, mean over its lengths: rank 1 17.9, rank 2 24.2" in notes


def test_a_plot_per_text_and_a_grid_per_method_of_the_noisiest() -> None:
    r100, r40, grid = long_context.plots(LINES)
    assert [(plot.name, len(plot.series)) for plot in (r100, r40)] == [("accuracy-r100", 2), ("accuracy-r40", 1)]
    assert grid.name == "grid-sft"
    assert (grid.columns, grid.rows) == (("1", "4"), ("100", "400"))
    assert grid.values == ((50.0, 100.0), (10.0, None))
    pytest.importorskip("matplotlib")
    for plot in (r100, r40, grid):
        assert figures.draw(plot, "here", "png").startswith(b"\x89PNG")


def test_units_are_told_apart_where_there_are_two() -> None:
    other = line("sft", 1, 100, 0.3)
    other["cell"] |= {"unit": "down_proj", "layer": 2}
    (plot,) = long_context.plots([LINES[0], other])
    assert [series.name for series in plot.series] == ["sft (branch)", "sft (down_proj, layer 2)"]


def test_the_writer_s_are_told_apart_by_the_unit_whose_parameters_it_has() -> None:
    other = line("loramem", 1, 100, 0.3)
    other["cell"] |= {"unit": "down_proj"}
    methods = long_context.grids([LINES[3], other], "token_accuracy")["r100"]
    assert methods == {"loramem (branch)": {(100, 1): {0: 75.0}}, "loramem (down_proj)": {(100, 1): {0: 30.0}}}


def test_another_text_or_cut_is_no_other_seed_and_another_device_no_second_one() -> None:
    cut, edited, device, seed = (line("sft", 1, 100, accuracy) for accuracy in (0.9, 0.8, 0.5, 0.7))
    cut["cell"] |= {"cut": 10}
    edited["cell"] |= {"digest": "1"}
    device["cell"] |= {"device": "cpu"}
    seed["cell"] |= {"seed": 1}
    found = long_context.grids([LINES[0], device, seed, cut], "token_accuracy")
    assert found == {
        "r100": {"sft": {(100, 1): {0: 50.0, 1: 70.0}}},
        "r100, epochs / 10": {"sft": {(100, 1): {0: 90.0}}},
    }
    both = [LINES[0], edited]
    assert list(long_context.grids(both, "token_accuracy")) == ["r100 (0)", "r100 (1)"]
    assert [row[0] for row in long_context.table(both).rows] == ["r100 (0)", "r100 (1)"]
    table = long_context.table([cut])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["text"], row["steps"]) == ("r100, epochs / 10", "2,000")


# Tiny cells


@pytest.mark.parametrize(
    ("method", "unit"),
    [("sft", "branch"), ("memft-ot", "down_proj"), ("memft-sw", "branch"), ("loramem", "branch")],
)
def test_a_tiny_cell_gives_its_text_back(base: Path, method: str, unit: str) -> None:
    cell = Cell("topics", "0", 1.0, 20, 16, method, unit, None, 0, 16, str(base), "cpu", None)
    result = long_context.run(cell)
    assert result["length"] == 20
    assert (result["token_accuracy"], result["forced_accuracy"], result["exact"]) == (1, 1, True)
    assert (result["first_failure"], result["earliest_stubborn"]) == (None, None)
    assert result["final_loss"] < 0.3 < result["base_loss"]
    if method == "loramem":
        assert result["ended"]
        assert result["end_prob"] >= 0.6
    else:
        assert result["steps"] == 2000 // 16
    if unit != "down_proj":
        assert result["parameters"] == pytest.approx(2 * 64 * 16, rel=0.1)


def test_a_cut_is_one_of_the_writer_s_patience_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patience: list[int] = []

    class SeenError(Exception):
        pass

    def watched(*_: object, schedule: NetworkSchedule) -> None:
        patience.append(schedule.patience_passes)
        raise SeenError

    monkeypatch.setattr(trainer, "train_adapter", watched)
    monkeypatch.setattr(shard_training, "features_of", lambda *_: None)  # patience is of training through the network
    for cut in (1, 10):
        cell = Cell("topics", "0", 0.0, 12, 16, "loramem", "branch", None, 0, cut, str(base), "cpu", None)
        with pytest.raises(SeenError):
            long_context.run(cell)
    assert patience == [NetworkSchedule.patience_passes, NetworkSchedule.patience_passes // 10]
    assert patience[1] >= 1


def test_published_methods_are_trained_on_the_answer_tokens_alone() -> None:
    record = entry([5, 6])
    trained = long_context.without_end(record)
    assert (trained.answer_ids, trained.prompt_ids, record.answer_ids) == ((5, 6), (1,), (5, 6, 9))


def test_a_text_that_does_not_fit_is_refused(base: Path) -> None:
    cell = Cell("topics", "0", 0.0, 1024, 1, "sft", "branch", None, 0, 1, str(base), "cpu", None)
    with pytest.raises(TooLong):
        long_context.encoded(cell, load_base_model(str(base), device="cpu"))
