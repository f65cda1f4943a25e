"""The phase suite: its statistics by hand, stages of a training, and a tiny cell of each part."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from loramem.errors import InputError, NotRoundTrip, TooLong
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.planning import calibrate
from loramem.planning.samples import generate
from loramem.records.prompts import encode_records
from loramem.suites import phase, phase_report
from loramem.suites.phase import Cell, Sample
from loramem.suites.phase_report import Reading
from loramem.suites.runner import SuiteOptions
from loramem.training.progress import WriteProgress

END = 9


def reading(probs: tuple[float, ...], decoded: tuple[int, ...], key: str = "a") -> Reading:
    """Of the answer 1, 2, 3 and its end."""
    return Reading(key, (1, 2, 3, END), probs, decoded)


# Statistics


@pytest.mark.parametrize(
    ("p", "bin_"), [(0.0, 0), (0.1, 0), (0.11, 1), (0.5, 4), (0.5 + 1e-7, 5), (0.6, 5), (0.95, 9), (1.0, 9)]
)
def test_a_bin_begins_above_one_half(p: float, bin_: int) -> None:
    assert phase_report.bin_of(p) == bin_


def test_tokens_count_as_after_the_true_prefix_up_to_the_first_failure() -> None:
    found = phase_report.tally(
        [
            reading((0.95, 0.35, 0.62, 0.85), (1, 7, 3, END)),  # wrong at the second token, right after it by chance
            reading((0.95, 0.35, 0.62, 0.85), (1, 2, 3, END)),
            reading((0.95, 0.35, 0.62, 0.25), (1, 2, 3, 4)),  # does not end
            reading((0.95, 0.35, 0.62, 0.85), (1, END)),  # ends too soon
        ]
    )
    assert found["prefix"] == [0, 0, 1, 4, 0, 0, 2, 0, 1, 4]
    assert found["prefix_right"] == [0, 0, 0, 2, 0, 0, 2, 0, 1, 4]
    assert found["all"] == [0, 0, 1, 4, 0, 0, 4, 0, 3, 4]
    assert found["all_right"] == [0, 0, 0, 2, 0, 0, 3, 0, 2, 4]
    assert (found["records"], found["answer_tokens"], found["answer_tokens_prefix"]) == (4, 12, 2 + 3 + 3 + 2)
    twice = phase_report.added([found, found])
    assert twice["all"] == [2 * count for count in found["all"]]
    assert twice["answer_tokens"] == 24


def test_made_up_counter_examples_are_found() -> None:
    whole = reading((0.9, 0.7, 0.8, 0.9), (1, 7, 3, END), "whole")
    token = reading((0.9, 0.7, 0.2, 0.9), (1, 7, 3, END), "token")
    early = reading((0.9, 0.5 + 1e-7, 0.8, 0.9), (1, END), "early")
    unending = reading((0.9, 0.7, 0.8, 0.9), (1, 2, 3, 4), "unending")
    found = list(phase_report.counter_examples([whole, token, early, unending]))
    assert [(one["key"], one["position"], one["decoded_id"], one["whole_record"], one["tie"]) for one in found] == [
        ("whole", 1, 7, True, False),
        ("token", 1, 7, False, False),
        ("early", 1, END, True, True),
        ("unending", 3, 4, True, False),
    ]
    assert found[0]["p"] == 0.7


def test_what_is_recalled_or_fails_where_it_may_is_no_counter_example() -> None:
    exact = reading((0.9, 0.3, 0.8, 0.9), (1, 2, 3, END))
    at_half = reading((0.9, 0.5, 0.8, 0.9), (1, 7, 3, END))
    later = reading((0.9, 0.3, 0.8, 0.9), (1, 7, 8, END))  # the third token had another prefix than its p
    assert list(phase_report.counter_examples([exact, at_half, later])) == []
    assert (at_half.stubborn, at_half.failure, exact.stubborn, exact.failure) == (1, 1, 1, None)


def test_spearman_is_that_of_the_textbook() -> None:
    # IQ and hours of television, the worked example of Wikipedia's article on ρ: -29/165. The interval with awk:
    # z = log((1+r)/(1-r))/2; s = sqrt((1+r*r/2)/7); tanh(z-1.959964*s), tanh(z+1.959964*s)
    iq = (106, 100, 86, 101, 99, 103, 97, 113, 112, 110)
    hours = (7, 27, 2, 50, 28, 29, 20, 12, 6, 17)
    found = phase_report.spearman(list(zip(iq, hours, strict=True)))
    assert found is not None
    assert found.rho == pytest.approx(-29 / 165)
    assert (found.low, found.high) == (pytest.approx(-0.7278, abs=1e-4), pytest.approx(0.5145, abs=1e-4))
    assert found.n == 10


def test_spearman_with_ties_is_the_correlation_of_the_mean_ranks() -> None:
    x, y = (0, 0, 0, 3, 5, 5, 8), (0, 1, 1, 3, 9, 4, 9)
    ranks = (2, 2, 2, 4, 5.5, 5.5, 7), (1, 2.5, 2.5, 4, 6.5, 5, 6.5)
    found = phase_report.spearman(list(zip(x, y, strict=True)))
    assert found is not None
    assert found.rho == pytest.approx(numpy.corrcoef(*ranks)[0, 1])


def test_spearman_of_what_says_nothing_is_none_and_of_order_itself_is_one() -> None:
    assert phase_report.spearman([(0, 1), (1, 2), (2, 3)]) is None
    assert phase_report.spearman([(0, 1), (0, 2), (0, 3), (0, 4)]) is None
    perfect = phase_report.spearman([(n, n**3) for n in range(6)])
    assert perfect is not None
    assert (perfect.rho, perfect.low) == (1, 1)


# Stages


def progress(step: int, ordered: int = 0) -> WriteProgress:
    return WriteProgress(step, ordered, 100, 0.0, 1.0, 1, 0.0)


def test_the_last_step_kept_at_random_is_any_of_them() -> None:
    draw, last = random.Random(0), [0] * 11
    for _ in range(11_000):
        wanted = phase.at_random(draw)
        last[max(step for step in range(1, 11) if wanted(progress(step)))] += 1
    assert all(abs(count - 1100) < 4 * 31.5 for count in last[1:])  # four standard deviations


def test_shares_are_told_once_each_and_together_where_one_step_reaches_several() -> None:
    wanted = phase.at_shares((0.9, 0.3, 0.6))
    assert [wanted(progress(1, ordered)) for ordered in (10, 30, 20, 40, 95, 99)] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.fixture(scope="module")
def adapted(base: Path) -> AdaptedModel:
    return AdaptedModel(load_base_model(str(base), device="cpu"))


@pytest.fixture(scope="module")
def sample(adapted: AdaptedModel) -> Sample:
    base = adapted.base
    return Sample.of(adapted, encode_records(generate("phonebook", 6), base.tokenizer, base.template, base.max_tokens))


def never(_: WriteProgress) -> bool:
    return False


def at(step: int) -> Callable[[WriteProgress], bool]:
    return lambda told: told.step == step


def test_a_training_that_was_stopped_is_left_as_a_longer_one_passed_through(adapted, sample) -> None:
    third, sixth = phase.train(adapted, sample, 2, 0, 6, at(3))
    (stopped,) = phase.train(adapted, sample, 2, 0, 3, never)
    assert (third.step, sixth.step, stopped.step) == (3, 6, 3)
    assert all(bool((stopped.weights[name] == weights).all()) for name, weights in third.weights.items())
    assert any(bool((stopped.weights[name] != weights).any()) for name, weights in sixth.weights.items())
    as_left = phase.read(adapted, sample)
    phase.take(adapted, sixth)
    assert phase.read(adapted, sample) != as_left
    phase.take(adapted, third)
    assert phase.read(adapted, sample) == as_left


def test_what_is_read_of_features_is_read_of_all_layers(adapted, sample) -> None:
    assert sample.features is not None
    phase.train(adapted, sample, 2, 0, 4, never)
    short, whole = phase.read(adapted, sample), phase.read(adapted, Sample(sample.records, None))
    assert [one.decoded_ids for one in short] == [one.decoded_ids for one in whole]
    for one, other in zip(short, whole, strict=True):
        assert one.probs == pytest.approx(other.probs, abs=1e-5)


def test_a_certified_training_is_read_as_exact(adapted, sample) -> None:
    stages = phase.train(adapted, sample, 4, 0, 200, never)
    found = phase.read(adapted, sample)
    assert all(one.failure is None and min(one.probs) >= 0.6 for one in found), stages[-1].step


# Cells


def without_times(result: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.fixture(scope="module")
def lines(base: Path) -> list[dict[str, object]]:
    cells = (
        Cell("long", "text", 30, 2, 2, 0, str(base), "cpu"),
        Cell("long", "text", 12, 1, 1, 4, str(base), "cpu"),
        Cell("book", "phonebook", 6, 4, 1, 0, str(base), "cpu"),
    )
    command = "loramem suite run phase"
    return [{"cell": dict(cell.identity), "command": command, "result": phase.run(cell)} for cell in cells]


def test_a_cell_gives_the_same_again(lines, base: Path) -> None:
    again = phase.run(Cell("long", "text", 12, 1, 1, 4, str(base), "cpu"))
    assert without_times(again) == without_times(lines[1]["result"])


def test_every_run_is_counted_and_fails_at_a_stubborn_token_or_not_at_all(lines) -> None:
    runs = lines[0]["result"]["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    assert all(1 <= run["step"] <= run["steps"] <= phase.LONG_STEPS for run in runs)
    for run in runs:
        assert run["failure"] is None or run["stubborn"] <= run["failure"] <= run["tokens"]


def test_a_book_is_read_at_every_stage(lines) -> None:
    result = lines[2]["result"]
    tally, stages = result["tally"], result["stages"]
    assert len(stages) >= 2
    assert tally["records"] == 6 * len(stages)
    assert sum(tally["all"]) == tally["answer_tokens"] + tally["records"]  # and an end token each
    assert sum(len(stage["pairs"]) + stage["exact"] for stage in stages) == tally["records"]


def test_the_table_counts_every_token_and_the_notes_answer_every_question(lines) -> None:
    table = phase.table(lines)
    tokens = sum(line["result"]["tally"]["answer_tokens"] + line["result"]["tally"]["records"] for line in lines)
    assert [row[0] for row in table.rows][4:6] == ["0.4–0.5", "0.5–0.6"]
    assert sum(int(row[4].replace(",", "")) for row in table.rows) == tokens
    assert {row[3] for row in table.rows[5:] if row[1] != "0"} == {"100.00%"}
    notes = "\n".join(table.notes)
    assert "Counter-examples to p > 0.5: 0 of " in notes
    assert "of the failing runs with a stubborn token alone" in notes
    assert "Books, every failing record" in notes


def with_runs(line: dict, runs: list[tuple[int, int | None, int | None]], **more: object) -> dict:
    """A line of long records with these tokens, earliest stubborn tokens and first failures."""
    told = [
        {
            **{"seed": seed, "step": 5, "steps": 9, "tokens": tokens, "stubborn": stubborn, "failure": failure},
            **{"end_stubborn": stubborn, "end_failure": failure},
        }
        for seed, (tokens, stubborn, failure) in enumerate(runs)
    ]
    return {**line, "result": {**line["result"], "runs": told, **more}}


def test_runs_that_are_left_out_of_the_correlation_are_told(lines) -> None:
    runs = [(9, 0, 0), (9, 2, 5), (9, 3, 3), (9, 4, 8), (9, 6, 7), (9, 1, None), (9, 1, None), (9, None, None)]
    runs += [(9, None, 5), (20, None, None)]
    notes = "\n".join(phase.table([with_runs(lines[0], runs)]).notes)
    assert "first failure: Spearman ρ = 0.800 " in notes
    assert "leaves out 2 runs with a stubborn token that are exact, 2 without either, and 1 that fail without" in notes


def test_quick_lines_are_left_out_beside_others_and_a_cell_on_two_devices_counts_once(lines) -> None:
    quick = {**lines[1], "command": "loramem suite run phase --quick"}
    device = {**lines[0], "cell": {**lines[0]["cell"], "device": "auto"}}
    table = phase.table([lines[0], quick, device])
    assert table.rows == phase.table(lines[:1]).rows
    assert any(note.startswith("2 lines are left out") for note in table.notes)
    assert phase.table([quick]).rows == phase.table([lines[1]]).rows
    assert phase.plots([lines[0], quick, device]) == phase.plots(lines[:1])


def test_a_length_beyond_the_context_is_an_error_and_what_a_tokenizer_cannot_say_is_told(
    lines, adapted, monkeypatch
) -> None:
    with pytest.raises(TooLong):
        phase.long_records(Cell("long", "text", 1024, 1, 1, 0, "", "cpu"), adapted)
    with pytest.raises(InputError, match="too many"):
        phase.long_records(Cell("long", "text", 10**8, 1, 1, 0, "", "cpu"), adapted)

    def unstable(*_: object) -> None:
        raise NotRoundTrip("another value", expected="a", got="b")

    monkeypatch.setattr(calibrate, "encode_sample", unstable)
    refused = [{"seed": 0, "error": "NotRoundTrip"}, {"seed": 1, "error": "NotRoundTrip"}]
    result = phase.long_records(Cell("long", "text", 20, 1, 2, 0, "", "cpu"), adapted)
    assert result["refused"] == refused
    notes = phase.table([with_runs(lines[0], [], refused=refused)]).notes
    assert notes[-1] == "2 long records could not be expressed by this tokenizer and were left out (NotRoundTrip 2)."


def test_a_counter_example_is_told_with_all_there_is_to_know(lines) -> None:
    wrong = {
        "key": "Ada Baker:", "position": 3, "p": 0.61234567, "expected_id": 5, "decoded_id": 6, "whole_record": True,
        "tie": False, "expected": "7", "decoded": "8",
    }  # fmt: skip
    line = {**lines[2], "result": {**lines[2]["result"], "counter_examples": [wrong]}}
    notes = phase.table([line]).notes
    assert any("Counter-examples to p > 0.5: 1 of" in note and ", 1 of them in records" in note for note in notes)
    assert (
        "Counter-example (book, phonebook, rank 4, seed 0): 'Ada Baker:' at position 3: p = 0.6123457 for '7', "
        "decoded '8'."
    ) in notes


def test_every_plot_is_made_and_of_a_part_of_the_lines_those_it_allows(lines) -> None:
    plots = {plot.name: plot for plot in phase.plots([with_runs(lines[0], [(9, 2, 5)]), *lines[1:]])}
    assert set(plots) == {"transition", "failures"}
    curve = plots["transition"]
    assert all(point.y == 100 for point in curve.series[0].points if point.x > 50)
    assert [plot.name for plot in phase.plots(lines[2:])] == ["transition"]
    assert phase.table(lines[2:]).rows


def test_the_default_run_is_large_enough() -> None:
    cells = list(phase.cells(SuiteOptions(), lambda cell: {}))
    assert len({tuple(cell.identity.items()) for cell in cells}) == len(cells)
    long = [cell for cell in cells if cell.part == "long"]
    seeds = [cell.seed + run for cell in long for run in range(cell.repeats)]
    assert len(set(seeds)) == len(seeds) >= 1.2 * 155
    books = [cell for cell in cells if cell.part == "book"]
    assert sum(cell.size * 10 * (len(phase.SHARES) + 1) for cell in books) > 100_000


def test_options_are_followed() -> None:
    asked = SuiteOptions(lengths=(70,), ranks=(3,), records=(50,), seeds=2)
    cells = list(phase.cells(asked, lambda cell: {}))
    assert {(cell.size, cell.rank) for cell in cells if cell.part == "long"} == {(70, 3)}
    assert [(cell.size, cell.rank, cell.seed) for cell in cells if cell.part == "book"] == [(50, 3, 0), (50, 3, 1)]
