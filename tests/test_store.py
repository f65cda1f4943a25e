"""Writing and reading a store, on a small random base model."""

import difflib
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramem import KeyNotFound, MemoryStore, Record
from loramem._util.events import NAMES
from loramem.errors import ConflictingRecord, LoramemError, RecordError, StoreFormatError, StoreNotFound
from loramem.index.index import CLOSE_KEYS, Index
from loramem.index.rows import record_row, stored_record
from loramem.planning.limits import RankLimits
from loramem.planning.plan import Plan
from loramem.records.prompts import prompt_digest
from loramem.store import write
from loramem.store.planner import Planner

from .conftest import numbers
from .test_integrity import flip_bit

AWKWARD = {
    "中文键": "值：一二三",
    "مفتاح": "قيمة ١٢٣",
    "emoji 🔑": "👩‍👩‍👧‍👦 🏳️‍🌈",
    "latex": r"\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}",
    "python": "def f(x):\n\treturn x  # two  spaces\r\n",
    "hex": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
    "one": "x",
    "spaces": "  leading and trailing  ",
    " key with spaces ": "v",
    "null": "a\x00b",
}


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    store = MemoryStore(tmp_path_factory.mktemp("store") / "memory", str(base))
    store.write(numbers(8))
    store.write(AWKWARD)
    return store


def test_every_value_comes_back_verbatim(store: MemoryStore) -> None:
    for key, value in {**numbers(8), **AWKWARD}.items():
        assert store.recall(key) == value


def test_recall_many_gives_every_record_once_with_its_certificate(store: MemoryStore) -> None:
    recalled = {recall.key: recall for recall in store.recall_many()}
    assert {key: recall.value for key, recall in recalled.items()} == {**numbers(8), **AWKWARD}
    assert all(recall.min_prob >= 0.6 for recall in recalled.values())
    assert len({recall.adapter for recall in recalled.values()}) > 1


def test_recall_many_of_chosen_keys(store: MemoryStore) -> None:
    assert {r.key: r.value for r in store.recall_many(["one", "key 3"])} == {"one": "x", "key 3": numbers(8)["key 3"]}


