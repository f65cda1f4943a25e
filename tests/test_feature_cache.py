"""What is kept of features, and for whom."""

from dataclasses import replace
from pathlib import Path

import pytest

from loramem import MemoryStore
from loramem.models import features
from loramem.models.base_model import load_base_model
from loramem.models.feature_cache import FeatureCache
from loramem.models.features import collect
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import as_records
from loramem.training import shard_training

from .conftest import numbers


@pytest.fixture(scope="module")
def collected(base: Path) -> tuple[list[EncodedRecord], features.Features]:
    loaded = load_base_model(str(base))
    records = encode_records(as_records(numbers(3)), loaded.tokenizer, loaded.template, loaded.max_tokens)
    return records, collect(loaded.model, records)


def test_what_was_kept_is_given_once_for_the_same_records_in_the_same_order(
    collected: tuple[list[EncodedRecord], features.Features],
) -> None:
    records, found = collected
    cache = FeatureCache()
    cache.keep(records, found)
    assert cache.pop(records[:2]) is None
    assert cache.pop(records[::-1]) is None
    assert cache.pop([*records[:2], replace(records[2], answer_ids=(1,))]) is None
    assert cache.pop(records) is found
    assert cache.pop(records) is None


def test_what_is_too_large_beside_the_rest_is_not_kept(
    collected: tuple[list[EncodedRecord], features.Features],
) -> None:
    records, found = collected
    cache = FeatureCache(most_bytes=2 * found.size_bytes - 1)
    cache.keep(records, found)
    cache.keep(records[:1], found)
    assert cache.pop(records[:1]) is None
    assert cache.pop(records) is found
    cache.keep(records[:1], found)
    cache.clear()
    assert cache.pop(records[:1]) is None


@pytest.mark.parametrize("most_bytes", [0, 2**20])
def test_a_write_is_the_same_bytes_whether_its_features_were_kept_or_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    passes = list[int]()

    def watched(model: object, records: list[EncodedRecord]) -> features.Features:
        passes.extend([len(records)] * (len(records) > 1))  # single ones only try the end of the model
        return collect(model, records)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_training, "collect", watched)
    with MemoryStore(tmp_path / "m", str(base), serve=()) as store:
        adapted = store._session.adapted
        adapted.kept_features.most_bytes = most_bytes
        first = store.write(numbers(4)).adapters
        assert passes == ([4] if most_bytes else [4, 4])
        assert not adapted.kept_features._kept
        store.plan({"another": "12"})
        assert not adapted.kept_features._kept  # nothing is trained after it
    with MemoryStore(tmp_path / "other", str(base), serve=()) as store:
        assert store.write(numbers(4)).adapters == first
