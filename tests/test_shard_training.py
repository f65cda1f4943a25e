"""Which placement and which engine a shard is trained with: the ladder, and what falls back to running layers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramem import MemoryStore, WriterSettings
from loramem.errors import RecallError, UnsupportedBaseModel
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.certificate import Proof, prove
from loramem.models.decoding import answer_probabilities
from loramem.models.features import Features
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import as_records
from loramem.training import shard_training, shards
from loramem.training.progress import Training
from loramem.training.shard_training import ShardTraining, features_of, train_shard, with_other_batches

from .architectures import build_tiny
from .conftest import numbers

SETTINGS = WriterSettings()


@pytest.fixture
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base))


def encode(base: BaseModel, records: dict[str, str]) -> list[EncodedRecord]:
    return encode_records(as_records(records), base.tokenizer, base.template, base.max_tokens)


def train(adapted: AdaptedModel, records: Sequence[EncodedRecord], placement: Placement) -> ShardTraining:
    """At rank 4, over features if there are any."""
    features = features_of([adapted], records, placement)
    return train_shard(adapted, "new", records, 4, placement, SETTINGS, features=features)


Engine = Callable[[Placement], tuple[int, ...]]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], list[tuple[str, Placement]]]:
    """Both engines only say which records are stubborn where; what was called with which placement."""

    def replaced(stubborn: Engine) -> list[tuple[str, Placement]]:
        called = list[tuple[str, Placement]]()

        def ended(how: str, adapted: AdaptedModel, name: str, rank: int, placement: Placement) -> Training:
            called.append((how, placement))
            adapted.create(name, rank, placement, 0)
            return Training(stubborn(placement), rank, 1, 1, 1, 0.0)

        def on_features(
            adapted: AdaptedModel,
            name: str,
            features: Any,
            records: int,
            rank: int,
            rung: Placement,
            *_: Any,
            **__: Any,
        ) -> Training:
            return ended("features", adapted, name, rank, rung)

        def through_layers(
            adapted: AdaptedModel, name: str, records: Any, rank: int, placement: Placement, *_: Any
        ) -> Training:
            return ended("layers", adapted, name, rank, placement)

        monkeypatch.setattr(shard_training, "train_on_features", on_features)
        monkeypatch.setattr(shard_training, "train_adapter", through_layers)
        return called

    return replaced


def test_few_stubborn_records_stay_at_the_rung_and_are_reported(
    loaded: BaseModel, engines: Callable[[Engine], list[tuple[str, Placement]]]
) -> None:
    ladder = Placement.ladder(loaded.model)
    called = engines(lambda _: (3, 17))
    found = train(AdaptedModel(loaded), encode(loaded, numbers(20)), ladder[0])
    assert called == [("features", ladder[0])]
    assert found.placement == ladder[0]
    assert found.training.stubborn == (3, 17)


def test_one_adapter_for_all_climbs_for_a_single_stubborn_record(
    loaded: BaseModel, engines: Callable[[Engine], list[tuple[str, Placement]]]
) -> None:
    ladder = Placement.ladder(loaded.model)
    engines(lambda rung: (3,) if rung == ladder[0] else ())
    records, adapted = encode(loaded, numbers(20)), AdaptedModel(loaded)
    features = features_of([adapted], records, ladder[0])
    found = train_shard(adapted, "new", records, 4, ladder[0], SETTINGS, features=features, one_adapter=True)
    assert (found.placement, found.training.stubborn) == (ladder[1], ())


def test_more_climb_to_the_next_rung(
    loaded: BaseModel, engines: Callable[[Engine], list[tuple[str, Placement]]]
) -> None:
    ladder = Placement.ladder(loaded.model)
    called = engines(lambda rung: (3, 5, 17) if rung == ladder[0] else (5,))
    adapted = AdaptedModel(loaded)
    found = train(adapted, encode(loaded, numbers(20)), ladder[0])
    assert called == [("features", ladder[0]), ("features", ladder[1])]
    assert (found.placement, found.training.stubborn) == (ladder[1], (5,))
    names = {name.split(".")[-3] for name in adapted.weights("new")}
    assert names == set(ladder[1].modules)  # what is attached is the last one tried


def test_what_no_rung_holds_is_trained_through_layers(
    loaded: BaseModel, engines: Callable[[Engine], list[tuple[str, Placement]]]
) -> None:
    ladder = Placement.ladder(loaded.model)
    called = engines(lambda _: (0,))
    found = train(AdaptedModel(loaded), encode(loaded, numbers(2)), ladder[1])
    assert called == [("features", ladder[1]), ("features", ladder[2]), ("layers", ladder[3])]
    assert (found.placement, found.training.stubborn) == (ladder[3], (0,))


def test_a_placement_that_is_not_behind_the_last_attention_runs_layers(
    loaded: BaseModel, engines: Callable[[Engine], list[tuple[str, Placement]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = engines(lambda _: (0,))
    monkeypatch.setattr(shard_training, "collect", None)  # nothing is collected for it
    every, adapted = Placement.default(loaded.model), AdaptedModel(loaded)
    for modules, layers in ((["down_proj"], [1, 2]), (["q_proj"], [2]), (every.modules, every.layers)):
        placement = Placement.named(loaded.model, modules, layers)
        found = train(adapted, encode(loaded, numbers(2)), placement)
        assert called.pop() == ("layers", placement)
        assert found.placement == placement
        assert not called
        adapted.remove("new")


def off(features: Features) -> Features:
    return Features(*(v + 0.1 if v.is_floating_point() else v for v in vars(features).values()))


@pytest.mark.parametrize("fault", ["other logits", "nan", "two attentions", "a signature of its own"])
def test_a_base_whose_end_is_not_understood_is_trained_through_layers_with_a_warning(
    loaded: BaseModel, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the widest placement: it holds more, and runs layers anyway."""

    def collect(model: PreTrainedModel, records: Sequence[EncodedRecord], *_: int) -> Features:
        if fault == "two attentions":
            raise UnsupportedBaseModel("Block has 2 attentions where one is expected.")
        if fault == "a signature of its own":
            raise TypeError("forward() got an unexpected keyword argument")
        found = collected(model, records)
        return (
            off(found)
            if fault == "other logits"
            else Features(*(v * torch.nan if v.is_floating_point() else v for v in vars(found).values()))
        )

    collected = shard_training.collect
    monkeypatch.setattr(shard_training, "collect", collect)
    records, ladder = encode(loaded, numbers(2)), Placement.ladder(loaded.model)
    with caplog.at_level(logging.WARNING):
        found = train(AdaptedModel(loaded), records, ladder[0])
    assert [record.message for record in caplog.records if "layers are run in training" in record.message]
    assert found.placement == ladder[-1]
    assert found.training.stubborn == ()
    assert min(float(probs.min()) for _, probs in answer_probabilities(loaded.model, records)) >= 0.6