def test_of_many_keys_difflib_sees_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(tmp_path / "index.db")
    index.migrate()
    records = (
        stored_record(Record(f"some key number {number}:", "1"), prompt_digest([number]), 1, "ad", 0.9, keep_value=True)
        for number in range(10_000)
    )
    with index.change() as change:
        for record in records:
            change.put("records", record_row(record))
    seen = list[int]()
    match = difflib.get_close_matches

    def counted(key: str, keys: list[str], n: int) -> list[str]:
        seen.append(len(keys))
        return match(key, keys, n)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    assert "some key number 7777:" in index.close_keys("", "some kez number 7777:")
    assert seen == [CLOSE_KEYS // 100]


def test_a_store_knows_its_keys(store: MemoryStore) -> None:
    assert len(store) == 18
    assert "one" in store
    assert "two" not in store
    assert list(store.keys())[:8] == list(numbers(8))


def test_an_unknown_key_suggests_close_ones(store: MemoryStore) -> None:
    with pytest.raises(KeyNotFound, match="key 3") as caught:
        store.recall("key 33")
    assert "key 3" in caught.value.close
    assert isinstance(caught.value, KeyError)


def test_writing_the_same_records_again_changes_nothing(store: MemoryStore) -> None:
    before = [adapter.id for adapter in store.adapters()]
    report = store.write(numbers(8))
    assert (report.written, report.skipped) == (0, 8)
    assert [adapter.id for adapter in store.adapters()] == before


def test_another_value_for_a_known_key_is_refused_before_anything_changes(store: MemoryStore) -> None:
    with pytest.raises(ConflictingRecord):
        store.write({"new": "1", "one": "y"})
    assert "new" not in store
    assert store.pending() is None
    assert store.recall("one") == "x"


def test_the_same_key_may_exist_in_two_namespaces(base: Path, tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memory", str(base))
    store.write([Record("k", "11"), Record("k", "22", "team/project")])
    assert store.recall("k") == "11"
    assert store.recall("k", "team/project") == "22"
    assert len({adapter.namespace for adapter in store.adapters()}) == 2


def test_explain_shows_ordered_tokens_that_the_base_does_not_know(store: MemoryStore) -> None:
    explanation = store.explain("hex")
    assert "".join(token.text for token in explanation.tokens[:-1]) == AWKWARD["hex"]
    assert all(token.ordered for token in explanation.tokens)
    assert explanation.min_prob >= 0.6
    assert min(token.base_prob for token in explanation.tokens) < 0.5


def test_load_gives_the_model_and_the_prompt_for_ones_own_generate(store: MemoryStore) -> None:
    import torch

    model, prompt = store.load("one")
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=1
    )
    assert store.base.tokenizer.decode(output[0, -1:]) == "x"


def test_the_base_is_itself_again_bit_for_bit_except_after_load(base: Path, tmp_path: Path) -> None:
    import torch

    with MemoryStore(tmp_path / "m", str(base)) as store:

        def logits() -> torch.Tensor:
            with torch.no_grad():
                return store.base.model(input_ids=torch.arange(4, 60)[None]).logits

        bare = logits()
        store.write({"a": "123", "b": "456"}, rank=4)
        assert torch.equal(logits(), bare)
        calls = (
            lambda: store.recall("a"),
            lambda: list(store.recall_many()),
            lambda: store.explain("b"),
            store.verify,
            lambda: store.write({"c": "789"}, rank=4),
        )
        for call in calls:
            store.load("a")
            loaded = logits()
            assert not torch.equal(loaded, bare)
            store.plan({"d": "012"})  # neither decodes nor writes
            assert torch.equal(logits(), loaded)
            call()
            assert torch.equal(logits(), bare)


def test_verify_decodes_everything(store: MemoryStore) -> None:
    report = store.verify()
    assert (report.records, report.exact, report.failed, report.damaged) == (18, 18, (), ())
    assert report.ok


def test_stats_count_what_is_there(store: MemoryStore) -> None:
    stats = store.stats()
    assert (stats.records, stats.adapters, stats.unfinished_records) == (18, len(store.adapters()), 0)
    assert stats.min_prob is not None
    assert stats.min_prob >= 0.6
    assert stats.parameters > 0


def test_plan_trains_and_changes_nothing(store: MemoryStore) -> None:
    before = store.outcomes()
    plan = store.plan({"a": "123", "one": "x"})
    assert sum(shard.records for shard in plan.shards) == 1  # "one" is there already
    assert "a" not in store
    assert store.pending() is None
    assert store.outcomes() == before


def test_a_plan_keeps_to_the_ranks_allowed(store: MemoryStore) -> None:
    [shard] = store.plan({"a": "123"}, limits=RankLimits(choices=(16, 32))).shards
    assert shard.rank == 16
    with pytest.raises(ValueError, match="between 1 and 4, not 5"):
        store.plan({"a": "123"}, rank=5, limits=RankLimits(4))


def test_namespaces_are_planned_apart(store: MemoryStore) -> None:
    shards = store.plan([Record("a", "123"), Record("b", "4567", "team"), Record("c", "89")]).shards
    assert [(shard.first, shard.records, shard.length) for shard in shards] == [(0, 2, 5), (2, 1, 4)]


def test_a_store_opened_again_recalls_from_disk(store: MemoryStore) -> None:
    with MemoryStore(store.path, create=False) as again:
        assert again.recall("latex") == AWKWARD["latex"]


def test_threads_share_a_store(store: MemoryStore) -> None:
    expected = {**numbers(8), **AWKWARD}
    wrong: list[str] = []

    def read(keys: list[str]) -> None:
        wrong.extend(key for key in keys if store.recall(key) != expected[key])

    keys = list(expected)
    threads = [threading.Thread(target=read, args=(keys[i::3] * 2,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_opening_a_missing_store_for_reading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="nothing-here"):
        MemoryStore(tmp_path / "nothing-here", create=False)
    assert not (tmp_path / "nothing-here").exists()


def test_a_folder_with_other_things_is_not_taken_over(base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(StoreFormatError, match="not a loramem store"):
        MemoryStore(tmp_path, str(base))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_newer_format_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    import json
    import shutil

    copy = tmp_path / "memory"
    shutil.copytree(store.path, copy)
    manifest = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(StoreFormatError, match="format 2"):
        MemoryStore(copy, create=False)


def test_all_is_private_also_while_a_write_goes_on(base: Path, tmp_path: Path) -> None:
    modes: dict[str, int] = {}

    def look(_: object = None) -> None:
        for path in (folder, *folder.rglob("*")):
            modes[path.name] = modes.get(path.name, 0) | path.stat().st_mode & 0o777

    before, folder = os.umask(0), tmp_path / "memory"
    try:
        folder.mkdir()  # an empty folder is taken as it is, and closed
        with MemoryStore(folder, str(base)) as store:
            (adapter,) = store.write(numbers(2), progress=look).adapters
            look()
    finally:
        os.umask(before)
    folders = {"memory", "adapters", "staging", adapter}
    assert folders | {"store.lock", "store.holder", "index.db", "index.db-wal", "adapter_config.json"} <= modes.keys()
    assert {name for name, mode in modes.items() if mode == 0o700} >= folders
    assert all(mode == 0o600 for name, mode in modes.items() if "." in name), modes


def test_events_are_told_and_no_log_record_holds_a_key_or_a_value(base: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)  # below what is shown by default
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write({"agent": "4815162342", "other agent": "1123581321"})
        store.write({"agent": "4815162342"})
        store.update("agent", "2718281828")
        store.rename("agent", "renamed agent")
        store.delete("other agent")
        store.compact()
        store.erase("renamed agent")
        store.repair()
        store.write({"third agent": "1414213562"})
        list(store.recall_many())
        flip_bit(next((store.path / "adapters").rglob("*.safetensors")), 9999)
        assert not store.verify().ok
        for look in (lambda: store.recall("agent"), lambda: MemoryStore(store.path).recall("third agent")):
            with pytest.raises(LoramemError):
                look()
    assert {record.event for record in caplog.records if record.name == "loramem._util.events"} == set(NAMES)
    committed = [record.facts for record in caplog.records if getattr(record, "event", "") == "committed"]
    assert committed[0] == {"adapters": 1, "records": 2}
    told = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    for secret in ("agent", "4815162342", "1123581321", "2718281828", "1414213562"):
        assert secret not in told


def test_no_adapter_file_names_a_path_or_a_value(store: MemoryStore) -> None:
    for path in (store.path / "adapters").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(store.base.folder).encode() not in content
            assert AWKWARD["hex"].encode() not in content


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.dictionaries(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12), min_size=1, max_size=4)
)
def test_whatever_is_accepted_is_recalled(
    base: Path, tmp_path_factory: pytest.TempPathFactory, records: dict[str, str]
) -> None:
    with MemoryStore(tmp_path_factory.mktemp("any") / "memory", str(base)) as store:
        try:
            store.write(records)
        except RecordError:
            assert len(store) == 0
        else:
            assert {key: store.recall(key) for key in records} == records


def test_a_write_takes_as_long_as_it_and_its_planning_took(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, plan = [0.0], Planner.plan

    def slowly(planner: Planner, *args: Any, **kwargs: Any) -> Plan:
        seconds[0] += 100
        return plan(planner, *args, **kwargs)

    monkeypatch.setattr(write, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(Planner, "plan", slowly)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert store.write(numbers(1)).elapsed_s == 100
