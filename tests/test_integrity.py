"""Damage is reported and never yields a value."""

import random
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest

from loramem import MemoryStore
from loramem.errors import IntegrityError, LoramemError, OtherBaseModel, RecallError
from loramem.index.index import Index

from .conftest import numbers

RECORDS = numbers(6)


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(dict(list(RECORDS.items())[:3]))
        store.write(dict(list(RECORDS.items())[3:]))
    return path


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "memory")
    return tmp_path / "memory"


def execute(store: Path, statement: str) -> None:
    connection = sqlite3.connect(store / "index.db")
    with connection:
        connection.execute(statement)
    connection.close()


def reseal(store: Path) -> None:
    """Make what the index says now look as committed: what a seal does not cover must show otherwise."""
    with closing(Index.open(store / "index.db")) as index, index.change() as change:
        for row in list(index.db.table("records").rows):
            change.put("records", row)
        change.count_anew()


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def never_wrong(store: MemoryStore) -> int:
    """How many keys still give their value; a key that gives another value fails the test."""
    given = 0
    for key, value in RECORDS.items():
        try:
            assert store.recall(key) == value
            given += 1
        except LoramemError:
            pass
    return given


def test_values_come_from_the_weights_and_not_from_the_index(copy: Path) -> None:
    execute(copy, "update records set value = ''")
    reseal(copy)
    with MemoryStore(copy, create=False) as store:
        assert {key: store.recall(key) for key in RECORDS} == RECORDS


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_flipped_bit_in_an_adapter_is_reported_and_yields_no_value(copy: Path, name: str) -> None:
    rng = random.Random(name)
    adapter = sorted((copy / "adapters").iterdir())[0]
    for _ in range(5):
        bit = rng.randrange((adapter / name).stat().st_size * 8)
        flip_bit(adapter / name, bit)
        with MemoryStore(copy, create=False) as store:
            report = store.verify()
            assert any(name in problem for problem in report.damaged)
            assert report.exact == 3
            assert never_wrong(store) == 3
        flip_bit(adapter / name, bit)
    with MemoryStore(copy, create=False) as store:
        assert store.verify().ok


def test_swapped_adapters_are_reported_and_yield_no_value(copy: Path) -> None:
    first, second = sorted((copy / "adapters").iterdir())
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    with MemoryStore(copy, create=False) as store:
        report = store.verify()
        assert report.exact == 0
        assert len(report.damaged) >= 2
        with pytest.raises(IntegrityError, match="not what was committed"):
            store.recall("key 0")


def test_a_missing_adapter_file_is_reported(copy: Path) -> None:
    adapter = sorted((copy / "adapters").iterdir())[0]
    (adapter / "adapter_model.safetensors").unlink()
    with MemoryStore(copy, create=False) as store:
        assert store.verify().exact == 3
        assert never_wrong(store) == 3


@pytest.mark.parametrize(
    "statement",
    [
        "update records set digest = replace(digest, substr(digest, 1, 1), 'x') where key = 'key 1'",
        "update records set adapter = (select adapter from records where key = 'key 5') where key = 'key 1'",
        "update records set key = 'key 9' where key = 'key 1'",
        "update records set answer_tokens = 2 where key = 'key 1'",
        "update records set min_prob = 0.99 where key = 'key 1'",
        "update adapters set rank = rank + 1",
        "update adapters set files = substr(files, 2)",
        "update records set metadata = '{' where key = 'key 1'",
        "update records set answer_tokens = 'abc' where key = 'key 1'",
        "update records set digest = x'ff00' where key = 'key 1'",
        "update records set digest = 'é' where key = 'key 1'",
        "update records set digest = cast(x'ff61' as text) where key = 'key 1'",
        "delete from records where key = 'key 1'",
    ],
)
def test_a_changed_index_row_is_reported_and_never_gives_a_wrong_value(copy: Path, statement: str) -> None:
    execute(copy, statement)
    with MemoryStore(copy, create=False) as store:
        assert store.verify().damaged
        assert never_wrong(store) in (0, 3, 5, 6)
        for look in (lambda: store.stats(), lambda: list(store.recall_many()), lambda: store.delete("key 1")):
            with suppress(LoramemError):  # and nothing else
                look()


