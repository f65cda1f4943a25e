"""An input of any length is written in batches: each is committed before the next is read, none is written twice."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from loramem_cli.main import cli

from loramem import MemoryStore, read_records
from loramem.errors import ArgumentError, ConflictingRecord, InputError, InvalidField, UnfinishedWrite
from loramem.records.input_files import stream_records

from .conftest import numbers

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
