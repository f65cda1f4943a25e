"""The training loop: when it stops, when the rank grows, what it does with stubborn records and with NaN."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loramem import MemoryStore, WriterSettings
from loramem.errors import TrainingDiverged
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.batches import Batch, answer_logits, make_batch, token_losses
from loramem.models.decoding import answer_probabilities
from loramem.models.ending import Ending
from loramem.models.layers import decoder_layers
from loramem.models.placement import Placement
from loramem.models.trunk import Trunk
from loramem.records.prompts import encode_records
from loramem.records.record import as_records
from loramem.training import shard_training, shards, trainer
from loramem.training.progress import WriteProgress
from loramem.training.settings import OBJECTIVES
from loramem.training.trainer import NetworkSchedule

from .conftest import numbers
from .stubborn import stubborn


@pytest.fixture
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base))


def encode(base: BaseModel, records: dict[str, str]):
    return encode_records(as_records(records), base.tokenizer, base.template, base.max_tokens)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_certifies_every_token(loaded: BaseModel, objective: str) -> None:
    records = encode(loaded, numbers(6))
    adapted = AdaptedModel(loaded)
    settings = WriterSettings(objective=objective)
    training = trainer.train_adapter(adapted, "new", records, 4, Placement.default(loaded.model), settings)
    assert training.stubborn == ()
    for _, probs in answer_probabilities(loaded.model, records):
        assert float(probs.min()) >= settings.certify_threshold


def test_a_long_record_is_written_with_the_sliding_window(loaded: BaseModel) -> None:
    records = encode(loaded, {"long": "".join(numbers(20, 3).values())})
    settings = WriterSettings(long_tokens=40)
    training = trainer.train_adapter(
        AdaptedModel(loaded), "new", records, 16, Placement.default(loaded.model), settings
    )
    assert training.stubborn == ()


Pass = tuple[bool, dict[int, float]]  # is it trained on; lowest probability of each record in it
MEASURED = 3  # passes of twelve records in fours that say where training starts, before its first step


@pytest.fixture
def in_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, and products as exact on every processor."""
    monkeypatch.setattr(trainer, "BATCH_RECORDS", 4)
    monkeypatch.setattr(trainer, "autocast_dtype", lambda *_: None)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """Every pass through the layers that carry the adapter, as it happens."""
    found: list[Pass] = []

    def watched(trunk: Trunk, indices: Sequence[int], batch: Batch) -> torch.Tensor:
        logits = whole(trunk, indices, batch)
        lowest = torch.exp(-token_losses(logits.detach(), batch).amax(1)).tolist()
        found.append((torch.is_grad_enabled(), dict(zip(indices, lowest, strict=True))))
        return logits

    whole = Trunk.logits
    monkeypatch.setattr(Trunk, "logits", watched)
    return found


@pytest.mark.usefixtures("in_fours")
@pytest.mark.parametrize("objective", ["memft-ot", "memft-sw"])
def test_learned_records_leave_the_training_batches_and_are_looked_at_again(
    loaded: BaseModel, passes: list[Pass], objective: str
) -> None:
    records = encode(loaded, numbers(12))
    settings = WriterSettings(objective=objective)
    training = trainer.train_adapter(AdaptedModel(loaded), "new", records, 4, Placement.default(loaded.model), settings)
    visits, left, looked_at = Counter[int](), set[int](), set[int]()
    for trained, lowest in passes[MEASURED:]:
        if trained:
            assert not left & lowest.keys()
            visits.update(lowest.keys())
        elif visits:
            looked_at |= left & lowest.keys()
        left -= lowest.keys()
        left |= {index for index, probability in lowest.items() if probability >= settings.train_threshold}
    assert training.stubborn == ()
    assert training.visits == visits.total() == sum(len(lowest) for trained, lowest in passes[MEASURED:] if trained)
    assert len(visits) == len(records)
    assert min(visits.values()) < max(visits.values())
    assert looked_at


