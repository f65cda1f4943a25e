"""An input of any length is written in batches: each is committed before the next is read, none is written twice."""

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from loramem_cli.main import cli

from loramem import MemoryStore, read_records
from loramem.errors import ArgumentError, ConflictingRecord, InputError, InvalidField, UnfinishedWrite
from loramem.records.input_files import stream_records
from loramem.training.jobs import Delivery, ShardJob
from loramem.workers.worker import run_job

from .conftest import numbers
from .screen import ANSI, Screen

RECORDS = numbers(7)


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "memory", str(base)) as opened:
        yield opened


class Asked:
    """Records, and how many of them were taken."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for item in RECORDS.items():
            self.count += 1
            yield item


def test_a_batch_is_committed_before_the_next_is_read(store: MemoryStore) -> None:
    asked, seen = Asked(), []
    for report in store.write_batches(asked, batch=3):
        seen.append((report.written, len(store), asked.count))
    assert seen == [(3, 3, 3), (3, 6, 6), (1, 7, 7)]
    assert {recall.key: recall.value for recall in store.recall_many()} == RECORDS


def test_a_batch_that_fails_leaves_those_before_it_and_the_same_call_goes_on(store: MemoryStore) -> None:
    items = list(RECORDS.items())
    with pytest.raises(InvalidField, match="Line 5"):
        list(store.write_batches([*items[:4], "nonsense"], batch=2))  # type: ignore[list-item]
    assert len(store) == 4
    assert [(report.written, report.skipped) for report in store.write_batches(items, batch=4)] == [(0, 4), (3, 0)]
    with pytest.raises(ConflictingRecord):
        list(store.write_batches([(items[0][0], "another")]))


def test_an_interrupted_batch_is_resumed_before_others(store: MemoryStore) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    reports = store.write_batches(RECORDS, batch=4, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(reports)
    with pytest.raises(UnfinishedWrite):
        next(store.write_batches(RECORDS, batch=4))
    assert store.resume().written == 4
    assert sum(report.written for report in store.write_batches(RECORDS, batch=4)) == 3


def test_nothing_is_no_batch_and_none_is_refused(store: MemoryStore) -> None:
    assert list(store.write_batches([])) == []
    with pytest.raises(ArgumentError, match="batch"):
        next(store.write_batches(RECORDS, batch=0))


class Waiting(Executor):
    """Finishes no training before another was begun, up to the last; all else at once."""

    def __init__(self, trainings: int) -> None:
        self.left, self.begun = trainings, list[tuple[ShardJob, Future[Delivery]]]()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if fn is not run_job:
            future.set_result(fn(*args))
            return future
        self.begun.append((args[0], future))
        self.left -= 1
        for job, earlier in self.begun[:-1] if self.left else self.begun:
            if not earlier.done():
                earlier.set_result(run_job(job))
        return future


def contents(store: MemoryStore) -> set[str]:
    return {adapter.id for adapter in store.adapters()}


def test_workers_begin_the_next_batch_before_this_one_is_done(store: MemoryStore, base: Path, tmp_path: Path) -> None:
    workers, seen = Waiting(trainings=3), []  # a batch is a shard: none would end if it were the only one begun
    for report in store.write_batches(RECORDS, batch=3, executor=workers):
        seen.append((report.written, len(store)))
    assert seen == [(3, 3), (3, 6), (1, 7)]
    with MemoryStore(tmp_path / "here", str(base)) as here:
        list(here.write_batches(RECORDS, batch=3))
        assert contents(store) == contents(here)
    assert store.verify().ok


def test_the_next_batch_knows_this_one(store: MemoryStore) -> None:
    given = [("a", "1"), ("b", "2"), ("a", "1"), ("c", "3")]
    # What was begun of the second batch is not what it comes to.
    reports = list(store.write_batches(given, batch=2, executor=Waiting(trainings=3)))
    assert [(report.written, report.skipped) for report in reports] == [(2, 0), (1, 1)]
    given = [("d", "4"), ("e", "5"), ("d", "another"), ("f", "6")]
    reports = store.write_batches(given, batch=2, executor=Waiting(trainings=2))
    assert next(reports).written == 2
    with pytest.raises(ConflictingRecord, match="'d'"):
        next(reports)
    assert len(store) == 5 and store.pending() is None


def test_batches_that_nobody_asks_for_leave_nothing(store: MemoryStore) -> None:
    workers = Waiting(trainings=9)
    reports = store.write_batches(RECORDS, batch=2, executor=workers)
    assert next(reports).written == 2
    reports.close()
    assert all(future.done() for _, future in workers.begun)
    assert len(store) == 2 and store.pending() is None and not (store.path / "staging").exists()
    assert sum(report.written for report in store.write_batches(RECORDS, batch=4)) == 5


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"key": "a", "value": "1"}\r\n\n{"key": "b", "value": "2"}\n{"key": "c", \xff\n')
    records = stream_records(path)
    assert [(record.key, record.line) for record in (next(records), next(records))] == [("a", 1), ("b", 3)]
    with pytest.raises(InputError, match="Line 4: byte 0xff"):
        next(records)
    with pytest.raises(InputError, match="Line 4"):
        read_records(path)


def test_the_command_says_each_batch(base: Path, tmp_path: Path) -> None:
    path, store = tmp_path / "facts.jsonl", str(tmp_path / "memory")
    path.write_text("".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in RECORDS.items()))
    command = ["write", str(path), "--store", store, "--model", str(base), "--batch", "4"]
    first = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False)
    assert [json.loads(line)["written"] for line in first.stdout.splitlines()] == [4, 3]
    again = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "7" in next(line for line in again.stdout.splitlines() if "skipped" in line)


def test_the_command_draws_the_steps_of_each_batch(base: Path, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in numbers(4).items()))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", screen := Screen())
    command = ["write", str(path), "--store", str(tmp_path / "memory"), "--model", str(base), "--batch", "2"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(command)
    shown = ANSI.sub("", screen.getvalue())
    assert "2 facts certified" in shown and "Batch 2: 2 records" in shown
    assert re.search(r"2 facts certified.*Batch 1:.*2 facts certified.*Batch 2:", shown, re.DOTALL)


def test_one_kind_of_workers_is_asked_for_at_a_time(base: Path, tmp_path: Path) -> None:
    asked = ["compact", "--store", str(tmp_path), "--workers", "2", "--dask", "local:2"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 2 and "one of" in result.output


def test_a_store_is_found_again_from_another_folder(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with MemoryStore("memory", str(base)) as store:
        (tmp_path / "elsewhere").mkdir()
        os.chdir("elsewhere")
        store.write({"a": "1"})
        assert store.recall("a") == "1"
    assert (tmp_path / "memory" / "adapters").exists()
