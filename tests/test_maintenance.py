"""Compaction, collection and erasing: what is rewritten, what is left on disk, what readers see meanwhile."""

import os
import pkgutil
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from loramem import KeyNotFound, MemoryStore, Record
from loramem.errors import ArgumentError, StoreChanged, StoreError, StoreLocked, StubbornRecords, TrainingDiverged
from loramem.index.commits import commit_publication
from loramem.index.index import Index
from loramem.index.rows import Located

from .conftest import numbers

FIRST, SECOND = numbers(4), {f"other {i}": value[::-1] for i, value in enumerate(numbers(3, 6).values())}
SECRET = "4815162342"


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maintenance") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write([Record(key, value, metadata={"n": i}) for i, (key, value) in enumerate(FIRST.items())])
        store.write({**SECOND, "secret": SECRET})
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> MemoryStore:
    shutil.copytree(written, tmp_path / "memory")
    return MemoryStore(tmp_path / "memory", create=False)


def contents(store: Path) -> dict[str, bytes]:
    """Files of a store's adapters, by their path."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted((store / "adapters").rglob("*"))
        if path.is_file()
    }


def holding(store: Path, text: str) -> list[Path]:
    """Files of a store, directories of a file system apart, that hold a text as UTF-8."""
    return [path for path in store.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_an_unknown_choice_of_adapters_is_refused(tmp_path: Path) -> None:
    with (
        MemoryStore(tmp_path / "memory") as store,
        pytest.raises(ArgumentError, match="advised, dead, all, not 'some'"),
    ):
        store.compact(which="some")  # type: ignore[arg-type]


def test_compaction_gives_the_bytes_of_writing_the_remaining_records_alone(
    store: MemoryStore, base: Path, tmp_path: Path
) -> None:
    store.delete(["key 2", "secret"])
    report = store.compact()
    store.gc(grace_s=0)
    assert (report.records, report.adapters_before, report.adapters_after) == (6, 2, 1)
    rest = {**FIRST, **SECOND}
    del rest["key 2"]
    with MemoryStore(tmp_path / "fresh", str(base)) as fresh:
        fresh.write(rest)
        assert {r.key: r.value for r in store.recall_many()} == rest
        assert list(store.keys()) == list(fresh.keys())
    assert contents(store.path) == contents(tmp_path / "fresh")
    assert [record.metadata for record in store.records() if record.key == "key 3"] == [{"n": 3}]
    assert store.stats().tombstones == 0
    assert store.verify().ok


def test_sizes_are_told_while_files_go(store: MemoryStore, monkeypatch) -> None:
    scandir, staging = os.scandir, store.path / "staging" / "job"

    def slow(path: str) -> Any:
        if str(path).endswith("staging"):
            shutil.rmtree(path)
        return scandir(path)

    staging.mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", slow)
    assert store.stats().size_bytes > 0


def test_a_compaction_that_does_not_pay_does_nothing(store: MemoryStore) -> None:
    store.compact()
    before = contents(store.path)
    assert store.stats().advice is None
    assert store.compact().records == 0
    assert contents(store.path) == before


def test_stats_advise_compaction_when_it_pays(store: MemoryStore) -> None:
    assert "8 records of 2 of 2 adapters" in (store.stats().advice or "")
    store.compact()
    stats = store.stats()
    assert (stats.advice, stats.adapters, stats.retired_adapters) == (None, 1, 2)
    assert stats.retired_bytes > 0


def test_whoever_asks_for_it_has_no_tombstone_left_and_the_other_adapters_as_they_were(store: MemoryStore) -> None:
    untouched, touched = (adapter.id for adapter in store.adapters())
    held = [record.key for record in store.records() if record.adapter == touched]
    store.delete(held[0])
    assert store.stats().tombstones == 1

    report = store.compact(which="dead")

    assert (report.records, report.adapters_before) == (len(held) - 1, 1)
    store.gc(grace_s=0)  # until then the old file holds it
    now = {adapter.id for adapter in store.adapters()}
    assert store.stats().tombstones == 0 and untouched in now and touched not in now
    assert store.compact(which="dead").records == 0


def test_namespaces_and_ways_of_writing_are_compacted_apart(store: MemoryStore) -> None:
    for key in ("a", "b"):
        store.write([Record(key, "1", "team")])
    store.write({"forced": "2"}, rank=4)
    report = store.compact(which="all")
    assert (report.adapters_before, report.adapters_after) == (5, 3)
    assert sorted(adapter.namespace for adapter in store.adapters()) == ["", "", "team"]
    assert [adapter.rank for adapter in store.adapters() if adapter.training["request"]["rank"] == 4] == [4]
    assert store.verify().ok


def test_a_record_that_cannot_be_certified_again_leaves_everything_as_it_was(store: MemoryStore, monkeypatch) -> None:
    from loramem.training.jobs import ShardResult

    def in_vain(jobs, *_: object) -> list[object]:
        return [ShardResult((), tuple(range(len(job.records)))) for job in jobs]

    monkeypatch.setattr("loramem.store.write.run_jobs", in_vain)
    before = contents(store.path)
    with pytest.raises(StubbornRecords):
        store.compact()
    assert contents(store.path) == before
    assert store.recall("key 0") == FIRST["key 0"]


def test_retired_adapters_are_kept_for_readers_until_the_grace_is_over(store: MemoryStore) -> None:
    store.compact()
    assert (store.gc().adapters, store.gc().kept) == (0, 2)
    assert len(list((store.path / "adapters").iterdir())) == 3
    report = store.gc(grace_s=0)
    assert (report.adapters, report.kept) == (2, 0)
    assert report.freed_bytes > 0
    assert len(list((store.path / "adapters").iterdir())) == 1
    assert store.verify().ok


def test_a_reader_that_misses_a_file_reads_the_index_again(store: MemoryStore) -> None:
    with MemoryStore(store.path, create=False) as reader:
        going = reader.recall_many()
        first = next(going)
        store.compact()
        store.gc(grace_s=0)
        assert {r.key: r.value for r in [first, *going]} == {**FIRST, **SECOND, "secret": SECRET}
        assert reader.recall("secret") == SECRET


def _compacted(store: MemoryStore) -> None:
    store.compact()


def _replaced(store: MemoryStore) -> None:
    store.update("secret", "7")
    store.compact(which="dead")


@pytest.mark.parametrize(("change", "value"), [(_compacted, SECRET), (_replaced, "7")])
def test_what_is_read_of_one_key_is_read_where_it_is_now(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, change: Callable[[MemoryStore], None], value: str
) -> None:
    """Another process changes and collects between the look at the index and that at the adapter's file."""
    before, looks = store._index.locate("", "secret"), list[Located | None]()
    change(store)
    store.gc(grace_s=0)
    locate = Index.locate

    def late(index: Index, namespace: str, key: str) -> Located | None:
        looks.append(locate(index, namespace, key))
        return before if len(looks) % 2 else looks[-1]

    monkeypatch.setattr(Index, "locate", late)
    with MemoryStore(store.path, create=False) as reader:
        assert reader.recall("secret") == value
        explained = reader.explain("secret")
        assert (explained.value, explained.adapter) == (value, store._index.find("", "secret").adapter)
        reader.load("secret")
        assert reader._session.adapted.is_loaded(explained.adapter)
    assert len(looks) == 6