def test_exhausted_memory_is_not_taken_for_a_base_that_is_not_understood(
    loaded: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(*_: object) -> Features:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shard_training, "collect", collect)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(AdaptedModel(loaded), encode(loaded, numbers(2)), Placement.ladder(loaded.model)[0])


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first rung holds nothing."""

    def train(adapted: AdaptedModel, name: str, features: Any, records: int, *arguments: Any, **named: Any) -> Training:
        training: Training = on_features(adapted, name, features, records, *arguments, **named)
        if arguments[1].modules != ("down_proj",):
            return training
        return Training(tuple(range(records)), training.rank, training.parameters, training.steps, training.visits, 0.0)

    on_features = shard_training.train_on_features
    monkeypatch.setattr(shard_training, "train_on_features", train)
    yield


def test_the_placement_that_holds_a_shard_is_recorded_with_its_adapter(
    base: Path, tmp_path: Path, crowded: None
) -> None:
    records = numbers(3, 2)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(records)
        (adapter,) = store.adapters()
        manifest = store.manifest
    assert tuple(manifest.placement["modules"]) == ("down_proj",)
    assert list(adapter.placement["modules"]) == ["down_proj", "gate_proj", "up_proj"]
    with MemoryStore(tmp_path / "m", create=False) as store:
        assert {key: store.recall(key) for key in records} == records
        assert store.verify().ok


def test_a_shard_whose_proof_fails_is_trained_again_where_it_had_climbed_to(
    base: Path, tmp_path: Path, crowded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, cautions, train = list[tuple[str, ...]](), list[float](), shard_training.train_on_features
    begun, ended = list[bool](), list[dict[str, Tensor]]()

    def noted(adapted: AdaptedModel, name: str, *arguments: Any, **named: Any) -> Training:
        tried.append(arguments[3].modules)
        cautions.append(named["caution"])
        if (begin_at := named["begin_at"]) is not None:
            assert all(torch.equal(weight, ended[-1][tensor]) for tensor, weight in begin_at.items())
        begun.append(begin_at is not None)
        training = train(adapted, name, *arguments, **named)
        ended.append({tensor: weight.clone() for tensor, weight in adapted.weights(name).items()})
        return training

    def proving(*arguments: Any) -> Proof:
        if cautions[-1] == shards.CAUTION[0]:
            raise RecallError("not exact", key="k", adapter="a")
        return prove(*arguments)

    monkeypatch.setattr(shard_training, "train_on_features", noted)
    monkeypatch.setattr(shards, "prove", proving)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write(numbers(3, 2))
        (outcome,) = store.outcomes()
    mlp = ("down_proj", "gate_proj", "up_proj")
    assert tried == [("down_proj",), mlp, mlp]
    assert cautions == [*shards.CAUTION[:1] * 2, shards.CAUTION[1]]
    assert begun == [False, False, True]  # what a proof refused is trained on
    assert not outcome.certified  # at the placement that the store plans for


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_behind_experts_the_attentions_projection_alone_is_trained_and_recalls(family: str, tmp_path: Path) -> None:
    records = numbers(3, 2)
    tiny = build_tiny(family, tmp_path / f"tiny-{family}")
    with MemoryStore(tmp_path / "m", str(tiny)) as store:
        store.write(records)
        (adapter,) = store.adapters()
    assert list(adapter.placement["modules"]) == ["o_proj"]
    assert list(adapter.placement["layers"]) == [1]
    with MemoryStore(tmp_path / "m", create=False) as store:
        assert {key: store.recall(key) for key in records} == records


@pytest.mark.parametrize(("dtype", "passes"), [("bfloat16", 2), ("float32", 1)])
def test_one_model_in_half_precision_alone_is_trained_over_what_other_batches_do(
    base: Path, dtype: str, passes: int
) -> None:
    adapted = AdaptedModel(load_base_model(str(base), dtype=dtype))
    records = encode(adapted.base, numbers(9))
    placement = Placement.ladder(adapted.model)[0]
    features = features_of([adapted], records, placement)
    assert features is not None
    found = with_other_batches([adapted], records, features)
    assert found is not None
    assert len(found) == passes
    for each in found:
        assert torch.equal(each.targets, features[0].targets)
        torch.testing.assert_close(each.entering, features[0].entering, rtol=0.1, atol=0.1)
    assert with_other_batches([adapted], records, None) is None
    assert with_other_batches([adapted, adapted], records, features) == features
