"""A store counts, lists and reads its default namespace as one; a view does the same with another."""

import doctest
import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from loramem_cli.main import run

import loramem.api.namespace
from loramem import KeyNotFound, MemoryStore, Namespace, Record
from loramem.errors import InvalidField
from loramem.records.record import as_records

DEFAULT, TEAM = {"k": "1", "only here": "2"}, {"k": "9", "b": "8", "c": "7"}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("namespaces") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write([*DEFAULT.items(), *(Record(key, value, "team") for key, value in TEAM.items())])
        store.export(path.with_name("bundle"))
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Iterator[MemoryStore]:
    shutil.copytree(written, tmp_path / "memory")
    with MemoryStore(tmp_path / "memory", create=False) as opened:
        yield opened


@pytest.mark.parametrize(("name", "expected"), [("", DEFAULT), ("team", TEAM), ("nobody's", {})])
def test_all_that_counts_lists_or_reads_agrees(store: MemoryStore, name: str, expected: dict[str, str]) -> None:
    view = store.namespace(name)
    for one in [view, store] if name == "" else [view]:
        assert len(one) == len(expected)
        assert list(one) == list(one.keys()) == list(expected)
        assert sorted(record.key for record in one.records()) == sorted(expected)
        assert {recall.key: recall.value for recall in one.recall_many()} == expected
        assert {key for key in {*DEFAULT, *TEAM} if key in one} == set(expected)
        for key in {*DEFAULT, *TEAM}.difference(expected):
            with pytest.raises(KeyNotFound):
                one.recall(key)
    assert view.name == name


def test_the_whole_store_is_counted_by_stats_and_listed_by_none(store: MemoryStore) -> None:
    assert store.stats().records == len(list(store.records(None))) == len(list(store.records(namespace=None))) == 5
    assert sum(len(store.namespace(name)) for name in store.namespaces()) == 5
    assert 3 not in store
    for adapter in store.adapters():
        assert {record.namespace for record in store.records(adapter=adapter.id)} == {adapter.namespace}
        views = [store.namespace(name) for name in ("", "team")]
        assert [view.name for view in views if list(view.records(adapter.id))] == [adapter.namespace]


def test_a_view_writes_and_changes_its_namespace_alone(store: MemoryStore) -> None:
    team = store.namespace("team")
    assert [shard.records for shard in team.plan({"e": "1", "k": "9"}).shards] == [1]
    assert team.write([Record("e", "4"), {"key": "f", "value": "5"}], rank=1).written == 2
    team.update("e", "6")
    team.update("b", metadata={"of": "Ann"})
    team.rename("f", "g")
    team.delete("c")
    team.erase(["k"])
    assert {recall.key: recall.value for recall in team.recall_many(["g", "b", "e"])} == {"b": "8", "e": "6", "g": "5"}
    assert [record.metadata for record in team.records() if record.key == "b"] == [{"of": "Ann"}]
    assert [version.key for version in team.history("g")] == ["f", "g"]
    assert team.explain("g").value == "5"
    assert team.load("g")[1]
    assert {recall.key: recall.value for recall in store.recall_many()} == DEFAULT


def test_a_record_that_names_no_namespace_is_written_to_the_one_given() -> None:
    given = [Record("none", "1"), Record("own", "2", "team"), {"key": "row", "value": "3"}]
    assert [record.namespace for record in as_records(given, "other")] == ["other", "team", "other"]
    assert [record.namespace for record in as_records(given)] == ["", "team", ""]


def test_a_record_for_another_namespace_is_refused_by_a_view(store: MemoryStore) -> None:
    for view in (store.namespace("team"), store.namespace("")):
        with pytest.raises(InvalidField, match="'k' is for namespace 'other'"):
            view.write([Record("a", "1"), Record("k", "9", "other")])
    assert store.namespace("team").write([Record("k", "9", "team")]).skipped == 1
    assert store.namespaces() == ["", "team"]
    for name in ("\ud800", 3):
        with pytest.raises(InvalidField):
            store.namespace(name)  # type: ignore[arg-type]


def test_a_view_has_every_method_that_takes_a_namespace() -> None:
    methods = {
        name
        for name, method in inspect.getmembers(MemoryStore, inspect.isfunction)
        if not name.startswith("_") and "namespace" in inspect.signature(method).parameters
    }
    assert len(methods) >= 13
    assert methods <= {name for name, _ in inspect.getmembers(Namespace, inspect.isfunction)}


def test_an_import_counts_all_namespaces(written: Path, tmp_path: Path, capsys) -> None:
    assert run(["import", str(written.with_name("bundle")), "--store", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"records": 5}
    assert run(["ls", "--store", str(tmp_path / "new"), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_example_runs() -> None:
    assert doctest.testmod(loramem.api.namespace).failed == 0