def test_a_reader_never_mixes_two_states(store: MemoryStore) -> None:
    with MemoryStore(store.path, create=False) as reader:
        before = reader.recall_many()
        next(before)
        store.write(dict.fromkeys([*FIRST, *SECOND], "7"), on_conflict="replace")
        assert "7" not in {recall.value for recall in before}  # retired adapters are still there
        assert {recall.value for recall in reader.recall_many()} == {"7", SECRET}


def test_a_reader_is_told_when_what_it_reads_is_gone(store: MemoryStore) -> None:
    with MemoryStore(store.path, create=False) as reader:
        going = reader.recall_many()
        first = next(going).key
        others = list(SECOND) if first in FIRST else list(FIRST)
        store.delete([*others, "secret"] if first in FIRST else others)
        store.gc(grace_s=0)
        with pytest.raises(StoreChanged):
            list(going)
        with pytest.raises(KeyNotFound):
            reader.recall(others[0])


def test_an_erased_value_is_in_no_file_and_its_adapter_is_as_if_it_never_was(
    store: MemoryStore, base: Path, tmp_path: Path
) -> None:
    store.write({"another": "123"})
    assert holding(store.path, SECRET)
    report = store.erase("secret")
    assert (report.keys, report.records, report.adapters) == (1, 3, 1)
    assert not holding(store.path, SECRET)
    assert not holding(store.path, "secret")
    with MemoryStore(tmp_path / "fresh", str(base)) as fresh:
        fresh.write(SECOND)
    fresh_files = contents(tmp_path / "fresh")
    assert fresh_files.items() <= contents(store.path).items()
    with pytest.raises(KeyNotFound):
        store.recall("secret")
    with pytest.raises(KeyNotFound):
        store.history("secret")
    with pytest.raises(KeyNotFound):
        store.erase("secret")
    assert {r.key for r in store.recall_many()} == {*FIRST, *SECOND, "another"}
    assert store.verify().ok


