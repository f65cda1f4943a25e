"""Replacing, deleting and renaming records, namespaces, filters and history; a store of an older version."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loramem import KeyNotFound, MemoryStore, Record
from loramem.errors import ArgumentError, ConflictingRecord, InvalidField, StoreFormatError

from .conftest import ROOT, numbers


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("changes") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write([Record(key, value, metadata={"n": i}) for i, (key, value) in enumerate(numbers(4).items())])
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> MemoryStore:
    shutil.copytree(written, tmp_path / "memory")
    return MemoryStore(tmp_path / "memory", create=False)


def test_a_replaced_record_gives_its_new_value_and_the_others_theirs(store: MemoryStore) -> None:
    report = store.write({"key 1": "new!", "key 2": numbers(4)["key 2"], "key 9": "9"}, on_conflict="replace")
    assert (report.written, report.skipped) == (2, 1)
    assert {r.key: r.value for r in store.recall_many()} == {**numbers(4), "key 1": "new!", "key 9": "9"}
    assert store.stats().tombstones == 1
    assert store.verify().ok


def test_skipping_conflicts_keeps_the_old_value(store: MemoryStore) -> None:
    report = store.write({"key 1": "new!", "key 9": "9"}, on_conflict="skip")
    assert (report.written, report.skipped) == (1, 1)
    assert store.recall("key 1") == numbers(4)["key 1"]


def test_an_unknown_way_with_conflicts_is_refused(store: MemoryStore) -> None:
    for call in (store.write, store.plan):
        with pytest.raises(ArgumentError, match="error, skip, replace, not 'overwrite'") as caught:
            call({"key 1": "new!"}, on_conflict="overwrite")  # type: ignore[operator]
        assert (caught.value.argument, caught.value.value) == ("on_conflict", "overwrite")


def test_update_changes_value_and_metadata(store: MemoryStore) -> None:
    assert store.update("key 1", "new!").written == 1
    assert store.recall("key 1") == "new!"
    assert [record.metadata for record in store.records() if record.key == "key 1"] == [{"n": 1}]
    adapters = store.adapters()
    assert store.update("key 1", metadata={"of": "Ann"}).written == 0
    assert store.adapters() == adapters  # nothing was trained
    assert [record.key for record in store.records(metadata={"of": "Ann"})] == ["key 1"]
    with pytest.raises(KeyNotFound):
        store.update("nobody", "1")
    with pytest.raises(InvalidField):
        store.update("key 1", metadata={"of": object()})
    assert store.verify(quick=True).ok


def test_a_deleted_record_is_unknown_at_once_and_its_key_can_be_written_again(store: MemoryStore) -> None:
    assert store.delete("key 1") == 1
    with pytest.raises(KeyNotFound):
        store.recall("key 1")
    assert "key 1" not in store
    assert len(store) == 3
    assert {r.key for r in store.recall_many()} == {"key 0", "key 2", "key 3"}
    with pytest.raises(KeyNotFound):
        store.delete("key 1")
    store.write({"key 1": "again"})
    assert store.recall("key 1") == "again"
    assert store.verify().ok


def test_deleting_several_is_all_or_nothing(store: MemoryStore) -> None:
    with pytest.raises(KeyNotFound, match="nobody"):
        store.delete(["key 0", "nobody"])
    assert len(store) == 4
    assert store.delete(["key 0", "key 3", "key 0"]) == 2


def test_a_renamed_record_keeps_value_and_metadata(store: MemoryStore) -> None:
    store.rename("key 1", "another key")
    assert store.recall("another key") == numbers(4)["key 1"]
    with pytest.raises(KeyNotFound):
        store.recall("key 1")
    assert [r.metadata for r in store.records() if r.key == "another key"] == [{"n": 1}]
    with pytest.raises(ConflictingRecord):
        store.rename("key 2", "another key")
    with pytest.raises(KeyNotFound):
        store.rename("key 1", "third key")


def test_history_tells_every_version_and_no_value(store: MemoryStore) -> None:
    store.update("key 1", "second")
    store.rename("key 1", "renamed")
    store.delete("renamed")
    store.write({"renamed": "last"})
    versions = store.history("renamed")
    assert [(v.key, v.ended_by, v.successor) for v in versions] == [
        ("key 1", "replaced", None),
        ("key 1", "renamed", "renamed"),
        ("renamed", "deleted", None),
        ("renamed", None, None),
    ]
    assert all(version.ended_at for version in versions[:-1])
    assert versions[0].in_weights  # until compaction
    assert not any(value in repr(versions) for value in ("second", "last", numbers(4)["key 1"]))
    assert len(store.history("key 0")) == 1
    with pytest.raises(KeyNotFound):
        store.history("nobody")


def test_the_history_of_a_renamed_record_is_not_that_of_a_new_one_with_its_old_key(store: MemoryStore) -> None:
    store.rename("key 1", "moved")
    with pytest.raises(KeyNotFound, match="renamed to 'moved'") as caught:
        store.recall("key 1")
    assert caught.value.successor == "moved"
    store.write({"key 1": "7654"})
    store.update("key 1", "1112")
    assert [(v.key, v.ended_by) for v in store.history("moved")] == [("key 1", "renamed"), ("moved", None)]
    assert [v.ended_by for v in store.history("key 1")] == ["renamed", "replaced", None]
    store.erase("moved")
    assert [(v.key, v.ended_by) for v in store.history("key 1")] == [("key 1", "replaced"), ("key 1", None)]
    assert store.recall("key 1") == "1112"
    store.rename("key 1", "a")
    store.rename("a", "b")
    store.rename("b", "key 1")  # and back
    assert [v.key for v in store.history("key 1")] == ["key 1", "key 1", "a", "b", "key 1"]
    store.erase("key 1")
    for name in ("key 1", "a", "b"):
        with pytest.raises(KeyNotFound):
            store.history(name)


def test_namespaces_are_separate_recall_spaces_and_never_share_a_shard(store: MemoryStore) -> None:
    store.write([Record("key 1", "team", "team/project"), Record("only here", "x", "team/project")])
    assert store.recall("key 1") == numbers(4)["key 1"]
    assert store.recall("key 1", "team/project") == "team"
    assert store.namespaces() == ["", "team/project"]
    assert list(store.keys("team/project")) == ["key 1", "only here"]
    for adapter in store.adapters():
        assert {record.namespace for record in store.records(adapter=adapter.id)} == {adapter.namespace}
    store.delete("key 1", "team/project")
    assert store.recall("key 1") == numbers(4)["key 1"]
    with pytest.raises(KeyNotFound, match="team/project"):
        store.recall("key 1", "team/project")


def test_equal_records_of_two_namespaces_have_adapters_of_their_own_with_equal_weights(store: MemoryStore) -> None:
    same = numbers(2)
    assert store.write([Record(key, value, space) for space in "xy" for key, value in same.items()]).written == 4
    store.write(same, namespace="z")  # and in a write of its own
    adapters = [adapter for adapter in store.adapters() if adapter.namespace in ("x", "y", "z")]
    assert sorted(adapter.namespace for adapter in adapters) == ["x", "y", "z"]
    assert len({adapter.files["adapter_model.safetensors"] for adapter in adapters}) == 1
    assert {recall.value for space in "xyz" for recall in store.recall_many(namespace=space)} == set(same.values())
    assert store.verify().ok
    store.erase("key 0", "y")
    assert store.recall("key 0", "x") == store.recall("key 0", "z") == same["key 0"]
    assert store.verify().ok


def test_records_are_filtered_by_time_and_metadata(store: MemoryStore) -> None:
    now, hour = datetime.now(UTC), timedelta(hours=1)
    assert len(list(store.records(since=now - hour, until=now + hour))) == 4
    assert not list(store.records(since=now + hour))
    assert not list(store.records(until=now - hour))
    assert [record.key for record in store.records(metadata={"n": "2"})] == ["key 2"]
    assert not list(store.records(metadata={"n": "2", "of": "Ann"}))


def test_an_adapter_without_live_records_is_retired(store: MemoryStore) -> None:
    store.delete(numbers(4))
    assert store.adapters() == []
    assert store.stats().retired_adapters == 1
    assert store.verify().ok


def copy_of_format_1(target: Path) -> Path:
    shutil.copytree(ROOT / "tests" / "store-format-1", target)
    return target


def test_a_store_of_format_1_is_recalled_byte_for_byte_and_can_be_changed(tmp_path: Path) -> None:
    with MemoryStore(copy_of_format_1(tmp_path / "memory"), create=False) as store:
        assert store.recall("Jerry Becerra:") == "9100672710"
        assert store.recall("Schlüssel 🔑") == "  two  spaces\n"
        assert store.recall("Jerry Becerra:", "team/project") == "6780438158"
        assert [r.metadata for r in store.records("team/project")] == [{"source": "directory"}]
        assert store.verify().ok
        store.update("Schlüssel 🔑", "neu", rank=1)
        assert (store.recall("Schlüssel 🔑"), store.recall("Jerry Becerra:")) == ("neu", "9100672710")
        assert store.verify().ok
        store.delete("Schlüssel 🔑")
        assert store.compact().records == 1  # though its adapters name settings that are retired
        assert store.recall("Jerry Becerra:", "team/project") == "6780438158"
        assert store.verify().ok


@pytest.mark.parametrize("index", ["as now", "of another kind", "elsewhere"])
def test_a_newer_format_is_refused_with_the_version_it_needs_and_left_alone(tmp_path: Path, index: str) -> None:
    path = copy_of_format_1(tmp_path / "memory")
    manifest = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**manifest, "format": 2, "needs": "9.1"}))
    if index == "of another kind":
        (path / "index.db").write_bytes(b"a better database")
    elif index == "elsewhere":
        (path / "index.db").rename(path / "index.better")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(StoreFormatError, match=r"format 2.* 9\.1 or later"):
        MemoryStore(path, create=False)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
