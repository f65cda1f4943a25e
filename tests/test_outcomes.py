"""Every write teaches the store what its first ranks came to, whether it was committed or not."""

from dataclasses import replace
from pathlib import Path

import pytest

from loramem import MemoryStore, WriterSettings
from loramem.errors import DoesNotFit, StubbornRecords
from loramem.models import shard_sizes
from loramem.planning import plan, success, timings
from loramem.planning.calibration import trials_of
from loramem.planning.limits import RankLimits
from loramem.planning.plan import ShardPlan
from loramem.records.outcome import Outcome
from loramem.training import shard_training, shards
from loramem.training.feature_writer import train_on_features
from loramem.training.progress import Training
from loramem.training.shard_training import ShardTraining, train_shard

from .conftest import numbers
from .stubborn import stubborn


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_new_store_has_learnt_nothing(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert store.outcomes() == []


def test_a_write_leaves_one_outcome_per_shard_at_its_planned_rank(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shard_sizes.Size, "shard_tokens", lambda *_: 15)  # three records of four digits
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


def test_a_plan_counts_how_many_different_tokens_a_shard_asks_for(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        for values, various in ((["1"], 2), (["12", "21"], 3), (["123456", "654321"] * 2, 7)):  # and the end token
            [shard] = store.plan({f"key {number}": value for number, value in enumerate(values)}).shards
            assert various - 0.1 < shard.vocabulary <= various


def test_the_size_of_an_adapter_is_what_was_planned(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [shard] = store.plan(numbers(4), rank=16).shards
        store.write(numbers(4), rank=16)
        (adapter,) = store.adapters()
        assert adapter.parameters == shard.parameters
        assert adapter.size_bytes == pytest.approx(shard.size_bytes, rel=0.05)


def missed(shard: ShardPlan, rank: int, length: int) -> Outcome:
    """Of a shard that was not certified at its planned rank."""
    return Outcome("unknown", rank, length, shard.parameters, shard.cost_bits, False, vocabulary=shard.vocabulary)


def grown(*arguments: object, **named: object) -> ShardTraining:
    """A train_shard that ends two ranks above the one it was given, as if it had grown."""
    adapted, name, records, rank, *rest = arguments
    return train_shard(adapted, name, records, rank + 2, *rest, **named)  # type: ignore[arg-type,operator]


def test_a_write_that_had_to_grow_leaves_its_first_rank_uncertified_and_its_last_certified(
    base: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shards, "train_shard", grown)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [shard] = store.plan(numbers(4), rank=2).shards
        assert store.write(numbers(4), rank=2).rank == 4
        (adapter,) = store.adapters()
        assert store.outcomes() == [
            missed(shard, 2, 16),
            # its visits tell no pace
            replace(missed(shard, 4, 16), parameters=adapter.parameters, certified=True),
        ]


def climbing(*arguments: object, **named: object) -> Training:
    """A train_on_features that holds no record in one module alone."""
    *_, records, _, placement, _, _ = arguments
    training = train_on_features(*arguments, **named)  # type: ignore[arg-type]
    too_small = len(placement.modules) == 1  # type: ignore[attr-defined]
    return replace(training, stubborn=tuple(range(records))) if too_small else training  # type: ignore[call-overload]


@pytest.mark.parametrize("train", [train_shard, grown], ids=["at the planned rank", "at another"])
def test_a_write_that_needed_another_placement_leaves_its_first_rank_uncertified_and_no_time(
    base: Path, tmp_path: Path, monkeypatch, train
) -> None:
    monkeypatch.setattr(shard_training, "train_on_features", climbing)
    monkeypatch.setattr(shards, "train_shard", train)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [shard] = store.plan(numbers(4), rank=2).shards
        store.write(numbers(4), rank=2)
        (adapter,) = store.adapters()
        assert (store.manifest.placement["modules"], len(adapter.placement["modules"])) == (["down_proj"], 3)
        assert store.outcomes() == [missed(shard, 2, 16)]
        assert timings.seconds_per_visit(store.base.fingerprint.weights[:12], "cpu") is None  # a plan's is elsewhere


def test_a_base_that_is_never_trained_where_it_was_planned_teaches_nothing_of_that_place(
    base: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shards, "features_of", lambda *_: None)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(numbers(2))
        (adapter,) = store.adapters()
        assert adapter.placement["layers"] == [1, 2]
        assert store.outcomes() == []
        assert timings.seconds_per_visit(store.base.fingerprint.weights[:12], "cpu") is not None  # as of all its writes


@pytest.mark.usefixtures("impatient")
def test_a_failed_write_leaves_uncertified_outcomes_and_nothing_else(base: Path, tmp_path: Path) -> None:
    settings = WriterSettings(max_rank=1)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        [shard] = store.plan(numbers(5, 12), rank=1, limits=RankLimits(1)).shards
        with pytest.raises(StubbornRecords) as caught:
            store.write(numbers(5, 12), rank=1, settings=settings)
        assert caught.value.keys
        assert store.outcomes() == [missed(shard, 1, 60)]
        assert (len(store), store.adapters(), store.pending()) == (0, [], None)
        assert not list((store.path / "adapters").glob("*"))
        assert timings.seconds_per_visit(store.base.fingerprint.weights[:12]) is None
        assert store.verify().ok


@pytest.mark.parametrize("partial", [False, True])
def test_records_that_needed_an_adapter_of_their_own_were_not_certified_together(
    base: Path, tmp_path: Path, monkeypatch, partial: bool
) -> None:
    monkeypatch.setattr(shards, "train_shard", stubborn("key 1", times=1 + partial))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        report = store.write(numbers(4), partial=partial)
        assert len(report.failed) == partial
        (outcome,) = store.outcomes()
        assert (outcome.certified, outcome.visits) == (False, None)


def test_what_does_not_fit_is_refused_before_the_journal(base: Path, tmp_path: Path, monkeypatch) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with monkeypatch.context() as patched:
            patched.setattr(plan, "MOST_BITS", 1e-6)
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
            patched.setattr(shards, "train_shard", interrupt)
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


def test_what_a_store_was_taught_moves_the_odds_of_its_plans(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        before = store.plan_inputs().boundary
        for number in range(5):
            store.write({f"key {number}": str(number)})
        inputs = store.plan_inputs()
        assert inputs.law is not None and before is not None
        assert inputs.boundary == success.fit(trials_of(store.outcomes(), inputs.law)) != before
