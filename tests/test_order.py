"""Many values come back in the order asked for, in as few batches as before, few of them waiting."""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.index.commits import commit_records
from loramem.index.rows import StoredRecord, stored_record
from loramem.records.prompts import prompt_digest
from loramem.records.record import Record
from loramem.results import Recall

FIRST, SECOND = {"a": "1", "b": "2", "long": "345678"}, {"c": "3", "d": "4"}
ALL = {**FIRST, **SECOND}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("order") / "memory"
    with MemoryStore(path, str(base)) as store:
        for records in (FIRST, SECOND):
            store.write(records)
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Iterator[MemoryStore]:
    shutil.copytree(written, tmp_path / "memory")
    with MemoryStore(tmp_path / "memory", create=False) as opened:
        yield opened


@pytest.mark.parametrize(
    "asked",
    [["a", "b", "long", "c", "d"], ["d", "long", "c", "b", "a"], ["long", "a", "d", "a", "long", "long"], ["c"], []],
)
def test_values_come_in_the_order_asked(store: MemoryStore, asked: list[str]) -> None:
    expected = [(key, ALL[key]) for key in asked]
    assert [(recall.key, recall.value) for recall in store.recall_many(asked)] == expected
    assert sorted((recall.key, recall.value) for recall in store.recall_many(asked, ordered=False)) == sorted(expected)


def test_without_keys_they_come_in_the_order_of_keys(store: MemoryStore) -> None:
    assert [recall.key for recall in store.recall_many()] == list(store.keys()) == list(ALL)
    store.write({"b": "7"}, on_conflict="replace")
    assert [recall.key for recall in store.recall_many()] == list(store)


def test_the_order_holds_when_adapters_were_written_anew_meanwhile(store: MemoryStore) -> None:
    asked = ["a", "d", "long", "b", "c", "b"]
    with MemoryStore(store.path, create=False) as reader:
        going = reader.recall_many(asked)
        first = next(going)
        store.compact(which="all")
        store.gc(grace_s=0)
        assert [(r.key, r.value) for r in [first, *going]] == [(key, ALL[key]) for key in asked]


def test_the_command_prints_them_so(store: MemoryStore, capsys) -> None:
    assert run(["recall", "d", "long", "a", "d", "--store", str(store.path)]) == 0
    assert capsys.readouterr().out == "d\t4\nlong\t345678\na\t1\nd\t4\n"
    assert run(["recall", "--all", "--store", str(store.path)]) == 0
    assert capsys.readouterr().out == "".join(f"{key}\t{value}\n" for key, value in ALL.items())


class Counting:
    """A reader that decodes nothing, and counts batches and values that were decoded."""

    def __init__(self) -> None:
        self.batches = self.values = 0

    def decode_current(self, records: Sequence[StoredRecord]) -> Iterator[Recall]:
        self.batches, self.values = self.batches + 1, self.values + len(records)
        return iter([Recall(record.key, "0", record.min_prob, record.adapter, 1, 1) for record in records])


ADAPTERS, EACH, BATCH, WINDOW = 6, 50, 16, 64


@pytest.fixture
def many(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Rows of several adapters in a namespace of their own, with answers of many lengths; no adapter holds them."""
    monkeypatch.setattr("loramem.store.read.DECODE_RECORDS", BATCH)
    monkeypatch.setattr("loramem.index.temporary_table.WINDOW_RECORDS", WINDOW)
    rows = [
        stored_record(
            Record(f"{n}", "0", "many"),
            prompt_digest([n]),
            n * 7 % 13,
            f"{n // EACH * 5 % ADAPTERS:032}",
            0.9,
            keep_value=True,
        )
        for n in range(ADAPTERS * EACH)
    ]
    commit_records(store._index, rows)
    store._session.reader = Counting()  # type: ignore[assignment]
    return store


def read(store: MemoryStore, keys: list[str] | None, *, ordered: bool = True) -> tuple[list[str], int, int]:
    """Keys as they came, batches that it took, and the most values that waited for another."""
    store._session.reader = counting = Counting()  # type: ignore[assignment]
    came, waited = [], 0
    for recall in store.recall_many(keys, "many", ordered=ordered):
        waited = max(waited, counting.values - len(came) - 1)
        came.append(recall.key)
    return came, counting.batches, waited


def test_in_the_order_written_it_takes_hardly_more_batches_and_nothing_waits_longer_than_its_adapter(
    many: MemoryStore,
) -> None:
    keys = list(many.keys("many"))
    _, fewest, _ = read(many, None, ordered=False)
    came, batches, waited = read(many, None)
    assert (came, fewest) == (keys, ADAPTERS * 4)
    windows = len(keys) // WINDOW
    assert batches <= fewest + windows + 1
    assert waited <= EACH


@pytest.mark.parametrize("limit", ["records", "tokens"])
def test_in_any_order_no_more_than_a_window_waits(many: MemoryStore, limit: str, monkeypatch) -> None:
    if limit == "tokens":
        monkeypatch.setattr("loramem.index.temporary_table.WINDOW_RECORDS", 10**6)
        monkeypatch.setattr("loramem.index.temporary_table.WINDOW_TOKENS", WINDOW * 6)
    keys = random.Random(0).choices(list(many.keys("many")), k=500)
    came, _, waited = read(many, keys)
    assert came == keys
    assert BATCH < waited <= 1.3 * WINDOW + BATCH
