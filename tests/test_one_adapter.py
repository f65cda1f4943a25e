"""One adapter for all records of a namespace, for whoever serves a single LoRA."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loramem_cli.main import run

from loramem import MemoryStore, Record, WriterSettings
from loramem.errors import StubbornRecords
from loramem.models import shard_sizes
from loramem.models.placement import Placement
from loramem.training import shard_training, shards
from loramem.training.feature_writer import train_on_features
from loramem.training.progress import Training

from .conftest import numbers
from .stubborn import stubborn

RECORDS = numbers(9)
DEFAULT = WriterSettings()


@pytest.fixture(autouse=True)
def three_to_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_sizes.Size, "shard_tokens", lambda *_: 15)  # four digits and an end token each


def weights(store: Path) -> dict[str, bytes]:
    """Of a store's adapters, by their names."""
    return {path.parent.name: path.read_bytes() for path in (store / "adapters").glob("*/*.safetensors")}


def test_all_records_of_a_write_share_one_adapter(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert [len(store.plan(RECORDS, one_adapter=one).shards) for one in (False, True)] == [3, 1]
        report = store.write(RECORDS, one_adapter=True)
        assert (len(report.adapters), report.written, report.beside) == (1, 9, 0)
        assert {recall.key: recall.value for recall in store.recall_many()} == RECORDS
        assert store.stats().advice is None


def test_every_namespace_has_its_own(base: Path, tmp_path: Path) -> None:
    records = [Record(key, value, f"team {number % 2}") for number, (key, value) in enumerate(RECORDS.items())]
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert len(store.write(records, one_adapter=True).adapters) == 2
        assert [adapter.namespace for adapter in store.adapters()] == ["team 0", "team 1"]


def test_more_tokens_than_one_module_tells_apart_begin_at_the_whole_mlp(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_sizes.Size, "carries", lambda size, _: size.matrices > 2)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [planned] = store.plan(RECORDS, one_adapter=True).shards
        store.write(RECORDS, one_adapter=True)
        (adapter,) = store.adapters()
        assert planned.rung == 1
        assert adapter.placement["modules"] == ["down_proj", "gate_proj", "up_proj"]
        assert adapter.parameters == planned.parameters
        assert adapter.size_bytes == pytest.approx(planned.size_bytes, rel=0.05)
        assert store.outcomes() == []  # which are of the store's own placement
        assert {recall.key: recall.value for recall in store.recall_many()} == RECORDS


def test_resuming_goes_on_with_the_plan_for_one_adapter(base: Path, tmp_path: Path) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with MemoryStore(tmp_path / "memory", str(base)) as store, pytest.raises(KeyboardInterrupt):
        store.write(RECORDS, one_adapter=True, progress=interrupt)
    with MemoryStore(tmp_path / "memory", create=False) as again:
        assert len(again.resume().adapters) == 1
        assert again.verify().ok
        with MemoryStore(tmp_path / "fresh", str(base)) as fresh:
            fresh.write(RECORDS, one_adapter=True)
    assert weights(tmp_path / "memory") == weights(tmp_path / "fresh")


def test_compaction_brings_what_was_written_later_into_the_one_adapter(base: Path, tmp_path: Path) -> None:
    first, later = dict(list(RECORDS.items())[:6]), dict(list(RECORDS.items())[6:])
    with MemoryStore(tmp_path / "memory", str(base)) as store, MemoryStore(tmp_path / "fresh", str(base)) as fresh:
        store.write(first, one_adapter=True)
        store.write({"elsewhere": "1"}, namespace="other")
        assert store.write(later, one_adapter=True).beside == 1
        store.update("key 0", "4321")  # asked for as a write of its own
        assert "9 records of 3 of 4 adapters" in (store.stats().advice or "")
        report = store.compact()
        assert (report.adapters_before, report.adapters_after, report.records) == (3, 1, 9)
        assert [adapter.namespace for adapter in store.adapters()] == ["other", ""]
        assert store.stats().advice is None
        fresh.write({key: store.recall(key) for key in store}, one_adapter=True)
        assert store.recall("key 0") == "4321"
        store.gc(grace_s=0)
    assert weights(tmp_path / "fresh").items() <= weights(tmp_path / "memory").items()


def test_erasing_a_record_leaves_one_adapter(base: Path, tmp_path: Path) -> None:
    rest = {key: value for key, value in RECORDS.items() if key != "key 4"}
    with MemoryStore(tmp_path / "memory", str(base)) as store, MemoryStore(tmp_path / "fresh", str(base)) as fresh:
        store.write(RECORDS, one_adapter=True)
        store.erase("key 4")
        fresh.write(rest, one_adapter=True)
    assert weights(tmp_path / "memory") == weights(tmp_path / "fresh")


def test_what_one_adapter_cannot_hold_is_counted_and_nothing_is_committed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "train_shard", stubborn("key 2", "key 5"))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with pytest.raises(StubbornRecords, match="2 of 9 records could not be certified in one adapter") as raised:
            store.write(RECORDS, one_adapter=True)
        assert raised.value.keys == ("key 2", "key 5")
        assert "--one-adapter" in str(raised.value) and "--partial" in str(raised.value)
        assert len(store) == 0 and store.pending() is None


def test_partial_commits_what_the_one_adapter_holds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "train_shard", stubborn("key 2", "key 5"))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        report = store.write(RECORDS, one_adapter=True, partial=True)
        assert (len(report.adapters), report.written, report.failed) == (1, 7, ("key 2", "key 5"))


def climbing(*arguments: Any, **named: Any) -> Training:
    """A train_on_features that leaves one record stubborn in a single module."""
    *_, placement, _, _ = arguments
    assert isinstance(placement, Placement)
    training = train_on_features(*arguments, **named)
    return replace(training, stubborn=(0,)) if len(placement.modules) == 1 else training


def test_a_stubborn_record_gets_no_adapter_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_training, "FEW", 0.5)
    monkeypatch.setattr(shard_training, "train_on_features", climbing)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert len(store.write(RECORDS, one_adapter=True).adapters) == 1
        (adapter,) = store.adapters()
        assert len(adapter.placement["modules"]) == 3


def test_the_commands_plan_and_write_one_adapter(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, later = tmp_path / "records.json", tmp_path / "later.json"
    source.write_text(json.dumps(RECORDS))
    later.write_text(json.dumps({"later": "1234"}))
    options = ["--model", str(base), "--store", str(tmp_path / "memory")]
    assert run(["capacity", str(source), "--one-adapter", "--json", *options]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["one_adapter"] and len(planned["shards"]) == 1
    assert run(["write", str(source), "--one-adapter", "--json", *options]) == 0
    assert len(json.loads(capsys.readouterr().out)["adapters"]) == 1
    assert run(["write", str(later), "--one-adapter", *options]) == 0
    assert "loramem compact" in capsys.readouterr().err


def test_a_length_is_planned_for_one_adapter_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for more in ([], ["--one-adapter"]):
        assert run(["capacity", "--length", "40000", "--json", *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    spread, whole = plans
    assert len(spread["shards"]) > 1
    assert [shard["rung"] for shard in whole["shards"]] == [1]  # four thousand phone numbers need the whole MLP
