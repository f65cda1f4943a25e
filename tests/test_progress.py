"""What a write says of itself while it goes on: facts learned and certified of all, and seconds left."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from loramem_cli.progress import (
    ALONE_READS,
    PROOF_READS,
    READING,
    WriteEstimate,
    batches_bar,
    count_bar,
    duration,
    write_bar,
)

from loramem import MemoryStore, WriteProgress, process_pool

from .conftest import numbers
from .screen import ANSI, Screen

STEP = WriteProgress(1, 0, 100, 0.0, 1.0, 4, 0.0, records_ordered=0, records=10, shards=4, records_total=40)


def seen(*told: tuple[float, WriteProgress]) -> WriteEstimate:
    estimate = WriteEstimate(0.0)
    for now, one in told:
        estimate.see(one, now)
    return estimate


def test_facts_are_learned_in_training_and_certified_by_proof() -> None:
    estimate = seen((1.0, replace(STEP, records_ordered=7)))
    assert (estimate.learned, estimate.certified) == (7, 0)
    assert str(estimate) == "7 of 40 facts learned, 0 certified"
    estimate.see(replace(STEP, records_ordered=9, proved=True), 2.0)  # one was given up
    estimate.see(replace(STEP, records_ordered=2, shard=2), 3.0)
    assert (estimate.learned, estimate.certified) == (11, 9)


def test_what_is_trained_again_takes_nothing_back() -> None:
    assert seen((1.0, replace(STEP, records_ordered=8)), (2.0, replace(STEP, records_ordered=1))).learned == 8


def test_seconds_left_before_the_first_proof_follow_what_reading_took() -> None:
    # 50 records were read in 5 s, so one takes 0.1 s. Training took 2 s and is done: 10 records are left to prove, 30
    # to read, train and prove, and 16 to decode alone.
    estimate = seen((5.0, STEP), (7.0, replace(STEP, tokens_ordered=100, records_ordered=10, elapsed_s=2.0)))
    proofs, alone = 0.1 * PROOF_READS, 0.1 * ALONE_READS
    assert estimate.left(7.0) == pytest.approx(10 * proofs + 30 * (0.1 + proofs + 2 / 10) + 16 * alone)
    assert estimate.left(8.0) == pytest.approx(estimate.left(7.0) - 1)  # while nothing is told
    assert estimate.left(1e6) == 0.0


def test_seconds_left_after_a_proof_follow_what_it_took() -> None:
    proved = replace(STEP, records_ordered=10, proved=True)
    estimate = seen((5.0, STEP), (9.0, proved), (9.5, replace(STEP, shard=2)))
    assert estimate.left(9.0) == pytest.approx(4.0 / 10 * 30 + 16 * 0.1 * ALONE_READS)
    assert seen((6.0, proved), (8.0, replace(proved, shard=3))).left(8.0) == pytest.approx(8.0)  # of processes


def test_durations_are_short() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 60, 125, 3600, 86400)] == [
        *("0 s", "59 s", "1 min 00 s", "2 min 05 s", "1 h 00 min", "24 h 00 min")
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fact_of_a_write_is_told_as_certified(base: Path, tmp_path: Path, workers: int) -> None:
    told = list[WriteProgress]()
    pool = process_pool(workers) if workers else nullcontext()
    with MemoryStore(tmp_path / "m", str(base)) as store, pool as executor:
        store.write(numbers(3), progress=told.append, executor=executor)
    estimate = WriteEstimate(0.0)
    for one in told:
        estimate.see(one, 1.0)
        assert 0 <= one.records_ordered <= one.records == one.records_total == 3
    assert (estimate.learned, estimate.certified) == (3, 3)
    assert [one.proved for one in told].count(True) == 1
    assert told[-1].proved and len(told) > 1  # steps came before, of workers too


def test_bars_are_drawn_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for bar, told in ((write_bar, (STEP,)), (count_bar, (1, 2))):
        with bar(*(["records"] if bar is count_bar else [])) as show:
            show(*told)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", screen := Screen())
    with count_bar("records") as count:
        count(1, 2000)
    assert "1 of 2,000 records" in screen.getvalue()


def test_the_bar_begins_again_with_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with batches_bar() as bar:
        assert bar is None  # where nobody reads it workers need tell nothing
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", screen := Screen())
    with batches_bar() as bar:
        assert bar is not None
        for _ in range(2):
            for shard in range(1, 5):
                bar.see(replace(STEP, shard=shard, records_ordered=10, proved=True))
            bar._bar.refresh()
            bar.begin()
    shown = screen.getvalue()
    assert shown.count("40 facts certified") >= 2 and READING in shown
    assert "80" not in ANSI.sub("", shown)


def test_a_batch_that_workers_began_early_is_not_thought_to_end_before_now() -> None:
    estimate = seen((1.0, replace(STEP, elapsed_s=30.0, records_ordered=5, tokens_ordered=50)))
    left = estimate.left(1.0)
    assert left is not None and left > 0