def test_every_earlier_version_is_erased_too(store: MemoryStore) -> None:
    store.update("secret", "98765432")
    store.rename("secret", "renamed")
    store.compact()
    store.delete("renamed")
    assert store.erase("renamed").keys == 1  # it was deleted before
    for text in (SECRET, "98765432", "renamed", "secret"):
        assert not holding(store.path, text)
    assert store.stats().tombstones == 0
    assert {recall.key for recall in store.recall_many()} == {*FIRST, *SECOND}
    assert store.verify().ok


def test_a_renamed_record_is_erased_by_the_key_it_has_now(store: MemoryStore) -> None:
    store.rename("secret", "nickname")
    store.rename("nickname", "open")
    with pytest.raises(KeyNotFound) as caught:
        store.erase("secret")
    assert caught.value.successor == "open"
    assert store.recall("open") == SECRET
    store.write({"secret": "12"})
    store.erase("secret")  # the new record: the other one is left alone
    assert store.recall("open") == SECRET
    store.delete("open")
    store.erase("open")
    for text in (SECRET, "secret", "nickname"):
        assert not holding(store.path, text)
    assert store.verify().ok


def test_a_clock_that_was_ahead_keeps_no_adapter_from_being_erased(store: MemoryStore, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("loramem.index.commits.now", lambda: "2999-01-01T00:00:00+00:00")
        store.update("secret", "98765432")
    store.erase("secret")
    assert store.stats().retired_adapters == 0
    assert len(list((store.path / "adapters").iterdir())) == len(store.adapters())


def test_files_of_somebody_else_among_the_adapters_are_left_alone(store: MemoryStore) -> None:
    own = store.path / "adapters" / "my-own-adapter"
    own.mkdir()
    for path in (own / "file", store.path / "adapters" / ".DS_Store", store.path / "adapters" / ("0" * 32)):
        path.write_text("mine")
    (store.path / "adapters" / ("1" * 32)).symlink_to(own)
    store.erase("secret")
    assert (own / "file").read_text() == (store.path / "adapters" / ".DS_Store").read_text() == "mine"
    assert not holding(store.path, SECRET)


def test_a_value_that_comes_back_leaves_no_tombstone_in_its_old_adapter(store: MemoryStore) -> None:
    for value in ("one", "two", "one"):
        store.write({"back": value}, rank=4, on_conflict="replace")
    assert {v.adapter for v in store.history("back")} - {a.id for a in store.adapters()}  # of "two", retired
    store.gc(grace_s=0)
    assert store.stats().tombstones == 0
    store.compact()
    assert store.stats().advice is None


def test_erasing_an_unknown_key_changes_nothing(store: MemoryStore) -> None:
    with pytest.raises(KeyNotFound):
        store.erase(["secret", "nobody"])
    assert store.recall("secret") == SECRET


@pytest.mark.parametrize("reading", [False, True])
def test_a_failed_write_leaves_no_value_in_a_store_without_values(
    base: Path, tmp_path: Path, monkeypatch, caplog, reading: bool
) -> None:
    def diverge(*_: object) -> None:
        raise TrainingDiverged("in vain", step=1, learning_rate=0.1)

    with MemoryStore(tmp_path / "memory", str(base), keep_values=False) as store:
        store.write({"a": "1"})
        with closing(sqlite3.connect(store.path / "index.db")) as reader, monkeypatch.context() as patched:
            patched.setattr("loramem.store.write.run_jobs", diverge)
            if reading:
                reader.execute("begin")
                reader.execute("select count(*) from records").fetchone()
            with pytest.raises(TrainingDiverged):
                store.write({"secret": SECRET})
            assert bool(holding(store.path, SECRET)) == reading
            assert ("still holds values" in caplog.text) == reading
        store.delete("a")
        assert not holding(store.path, SECRET)


def test_an_erasure_that_a_reader_is_in_the_way_of_is_finished_by_gc(store: MemoryStore, monkeypatch) -> None:
    monkeypatch.setattr(Index, "empty_log", partialmethod(Index.empty_log, 0.1))
    with closing(sqlite3.connect(store.path / "index.db")) as reader:
        reader.execute("begin")
        reader.execute("select count(*) from records").fetchone()
        with pytest.raises(StoreLocked, match="loramem gc"):
            store.erase("secret")
    store.gc()
    assert not holding(store.path, SECRET)
    assert {row["name"] for row in store._index.db.table("meta").rows} == {"manifest_sha256", "rows_sum"}


@pytest.mark.parametrize(
    ("meanwhile", "quick", "checked"),
    [
        ("loramem.store.integrity.file_problems", True, 7),
        ("loramem.store.integrity.file_problems", False, 7),
        ("loramem.store.verify.fingerprint", False, 4),  # the others were moved, and are not counted
    ],
)
def test_a_check_takes_nothing_for_damaged_that_is_erased_meanwhile(
    store: MemoryStore, monkeypatch, meanwhile: str, quick: bool, checked: int
) -> None:
    real = pkgutil.resolve_name(meanwhile)

    def late(*arguments: Any, **how: Any) -> Any:
        monkeypatch.undo()
        with MemoryStore(store.path, create=False) as other:
            other.erase("secret")
        return real(*arguments, **how)

    monkeypatch.setattr(meanwhile, late)
    report = store.verify(quick=quick)
    assert (report.damaged, report.failed, report.records) == ((), (), checked)
    assert store.verify(quick=quick).records == 7


def test_a_push_that_is_noted_in_the_middle_of_a_change_waits_for_it(store: MemoryStore, monkeypatch) -> None:
    next_id = Index.next_id
    with closing(Index.open(store.path / "index.db")) as other:
        note = threading.Thread(target=commit_publication, args=(other, "me/facts", "c0ffee"))

        def read_before_writing(index: Index, table: str) -> int:
            found = next_id(index, table)
            note.start()
            note.join(0.3)
            return found

        monkeypatch.setattr(Index, "next_id", read_before_writing)
        assert store.delete("key 0") == 1
        note.join()
        assert other.publication("me/facts") == ("c0ffee", None)
    assert store.verify(quick=True).ok


def test_what_could_not_be_cleared_is_cleared_by_the_next_change(store: MemoryStore, monkeypatch) -> None:
    def full(_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("loramem.index.index.Index.vacuum", full)
        for _ in range(2):
            with pytest.raises(StoreError, match="disk is full"):
                store.erase("secret")
    assert "secret" not in store
    store.delete("key 0")
    assert not holding(store.path, SECRET)


def test_a_store_without_values_keeps_none_and_is_compacted_from_its_weights(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base), keep_values=False) as store:
        store.write({"secret": SECRET, **FIRST})
        store.write(SECOND)
        assert not holding(store.path, SECRET)
        assert all(record.value is None for record in store.records())
        store.delete("key 0")
        store.compact()
        store.rename("secret", "renamed")
        assert store.recall("renamed") == SECRET
        assert not holding(store.path, SECRET)
        assert store.verify().ok
    with MemoryStore(tmp_path / "memory", create=False) as store:
        assert not store.manifest.keep_values
        with pytest.raises(StoreError, match="keep_values"):
            MemoryStore(store.path, create=False, keep_values=True)
        assert store.recall("key 1") == FIRST["key 1"]
