"""Reading a whole store holds a batch of its rows at a time, and sees the state at its first value."""

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from loramem import KeyNotFound, MemoryStore
from loramem.errors import StoreError
from loramem.index.commits import commit_records
from loramem.index.rows import StoredRecord, stored_record
from loramem.index.temporary_table import TemporaryTable
from loramem.records.prompts import prompt_digest
from loramem.records.record import Record
from loramem.results import Recall

from .conftest import numbers

ADAPTERS, EACH, BATCH = 4, 40, 16


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streaming") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(numbers(3))
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Iterator[MemoryStore]:
    shutil.copytree(written, tmp_path / "memory")
    with MemoryStore(tmp_path / "memory", create=False) as opened:
        yield opened


@pytest.fixture
def few_objects() -> Iterator[None]:
    """What is in memory already is not looked through: seconds of it, after a thousand tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def held() -> int:
    """Rows of records in memory now."""
    return sum(isinstance(thing, StoredRecord) for thing in gc.get_objects())


def fill(store: MemoryStore) -> None:
    """Rows of many more records, which no adapter's file holds."""
    many = (Record(f"many {n}", "0") for n in range(ADAPTERS * EACH))
    rows = (
        stored_record(r, prompt_digest([n]), 1, f"{n % ADAPTERS:032}", 0.9, keep_value=True) for n, r in enumerate(many)
    )
    commit_records(store._index, rows)


class Counting:
    """A reader that decodes nothing and counts the rows in memory instead."""

    def __init__(self) -> None:
        self.most = 0

    def decode_current(self, records: Sequence[StoredRecord]) -> Iterator[Recall]:
        self.most = max(self.most, held())
        return iter([Recall(record.key, "0", record.min_prob, record.adapter, 1, 1) for record in records])

    def try_decode(self, records: Sequence[StoredRecord]) -> list[tuple[StoredRecord, str]]:
        return [(record, recall.value) for record, recall in zip(records, self.decode_current(records), strict=True)]

    def in_contexts(self, records: Sequence[StoredRecord]) -> list[list[StoredRecord]]:
        return []

    def count_tokens(self, value: str) -> int:
        return len(value)


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize(
    "read",
    [
        lambda store: len(list(store.recall_many())),
        lambda store: len(list(store.recall_many(f"many {n}" for n in range(ADAPTERS * EACH)))),
        lambda store: store.verify().exact,
    ],
    ids=["recall all", "recall keys", "verify"],
)
def test_no_more_rows_than_a_batch_are_held_at_once(
    store: MemoryStore, read: Callable[[MemoryStore], int], monkeypatch
) -> None:
    monkeypatch.setattr("loramem.store.read.DECODE_RECORDS", BATCH)
    fill(store)
    reader = Counting()
    store._session.reader = reader  # type: ignore[assignment]
    assert read(store) >= ADAPTERS * EACH
    assert BATCH <= reader.most <= 2 * BATCH


def test_all_values_are_of_the_state_at_the_first(store: MemoryStore) -> None:
    store.write({"other": "1"}, rank=1)
    recalls = store.recall_many()
    first = next(recalls)
    store.delete([key for key in (*numbers(3), "other") if key != first.key])
    store.write({"later": "2"})
    assert {recall.key for recall in [first, *recalls]} == {*numbers(3), "other"}


def test_rows_are_set_aside_without_their_values_each_adapters_together() -> None:
    def row(key: str, value: str, adapter: str) -> StoredRecord:
        return stored_record(
            Record(key, value, metadata={"é": [1]}), prompt_digest([1]), len(value), adapter, 0.75, keep_value=True
        )

    records = [row("a", "long", "2"), row("b", "x", "1"), row("c", "y", "2"), row("a", "long", "2")]
    with TemporaryTable() as table:
        table.add(records)
        assert table.count() == 4
        back = list(table.records())
    assert [(one.adapter, one.key) for one in back] == [("1", "b"), ("2", "c"), ("2", "a"), ("2", "a")]
    assert {one.value for one in back} == {None}
    assert all(one.holds(value) for one, value in zip(back, ["x", "y", "long", "long"], strict=True))
    assert back[0].metadata == {"é": [1]}


def test_a_full_temporary_folder_is_a_store_error(store: MemoryStore) -> None:
    with TemporaryTable() as table:
        table._db.execute("pragma max_page_count = 3")
        with pytest.raises(StoreError, match="SQLITE_TMPDIR"):
            table.add(
                stored_record(Record(f"{n}", "0"), prompt_digest([n]), 1, "a", 0.9, keep_value=False)
                for n in range(9999)
            )


def test_an_unknown_key_among_many_is_told_before_anything_is_decoded(store: MemoryStore) -> None:
    with pytest.raises(KeyNotFound, match="nobody"):
        next(store.recall_many(["key 0", "nobody"]))


def test_rows_are_read_as_they_are_asked_for_and_are_of_one_state(store: MemoryStore, few_objects: None) -> None:
    fill(store)
    before, rows = held(), store.iter_records()
    first = next(rows)
    assert held() - before < 5
    store.delete(list(numbers(3)))
    assert len({first.key, *(record.key for record in rows)}) == ADAPTERS * EACH + 3
    assert len(list(store.iter_records(adapter=f"{1:032}"))) == EACH