@pytest.mark.usefixtures("in_fours")
def test_plain_cross_entropy_trains_on_every_record_in_every_pass(loaded: BaseModel, passes: list[Pass]) -> None:
    records = encode(loaded, numbers(12))
    settings = WriterSettings(objective="sft")
    training = trainer.train_adapter(AdaptedModel(loaded), "new", records, 4, Placement.default(loaded.model), settings)
    trained = [lowest for with_gradient, lowest in passes[MEASURED:] if with_gradient]
    assert [len(lowest) for lowest in trained] == [4] * training.steps
    for first in range(0, len(trained), 3):
        assert sorted(index for lowest in trained[first : first + 3] for index in lowest) == list(range(12))
    # Some were learned before the last pass: the other objectives would have left them out of it.
    assert any(max(lowest.values()) >= settings.train_threshold for lowest in trained[:-3])


def fresh_run(
    loaded: BaseModel,
    records: dict[str, str],
    schedule: NetworkSchedule | None = None,
    **settings: object,
) -> trainer._Run:
    adapted, placement = AdaptedModel(loaded), Placement.default(loaded.model)
    adapted.create("new", 4, placement, seed=0)
    trunk = Trunk(loaded.model, encode(loaded, records), min(placement.layers))
    chosen = WriterSettings(**settings)  # type: ignore[arg-type]
    return trainer._Run(adapted, "new", trunk, 4, chosen, schedule or NetworkSchedule(), None, 0.0)


def hold_for_learned(run: trainer._Run, indices: list[int]) -> None:
    run.lowest[indices], run.open_tokens[indices] = 1.0, 0


