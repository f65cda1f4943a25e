"""Records of several adapters in one batch: each row through its own, and what fails alone fails alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loramem import Dtype, MemoryStore, Recall
from loramem.errors import IntegrityError, KeyNotFound, RecallError
from loramem.models.adapters import AdaptedModel
from loramem.store.mixed import mixed_batches
from loramem.store.read import Reader

from .conftest import numbers

SPACES = ("", "team", "other")
RECORDS = {(space, key): f"{number}{value}" for number, space in enumerate(SPACES) for key, value in numbers(5).items()}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "memory"
    with MemoryStore(folder, str(base)) as store:
        for space in SPACES:
            store.write({key: value for (own, key), value in RECORDS.items() if own == space}, namespace=space)
    return folder


@pytest.fixture
def store(written: Path, base: Path) -> Iterator[MemoryStore]:
    with MemoryStore(written, str(base)) as opened:
        yield opened


def values(store: MemoryStore, questions: list[tuple[str, str]]) -> list[str]:
    answers = store.recall_each(questions)
    assert all(isinstance(answer, Recall) for answer in answers), answers
    return [answer.value for answer in answers]


def batches(store: MemoryStore) -> list[set[str]]:
    """Adapters of each batch of all records."""
    with store._index.snapshot():
        found = [store._locate(key, space) for space, key in RECORDS]
    return [{found[place].adapter.id for place in batch} for batch in mixed_batches(store._session.reader, found)]


def test_questions_of_several_namespaces_are_one_batch_of_several_adapters(store: MemoryStore) -> None:
    questions = list(RECORDS)[::-1]  # the same keys are in every namespace, with other values
    assert values(store, questions) == [RECORDS[question] for question in questions]
    assert len(store.adapters()) == 3
    assert [len(batch) for batch in batches(store)] == [3]


def test_the_same_question_twice_is_answered_twice(store: MemoryStore) -> None:
    assert len(set(values(store, [("team", "key 1")] * 3))) == 1
    assert store.recall_each([]) == []


def test_no_more_adapters_are_mixed_than_may_be_loaded(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.recall("key 0")
    store._session.adapted.max_loaded = 2
    assert max(len(batch) for batch in batches(store)) == 2
    assert values(store, list(RECORDS)) == list(RECORDS.values())


def test_adapters_that_change_attention_are_not_mixed(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptedModel, "is_behind_attention", lambda *_: False)
    assert [len(batch) for batch in batches(store)] == [1, 1, 1]
    assert values(store, list(RECORDS)) == list(RECORDS.values())


def test_an_unknown_key_is_an_error_in_its_place(store: MemoryStore) -> None:
    first, unknown, last = store.recall_each([("", "key 1"), ("", "key 11"), ("team", "key 1")])
    assert isinstance(first, Recall) and isinstance(last, Recall) and first.value != last.value
    assert isinstance(unknown, KeyNotFound) and "key 1" in unknown.close


def test_a_wrong_value_is_an_error_in_its_place(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Reader._texts
    monkeypatch.setattr(Reader, "_texts", lambda *args: ["nonsense", *texts(*args)[1:]])
    answers = store.recall_each(list(RECORDS))
    (wrong,) = (answer for answer in answers if isinstance(answer, RecallError))
    assert sum(isinstance(answer, Recall) for answer in answers) == len(RECORDS) - 1
    assert "nonsense" not in str(wrong)


def test_a_damaged_adapter_fails_for_its_own_records_alone(
    base: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = store.adapters()[0].id

    def check(self: Reader, adapter: object) -> None:
        if adapter.id == damaged:
            raise IntegrityError("not what was committed", what=damaged)

    monkeypatch.setattr(Reader, "check", check)
    for (space, key), answer in zip(RECORDS, store.recall_each(list(RECORDS)), strict=True):
        assert isinstance(answer, IntegrityError if space == store.adapters()[0].namespace else Recall), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_computed_as_its_adapter_alone_computes_it(base: Path, written: Path, dtype: Dtype) -> None:
    with MemoryStore(written, str(base)) as store:
        reader = store._session.served_in(dtype).reader
        adapted, ids = reader.adapted, torch.tensor([[5, 6, 7, 8]] * 3)
        alone = []
        for number, adapter in enumerate(store.adapters()):
            with reader.active(adapter):
                alone.append(adapted.model(input_ids=ids).logits[number])
        with adapted.mixed([adapter.id for adapter in store.adapters()]):
            together = adapted.model(input_ids=ids).logits
        assert torch.equal(together, torch.stack(alone))
        assert not torch.equal(together[0], together[1])


def test_after_a_mixed_batch_the_model_is_the_plain_base(store: MemoryStore) -> None:
    values(store, list(RECORDS))
    layers = store._session.adapted._carriers()
    assert layers and all(layer.disable_adapters and not layer._forward_hooks for layer in layers)
