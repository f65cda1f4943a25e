"""Every write teaches the store what its first ranks came to, whether it was committed or not."""

from dataclasses import replace
from pathlib import Path

import pytest

from loramem import MemoryStore, WriterSettings, capacity, shards, timings, writer
from loramem.boundary import Outcome
from loramem.errors import DoesNotFit, StubbornRecords

from .conftest import numbers


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_new_store_has_learnt_nothing(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert store.outcomes() == []


def test_a_write_leaves_one_outcome_per_shard_at_its_planned_rank(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(capacity.GOALS, "fast", replace(capacity.GOALS["fast"], shard_records=3))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        plan, report = store.plan(numbers(6)), store.write(numbers(6))
        found = store.outcomes()
        assert len(found) == len(plan.shards) == 2
        for outcome, shard in zip(found, plan.shards, strict=True):
            assert outcome.certified
            assert (outcome.kind, outcome.rank, outcome.length) == ("unknown", shard.rank, 12)  # three of four digits
            assert (outcome.parameters, outcome.cost_bits) == (shard.parameters, shard.cost_bits)
        assert sum(outcome.visits * 3 for outcome in found) == pytest.approx(report.visits)
        store.write(numbers(6))  # nothing new, nothing learnt
        store.write({"one more": "1234"})
        assert store.outcomes()[:2] == found
        assert len(store.outcomes()) == 3
    with MemoryStore(tmp_path / "memory", create=False) as again:
        assert again.outcomes()[:2] == found


def test_the_size_of_an_adapter_is_what_was_planned(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [shard] = store.plan(numbers(4)).shards
        store.write(numbers(4))
        (adapter,) = store.adapters()
        assert adapter.parameters == shard.parameters
        assert adapter.size_bytes == pytest.approx(shard.size_bytes, rel=0.05)


def grown(*arguments: object, **named: object) -> writer.Training:
    """A train_adapter that ends two ranks above the one it was given, as if it had grown."""
    adapted, name, records, rank, *rest = arguments
    return writer.train_adapter(adapted, name, records, rank + 2, *rest, **named)  # type: ignore[arg-type,operator]


def test_a_write_that_had_to_grow_leaves_its_first_rank_uncertified_and_its_last_certified(
    base: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shards, "train_adapter", grown)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [shard] = store.plan(numbers(4), rank=2).shards
        assert store.write(numbers(4), rank=2).rank == 4
        (adapter,) = store.adapters()
        assert store.outcomes() == [
            Outcome("unknown", 2, 16, shard.parameters, shard.cost_bits, certified=False),
            Outcome("unknown", 4, 16, adapter.parameters, shard.cost_bits, certified=True),  # its visits tell no pace
        ]


def stubborn(times: int):
    """A train_adapter that calls the first record stubborn, that many times."""
    left = [times]

    def train(*arguments: object, **named: object) -> writer.Training:
        training = writer.train_adapter(*arguments, **named)  # type: ignore[arg-type]
        left[0] -= 1
        return replace(training, stubborn=(0,)) if left[0] >= 0 else training

    return train


def test_a_failed_write_leaves_uncertified_outcomes_and_nothing_else(base: Path, tmp_path: Path) -> None:
    settings = WriterSettings(max_rank=1, patience_passes=2)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [shard] = store.plan(numbers(40, 12), rank=1).shards
        with pytest.raises(StubbornRecords):
            store.write(numbers(40, 12), rank=1, settings=settings)
        assert store.outcomes() == [Outcome("unknown", 1, 480, shard.parameters, shard.cost_bits, certified=False)]
        assert (len(store), store.adapters(), store.pending()) == (0, [], None)
        assert not list((store.path / "adapters").glob("*"))
        assert timings.seconds_per_visit(store.base.fingerprint.weights[:12]) is None
        assert store.verify().ok


@pytest.mark.parametrize("partial", [False, True])
def test_records_that_needed_an_adapter_of_their_own_were_not_certified_together(
    base: Path, tmp_path: Path, monkeypatch, partial: bool
) -> None:
    monkeypatch.setattr(shards, "train_adapter", stubborn(1 + partial))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        report = store.write(numbers(4), partial=partial)
        assert len(report.failed) == partial
        (outcome,) = store.outcomes()
        assert (outcome.certified, outcome.visits) == (False, None)


def test_what_does_not_fit_is_refused_before_the_journal(base: Path, tmp_path: Path, monkeypatch) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with monkeypatch.context() as patched:
            patched.setattr(capacity, "MOST_BITS", 1e-6)
            for write in (store.write, store.plan):
                with pytest.raises(DoesNotFit, match="do not fit into one adapter of rank 128"):
                    write({"a": "9100672710"})
        assert (store.pending(), len(store), store.outcomes()) == (None, 0, [])
        store.write({"a": "9100672710"})  # nothing stands in the way
        assert store.recall("a") == "9100672710"


def test_an_interrupted_write_teaches_once_it_is_resumed(base: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(shards, "train_adapter", interrupt)
            store.write(numbers(4))
        assert store.outcomes() == []
        store.resume()
        assert [outcome.certified for outcome in store.outcomes()] == [True]


def test_a_write_says_what_training_takes_here(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert store.plan(numbers(4)).training_s is None
        report = store.write(numbers(4))
        seconds = timings.seconds_per_visit(store.base.fingerprint.weights[:12], "cpu")
        # The records have four tokens each.
        assert seconds == pytest.approx(report.training_s / (report.visits * 4))
        [shard] = store.plan({"another": "5678"}).shards
        assert shard.training_s is not None and shard.training_s > 0


def test_after_five_outcomes_the_store_plans_by_them(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        for number in range(5):
            assert not store.plan({"more": "1234"}).calibrated
            store.write({f"key {number}": str(number)})
        plan = store.plan({"more": "1234"})
        assert plan.calibrated
        assert plan.success is not None and plan.success > 0.9