@pytest.mark.parametrize("held", [[0], [1, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_records_wrongly_held_for_learned_come_back(
    loaded: BaseModel, passes: list[Pass], held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "BATCH_RECORDS", 2)
    run = fresh_run(loaded, numbers(6))
    passes.clear()
    hold_for_learned(run, held)
    assert run.until_certified_or_stalled()
    assert run.stubborn_records() == []
    for index in held:
        trained = [with_gradient for with_gradient, lowest in passes if index in lowest]
        assert trained[0] is False  # a look, which shows it
        assert any(trained)
    assert sorted(passes[-1][1]) == list(range(6))
    assert min(passes[-1][1].values()) >= run.settings.certify_threshold


@pytest.mark.parametrize(("held", "passes_before"), [([0], 1), ([0, 2, 3, 5], 2)], ids=str)
def test_learned_records_are_looked_at_once_there_were_as_many_visits(
    loaded: BaseModel, passes: list[Pass], held: list[int], passes_before: int
) -> None:
    run = fresh_run(loaded, numbers(6), NetworkSchedule(1e-9, patience_passes=4))  # the others are never learned
    passes.clear()
    hold_for_learned(run, held)
    assert not run.until_certified_or_stalled()
    told = [(trained, sorted(lowest)) for trained, lowest in passes[: passes_before + 2]]
    others = sorted(set(range(6)).difference(held))
    assert told == [(True, others)] * passes_before + [(False, held), (True, list(range(6)))]


def test_records_that_slip_after_they_were_learned_come_back(loaded: BaseModel, passes: list[Pass]) -> None:
    run = fresh_run(loaded, numbers(6))
    assert run.until_certified_or_stalled()
    certified = len(passes)
    hold_for_learned(run, list(range(6)))
    with torch.no_grad():
        for name, tensor in run.adapted.weights("new").items():
            if ".lora_B." in name:
                tensor.zero_()
    run.restart(4)
    assert run.until_certified_or_stalled()
    (looked, first), *rest = passes[certified:]
    assert not looked
    assert max(first.values()) < run.settings.certify_threshold
    assert {index for trained, lowest in rest if trained for index in lowest} == set(range(6))
    assert min(rest[-1][1].values()) >= run.settings.certify_threshold


@pytest.mark.parametrize(
    ("settings", "stays"),
    [({}, False), ({"objective": "memft-ot"}, False), ({"objective": "sft"}, True), ({"long_tokens": 40}, True)],
    ids=["memft-sw", "memft-ot", "sft", "a single long record"],
)
def test_which_objectives_leave_learned_records_out(
    loaded: BaseModel, settings: dict[str, object], stays: bool
) -> None:
    run = fresh_run(loaded, {"long": "".join(numbers(20, 3).values())}, **settings)
    hold_for_learned(run, [0])
    assert run.active() == [0] * stays
    for probability in (0.0, 0.89, float("nan")):  # certified is not learned
        run.lowest[0] = probability
        assert run.active() == [0]


def test_growing_the_rank_keeps_the_function(loaded: BaseModel) -> None:
    adapted, placement = AdaptedModel(loaded), Placement.default(loaded.model)
    adapted.create("new", 2, placement, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in adapted.weights("new").values():
            tensor.normal_(std=0.1)
    batch = make_batch(encode(loaded, numbers(3)), "cpu")
    with torch.no_grad():
        before = answer_logits(loaded.model, batch)
        adapted.grow("new", 5, placement, seed=1)
        after = answer_logits(loaded.model, batch)
        with adapted.disabled():
            base = answer_logits(loaded.model, batch)
    assert (before - base).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert {min(tensor.shape) for tensor in adapted.weights("new").values()} == {5}


@pytest.mark.usefixtures("impatient")
def test_the_rank_grows_when_progress_stops(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        report = store.write(numbers(24, 6), rank=1)
        assert report.rank > 1
        assert report.exact_match == 1.0


def test_stubborn_records_get_an_adapter_of_their_own(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "train_shard", stubborn("key 2", times=1))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        report = store.write(numbers(4))
        assert report.written == 4
        assert len(report.adapters) == 2
        assert {key: store.recall(key) for key in numbers(4)} == numbers(4)


def test_an_adapter_is_trained_on_the_records_that_it_holds_alone(base: Path, tmp_path: Path, monkeypatch) -> None:
    """Else it kept traces of a stubborn record's value, which erasing the record would leave."""
    others = {key: value for key, value in numbers(4).items() if key != "key 2"}
    monkeypatch.setattr(shards, "train_shard", stubborn("key 2", times=1))
    with MemoryStore(tmp_path / "memory", str(base)) as store, MemoryStore(tmp_path / "fresh", str(base)) as fresh:
        report = store.write(numbers(4), rank=4)
        assert len(report.adapters) == 2
        assert {*fresh.write(others, rank=4).adapters} < {*report.adapters}


def test_partial_commits_what_was_certified_and_names_the_rest(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "train_shard", stubborn("key 0"))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        report = store.write(numbers(4), partial=True)
        assert (report.written, report.failed) == (3, ("key 0",))
        assert "key 0" not in store
        assert store.recall("key 3") == numbers(4)["key 3"]


@pytest.mark.parametrize("bad", [{4}, {1}, {1, 2}], ids=["in training", "before training", "at the first step"])
def test_nan_once_goes_back_to_the_last_good_state(loaded: BaseModel, monkeypatch, bad: set[int]) -> None:
    calls = [0]

    def sometimes(trunk: Trunk, indices: list[int], batch: Batch) -> torch.Tensor:
        calls[0] += 1
        logits = whole(trunk, indices, batch)
        return logits * float("nan") if calls[0] in bad else logits

    whole = Trunk.logits
    monkeypatch.setattr(Trunk, "logits", sometimes)
    records = encode(loaded, numbers(6))
    training = trainer.train_adapter(
        AdaptedModel(loaded), "new", records, 4, Placement.default(loaded.model), WriterSettings()
    )
    assert training.stubborn == ()


def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """New stores write at the default placement, through the tail of the network."""
    monkeypatch.setattr(Placement, "ladder", classmethod(lambda cls, model: [cls.default(model)]))


@pytest.mark.parametrize(("engine", "remedy"), [("features", "lower feature_rate"), ("deep", "Check the base model")])
def test_nan_at_every_rate_is_a_typed_error_and_commits_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, remedy: str
) -> None:
    whole, ending = Trunk.logits, Ending.logits

    def in_training(*args: Any, deviating: bool = True) -> torch.Tensor:
        """Of the few tokens that training looks at; what is computed over the whole vocabulary stays."""
        return ending(*args, deviating=deviating) * (float("inf") if len(args) > 2 else 1)

    if engine == "deep":
        deep(monkeypatch)
        monkeypatch.setattr(Trunk, "logits", lambda *args: whole(*args) * float("inf"))
    else:
        monkeypatch.setattr(Ending, "logits", in_training)
        monkeypatch.setattr(shard_training, "train_adapter", lambda *_: pytest.fail("layers were run"))
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with pytest.raises(TrainingDiverged, match=remedy):
            store.write(numbers(2))
        assert len(store) == 0
        assert store.pending() is None


def test_the_same_seed_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        with MemoryStore(tmp_path / name, str(base)) as store:
            store.write(numbers(5), settings=WriterSettings(seed=3))
            (adapter,) = (store.path / "adapters").iterdir()
            contents.append({path.name: path.read_bytes() for path in adapter.iterdir()})
    assert contents[0] == contents[1]


def test_progress_reports_every_step(base: Path, tmp_path: Path) -> None:
    told: list[WriteProgress] = []
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        report = store.write(numbers(4), progress=told.append)
    assert [progress.step for progress in told if not progress.proved] == list(range(1, report.steps + 1))
    assert told[-1].tokens_total == 4 * 5  # four digits and the end token


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "adam"},
        {"max_rank": 0},
        {"train_threshold": 0.5},
        {"certify_threshold": 0.4},
    ],
)
def test_contradictory_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        WriterSettings(**wrong)  # type: ignore[arg-type]


def test_the_default_placement_is_all_linear_modules_of_the_last_two_layers(loaded: BaseModel) -> None:
    placement = Placement.default(loaded.model)
    assert placement.layers == (1, 2)
    assert placement.modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    adapted = AdaptedModel(loaded)
    adapted.create("new", 1, placement, seed=0)
    counted = sum(tensor.numel() for tensor in adapted.weights("new").values())
    assert placement.parameters_per_rank(loaded.model) == counted
    assert len(decoder_layers(loaded.model)) == 3


def test_the_rate_is_halved_for_good_while_nothing_improves(loaded: BaseModel) -> None:
    run = fresh_run(loaded, numbers(6))
    run.note_progress()  # the first look is progress
    before = run.rate_factor()
    run.step += max(trainer.DECAY_PASSES * run.steps_per_pass, trainer.DECAY_STEPS)
    run.note_progress()
    assert run.rate_factor() == before / 2
    run.open_tokens[0] = 0
    run.note_progress()  # progress again does not bring the rate back
    assert run.decay == 1 / 2


@pytest.mark.parametrize(
    ("open_share", "falls_to", "halved"), [(0.4, 0.95, True), (0.4, 0.85, False), (0.6, 0.95, False)]
)
def test_a_rate_at_which_the_last_half_of_the_tokens_hovers_is_halved(
    loaded: BaseModel, open_share: float, falls_to: float, halved: bool
) -> None:
    """Hovering: the open tokens' loss falls, but by less than a tenth in the passes after which a rate is halved."""
    run = fresh_run(loaded, numbers(10))
    run.open_tokens = (run.tokens * open_share).round().long()
    assert (run.unordered < trainer.SETTLING * int(run.tokens.sum())) is (open_share < 0.5)
    run.open_losses = torch.ones(10)
    run.note_progress()
    run.open_losses *= falls_to
    run.step += max(trainer.DECAY_PASSES * run.steps_per_pass, trainer.DECAY_STEPS)
    run.note_progress()
    assert run.decay == (1 / 2 if halved else 1)
    assert run.best_step == run.step  # the write is not given up, and its rank does not grow


def test_plain_cross_entropy_does_not_hover(loaded: BaseModel) -> None:
    run = fresh_run(loaded, numbers(10), objective="sft")
    run.open_tokens = (run.tokens * 0.4).round().long()
    run.losses = torch.ones(10)
    run.note_progress()
    run.losses *= 0.95
    run.step += max(trainer.DECAY_PASSES * run.steps_per_pass, trainer.DECAY_STEPS)
    run.note_progress()
    assert run.decay == 1


def test_a_rate_that_wrecks_the_weights_is_lowered(
    loaded: BaseModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "WRECKED_STEPS", 2)  # without it the falling rate rescues so small a write
    monkeypatch.setattr(trainer, "WRECKED_PASSES", 0)
    records, placement, wild = encode(loaded, numbers(12)), Placement.default(loaded.model), NetworkSchedule(9.0)
    with caplog.at_level("INFO", logger="loramem.training.trainer"):
        trainer.train_adapter(
            AdaptedModel(loaded), "new", records, 4, placement, WriterSettings(max_rank=4), schedule=wild
        )
    rates = [record.args[-1] for record in caplog.records if "starting again" in record.msg]
    assert rates == pytest.approx([3.0, 1.0])