def test_a_damaged_row_is_not_read_for_metadata_or_rewritten_as_it_is(copy: Path) -> None:
    execute(copy, "update records set metadata = '{\"of\": \"Ann\"}' where key = 'key 1'")
    with MemoryStore(copy, create=False) as store:
        for look in (lambda: store.update("key 1", "new"), lambda: list(store.records()), lambda: store.compact()):
            with pytest.raises(IntegrityError, match="key 1"):
                look()
        assert store.recall("key 0") == RECORDS["key 0"]


def test_a_decoded_value_that_is_not_the_committed_one_is_an_error(copy: Path) -> None:
    execute(copy, "update records set salt = 'other' where key = 'key 1'")
    reseal(copy)
    with MemoryStore(copy, create=False) as store, pytest.raises(RecallError, match="key 1"):
        store.recall("key 1")


def test_a_row_that_counts_other_tokens_than_the_weights_give_is_reported(copy: Path) -> None:
    execute(copy, "update records set answer_tokens = answer_tokens + 1 where key = 'key 1'")
    reseal(copy)
    with MemoryStore(copy, create=False) as store:
        assert store.verify(quick=True).ok
        assert any("key 1" in problem and "4 answer tokens" in problem for problem in store.verify().damaged)


def test_a_damaged_manifest_is_refused(copy: Path) -> None:
    manifest = copy / "store.json"
    manifest.write_text(manifest.read_text().replace('"train_threshold": 0.9', '"train_threshold": 0.8'))
    with pytest.raises(IntegrityError, match=r"store\.json"):
        MemoryStore(copy, create=False)


def test_another_base_model_is_refused(copy: Path, base_of, tmp_path: Path) -> None:
    with MemoryStore(copy, str(base_of("llama")), create=False) as store, pytest.raises(OtherBaseModel):
        store.recall("key 0")
    same_name = tmp_path / "tiny-qwen3"  # same id, same shape, other weights
    shutil.copytree(base_of("qwen3", seed=1), same_name)
    with MemoryStore(copy, str(same_name), create=False) as store, pytest.raises(OtherBaseModel, match="weights"):
        store.recall("key 0")


def test_another_chat_template_is_another_base_model(copy: Path, base: Path, tmp_path: Path) -> None:
    changed = tmp_path / base.name
    shutil.copytree(base, changed)
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with MemoryStore(copy, str(changed), create=False) as store, pytest.raises(OtherBaseModel, match="tokenizer"):
        store.recall("key 0")


@pytest.mark.parametrize("page", range(1, 12))
def test_a_page_that_was_lost_is_an_error_of_ours_or_none(copy: Path, page: int) -> None:
    content = bytearray((copy / "index.db").read_bytes())
    content[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    (copy / "index.db").write_bytes(content)
    looks = (
        *(MemoryStore.stats, MemoryStore.namespaces, MemoryStore.adapters, MemoryStore.pending, MemoryStore.outcomes),
        *(len, lambda store: list(store.keys()), lambda store: list(store.records()), lambda store: "key 1" in store),
        *(lambda store: store.history("key 1"), lambda store: store.recall("nobody"), MemoryStore.compact),
    )
    with suppress(LoramemError), MemoryStore(copy, create=False) as store:
        assert store.verify(quick=True).damaged
        for look in looks:
            with suppress(LoramemError):
                look(store)


@pytest.mark.parametrize("content", [None, b"", b"not a database at all" * 99])
def test_an_index_that_cannot_be_read_is_refused(copy: Path, content: bytes | None) -> None:
    for path in copy.glob("index.db*"):
        path.unlink()
    if content is not None:
        (copy / "index.db").write_bytes(content)
    with pytest.raises(IntegrityError):
        MemoryStore(copy, create=False)
