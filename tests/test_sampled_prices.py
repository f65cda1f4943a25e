"""A long write is planned by the prices of a sample, as long as its answers look alike."""

import random
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loramem import MemoryStore
from loramem.errors import DoesNotFit
from loramem.models import shard_sizes
from loramem.planning import sampled_prices
from loramem.planning.limits import RankLimits
from loramem.planning.pricing import Priced, price_of, run_pricing
from loramem.planning.sampled_prices import Prices, priced_by
from loramem.records.prompts import EncodedRecord
from loramem.records.record import Record
from loramem.store import planner
from loramem.store.request import WriteRequest

END, SHARD = 0, 10


def drawn(count: int, tokens: int, vocabulary: int, first: int = 1, seed: int = 0) -> list[EncodedRecord]:
    rng = random.Random(seed)
    answers = ((*(rng.randrange(first, first + vocabulary) for _ in range(tokens)), END) for _ in range(count))
    return [EncodedRecord(Record(f"key {number}", "-"), (1, number), ids) for number, ids in enumerate(answers)]


def ranges_of(encoded: list[EncodedRecord]) -> list[tuple[int, int]]:
    return [(first, first + SHARD) for first in range(0, len(encoded), SHARD)]


def asked(encoded: list[EncodedRecord]) -> list[int]:
    chosen = priced_by(encoded, ranges_of(encoded))
    return [number for number, by in enumerate(chosen) if by == number]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of two shards."""
    monkeypatch.setattr(sampled_prices, "SAMPLE", 2 * SHARD)


def test_all_of_a_short_write_are_asked_about() -> None:
    assert asked(drawn(1_000, 4, 10)) == list(range(100))
    assert asked([]) == []


def test_of_what_looks_alike_the_first_are_asked_about_and_then_one_in_so_many(few: None) -> None:
    encoded = drawn(400, 8, 5)
    assert asked(encoded) == [0, 1, 17, 33]
    assert priced_by(encoded, ranges_of(encoded))[15:19] == [1, 1, 17, 17]  # the newest that looks alike


@pytest.mark.parametrize("other", [(12, 5, 1), (8, 15, 1), (8, 5, 6)])
def test_longer_answers_more_tokens_and_others_are_asked_about(few: None, other: tuple[int, int, int]) -> None:
    encoded = [*drawn(50, 8, 5), *drawn(30, *other)]
    assert asked(encoded)[:3] == [0, 1, 5]
    assert asked([*encoded, *drawn(30, 8, 5, seed=1)]) == asked(encoded)  # the first are known still


def prices(encoded: list[EncodedRecord], chosen: list[int]) -> Prices:
    def of(first: int, last: int) -> Priced:
        probs = [[0.02] * entry.length for entry in encoded[first:last]]
        return Priced(price_of(encoded[first:last], probs), probs)

    ranges = ranges_of(encoded)
    return Prices(encoded, ranges, chosen, {number: of(*ranges[number]) for number in sorted({*chosen})})


def test_an_estimate_is_near_what_asking_gives_in_shards_of_any_size() -> None:
    encoded = drawn(60, 8, 5)
    whole, sampled = prices(encoded, [0, 1, 2, 3, 4, 5]), prices(encoded, [0, 1, 1, 1, 1, 5])
    for part in ((0, 10), (10, 20), (0, 20), (13, 17), (50, 60)):
        assert sampled(*part) == whole(*part)
    for part in ((20, 30), (30, 35), (25, 35), (20, 40)):  # the last is more than was asked about at once
        told, known = sampled(*part), whole(*part)
        assert told.vocabulary == known.vocabulary
        assert told.base_loss == pytest.approx(known.base_loss)
        assert told.cost_bits == pytest.approx(known.cost_bits, rel=0.25)
        assert told.cost_bits != known.cost_bits


class Counting(ThreadPoolExecutor):
    """One thread; counts what it prices."""

    def __init__(self) -> None:
        super().__init__(1)
        self.priced = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.priced += fn is run_pricing
        return super().submit(fn, *args, **kwargs)


@pytest.fixture
def store(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    monkeypatch.setattr(shard_sizes.Size, "shard_tokens", lambda *_: 30)  # ten records of two digits
    for module in (sampled_prices, planner):
        monkeypatch.setattr(module, "SAMPLE", 2 * SHARD)
    with MemoryStore(tmp_path / "memory", str(base)) as opened:
        yield opened


RECORDS = {f"key {number}": f"{random.Random(number).randrange(100):02}" for number in range(70)}


def plan(store: MemoryStore, executor: Executor | None) -> Any:
    encoded, _ = store._session.planner.admit([Record(key, value) for key, value in RECORDS.items()])
    return store._session.planner.plan(encoded, WriteRequest(), executor=executor)


def test_workers_are_asked_about_the_sample_and_plan_as_this_process_does(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Counting() as workers:
        sampled = plan(store, workers)
    assert (workers.priced, len(sampled.shards)) == (2, 7)
    assert sampled == plan(store, None)
    monkeypatch.setattr(planner, "priced_by", lambda encoded, ranges: list(range(len(ranges))))
    whole = plan(store, None)
    assert [shard.vocabulary for shard in sampled.shards] == [shard.vocabulary for shard in whole.shards]
    for shard, known in zip(sampled.shards, whole.shards, strict=True):
        assert shard.cost_bits == pytest.approx(known.cost_bits, rel=0.25)
        assert abs(shard.rank - known.rank) <= 2


def test_nothing_is_refused_by_an_estimate(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store.plan(RECORDS, rank=1, limits=RankLimits(1))
    # An estimate a million times too high:
    monkeypatch.setattr(Prices, "_length", lambda prices, first, last: 10.0 ** (6 * (first >= 2 * SHARD)))
    assert len(store.plan(RECORDS, rank=1, limits=RankLimits(1)).shards) == len(whole.shards)
    with pytest.raises(DoesNotFit):
        store.plan({"long": "".join(random.Random(0).choices("0123456789", k=200))}, limits=RankLimits(1))
