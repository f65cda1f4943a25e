"""The published methods on our engine: the same gradients as the whole model's, the published schedules, the scores."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from loramem import Record
from loramem.errors import InputError
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.batches import per_position, token_losses
from loramem.models.decoding import answer_probabilities
from loramem.models.layers import decoder_layers
from loramem.models.trunk import Trunk
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.suites import paper_unit, published
from loramem.suites.paper_recipe import IGNORED, _padded_right
from loramem.suites.paper_schedule import _PHONEBOOK, Schedule, whole_batches
from loramem.suites.paper_unit import PaperUnit, attached
from loramem.suites.published import PUBLISHED, Trained, add_gradient, forward, token_weights, train_published
from loramem.suites.timing import count_exact
from loramem.training.objectives import SlidingState, memft_ot, memft_sw, weighted_mean

from .conftest import numbers

SHORT = Schedule(1e-2, 60, 5)
CURRICULUM = Schedule(1e-2, 150, 5, (10, 20, 30, 40, 150))


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base), device="cpu")


def encode(base: BaseModel, values: dict[str, str]) -> list[EncodedRecord]:
    records = [Record(key, value) for key, value in values.items()]
    return encode_records(records, base.tokenizer, base.template, base.max_tokens)


@pytest.fixture(scope="module")
def records(loaded: BaseModel) -> list[EncodedRecord]:
    return encode(loaded, numbers(10))


@pytest.fixture(scope="module")
def uneven(loaded: BaseModel) -> list[EncodedRecord]:
    """Keys and values of different lengths, so that batches are padded."""
    return encode(loaded, {"a": "12", "a longer key": "9081726354", "key": "55555", "another": "7"})


def logits(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=torch.arange(4, 16)[None]).logits


def busy_unit(base: BaseModel, **place: object) -> PaperUnit:
    """A unit without dropout whose B is not zero, so that A has a gradient too."""
    unit = PaperUnit(base.model, 4, 0, **place).eval()
    torch.nn.init.normal_(unit.B, std=0.05, generator=torch.Generator().manual_seed(1))
    return unit


def gradients(unit: PaperUnit) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in unit.parameters()]
    unit.zero_grad()
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in found)
    return found


# One step


def weights_by_hand(method: str, losses: torch.Tensor, mask: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    if method == "sft":
        return mask.float()
    if method == "memft-ot":
        return memft_ot(losses, mask)
    return memft_sw(losses, mask, correct, SlidingState.start(len(losses)))[0]


@pytest.mark.parametrize("place", [{}, {"layer": 1}, {"kind": "down_proj"}, {"kind": "down_proj", "layer": 1}], ids=str)
@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("architecture", ["qwen3", "gpt_neox"])
def test_a_step_on_the_trunk_has_the_gradients_of_the_whole_model(
    base_of: Callable[..., Path], architecture: str, method: str, place: dict[str, object]
) -> None:
    base = load_base_model(str(base_of(architecture)), device="cpu")
    values = {"a": "12", "a longer key": "9081726354", "key": "55555"}
    chosen = encode(base, values if method != "memft-sw" else {"a longer key": "9081726354" * 4})
    unit = busy_unit(base, **place)

    ids, mask, labels = _padded_right(chosen)
    with attached(unit, base.model):
        whole = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    losses = cross_entropy(whole.mT, targets, ignore_index=IGNORED, reduction="none")
    weights = weights_by_hand(method, losses, targets != IGNORED, whole.argmax(-1) == targets)
    weighted_mean(losses, weights).backward()
    expected = gradients(unit)

    trunk = Trunk(base.model, chosen, unit.layer)
    assert trunk.first_layer == unit.layer > 0
    with attached(unit, base.model):
        tail, batch = forward(trunk, range(len(chosen)))
        losses = token_losses(tail, batch)
        correct = per_position(tail.argmax(-1) == batch.targets[batch.supervised], batch)
        start = SlidingState.start(1) if method == "memft-sw" else None
        weights, _ = token_weights(method, losses, batch.supervised, correct, start)
        add_gradient(losses, weights, 1)
    for got, wanted in zip(gradients(unit), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_layers_below_the_unit_are_not_run(loaded: BaseModel, uneven: list[EncodedRecord]) -> None:
    unit = busy_unit(loaded, layer=1)
    trunk = Trunk(loaded.model, uneven, unit.layer)
    ran: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, place=place: ran.append(place))
        for place, layer in enumerate(decoder_layers(loaded.model))
    ]
    with attached(unit, loaded.model):
        forward(trunk, [0, 2])
    for handle in handles:
        handle.remove()
    assert ran == [1, 2]


def test_the_gradient_of_accumulated_batches_is_their_mean(loaded: BaseModel, uneven: list[EncodedRecord]) -> None:
    unit = busy_unit(loaded)
    trunk = Trunk(loaded.model, uneven, unit.layer)

    def add(indices: list[int], accumulate: int) -> None:
        with attached(unit, loaded.model):
            logits, batch = forward(trunk, indices)
        losses = token_losses(logits, batch)
        add_gradient(losses, batch.supervised.float(), accumulate)

    alone = []
    for indices in ([0, 1], [2, 3]):
        add(indices, 1)
        alone.append(gradients(unit))
    add([0, 1], 2)
    add([2, 3], 2)
    for both, first, second in zip(gradients(unit), *alone, strict=True):
        assert torch.allclose(both, (first + second) / 2, atol=1e-6)


def test_the_zero_loss_of_the_curriculum_leaves_no_gradient() -> None:
    losses, mask = torch.full((2, 3), 0.1, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    weights, _ = token_weights("memft-sw", losses, mask, mask, None)
    add_gradient(losses, weights, 1)
    assert losses.grad is None
    weights, _ = token_weights("memft-ot", losses, mask, mask, None)  # falls back to all tokens
    add_gradient(losses, weights, 1)
    assert torch.allclose(losses.grad, torch.full((2, 3), 1 / 6))


def test_a_lora_of_the_down_projection_adds_x_a_b_to_its_output(loaded: BaseModel, uneven: list[EncodedRecord]) -> None:
    unit = busy_unit(loaded, kind="down_proj", layer=0)
    module = decoder_layers(loaded.model)[0].mlp.down_proj
    assert unit.parameter_count == 4 * (module.in_features + module.out_features)
    x = torch.randn(2, 3, module.in_features)
    merged = module.weight + (unit.A @ unit.B).T
    with attached(unit, loaded.model):
        assert torch.allclose(module(x), x @ merged.T, atol=1e-4)
    assert torch.allclose(module(x), x @ module.weight.T, atol=1e-5)


# Schedules

TABLE = """
qwen sft 100 5000 20000;      qwen memft-ot 200 10000 40000;  qwen sft 400 20000 80000
qwen sft 800 20000 160000;    qwen memft-ot 1200 30000 240000; qwen sft 1600 40000 320000
qwen sft 2400 60000 480000;   qwen memft-ot 3200 40000 640000
qwen memft-sw 100 2600 26000; qwen memft-sw 200 5200 52000;   qwen memft-sw 400 11600 116000
qwen memft-sw 800 5800 232000; qwen memft-sw 1200 5700 456000; qwen memft-sw 1600 8800 704000
qwen memft-sw 2400 13200 1056000; qwen memft-sw 3200 20000 1600000
llama sft 250 5000 50000;     llama memft-ot 4000 80000 800000; llama sft 6000 60000 1200000
llama sft 8000 80000 1600000; llama memft-sw 250 2600 65000;  llama memft-sw 500 6400 160000
llama memft-sw 1000 6400 320000; llama memft-sw 2000 8800 880000; llama memft-sw 3000 15000 1500000
llama memft-sw 4000 20000 2000000; llama memft-sw 6000 15000 3000000; llama memft-sw 8000 22400 4480000
"""  # steps and record visits, counted from the launch scripts of the published code


@pytest.mark.parametrize(
    "row", [row.split() for row in TABLE.replace("\n", ";").split(";") if row.strip()], ids=" ".join
)
def test_a_published_row_has_the_published_steps_and_visits(row: list[str]) -> None:
    family, method, *counts = row
    records, steps, visits = map(int, counts)
    schedule = Schedule.published(records, method, family)
    assert (schedule.steps(records), sum(schedule.exposed(records))) == (steps, visits)


def test_other_sizes_take_the_row_below_with_a_batch_that_divides_them() -> None:
    assert Schedule.published(399, "sft") == Schedule(1e-2, 200, 3)
    assert Schedule.published(840) == Schedule(7e-3, 350, 20, (30, 60, 90, 120, 350), 2)
    assert Schedule.published(6, "memft-ot") == Schedule(1e-2, 200, 3)
    assert Schedule.long_context().steps(1) == 2000


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_whole_batches_are_the_rows_own_and_the_published_sizes_stay(family: str) -> None:
    rows = {size for (of, _), rows in _PHONEBOOK.items() if of == family for size in rows}
    assert all(whole_batches(size, family) == size for size in rows)
    for records in range(30, 9000, 7):
        whole = whole_batches(records, family)
        assert abs(whole - records) <= 50
        assert all(Schedule.published(whole, way, family) == Schedule.row(whole, way, family) for way in PUBLISHED)


def test_few_records_stay_as_many() -> None:
    assert [whole_batches(records, "qwen") for records in (4, 10, 11, 149, 151)] == [4, 10, 20, 140, 160]
    assert Schedule.published(151, "sft").batch_records == 1  # of a prime number
    assert Schedule.row(151, "sft").batch_records == 4


def test_a_shortened_schedule_keeps_its_phases() -> None:
    short = Schedule.published(100).shortened(20)
    assert short == Schedule(1e-2, 15, 10, (1, 2, 3, 4, 15))
    assert short.exposed(100) == [20, 40, 60, 80, *[100] * 11]


def test_the_curriculum_takes_prefixes_of_one_order_and_the_others_a_new_one_each_epoch() -> None:
    steps = list(Schedule(1e-2, 3, 2, (1, 2, 3), 1).batches(10, seed=4))
    order = [index for (batch,) in steps[-3:] for index in batch]
    assert [index for (batch,) in steps[:1] for index in batch] == order[:2]
    assert [index for (batch,) in steps[1:3] for index in batch] == order[:4]
    epochs = list(Schedule(1e-2, 2, 5, accumulate=2).batches(10, seed=4))
    first, second = ([index for batch in step for index in batch] for step in epochs)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(10))


def test_batches_that_do_not_divide_the_records_are_refused() -> None:
    with pytest.raises(ValueError, match="Batches of 4 do not divide 10"):
        Schedule(1e-2, 1, 4).steps(10)


# Whole runs


def train(base: BaseModel, records: list[EncodedRecord], method: str, **changes: object) -> Trained:
    schedule = CURRICULUM if method == "memft-sw" else SHORT
    return train_published(base, records, method, 16, schedule, seed=3, **changes)


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_method_writes_records_that_are_decoded_and_leaves_the_base_alone(
    loaded: BaseModel, records: list[EncodedRecord], method: str
) -> None:
    before = logits(loaded)
    trained = train(loaded, records, method)
    assert torch.equal(logits(loaded), before)
    with trained.attached():
        assert count_exact(loaded, records) == 10
        assert torch.equal(logits(loaded), logits(loaded))  # no dropout
        assert not torch.allclose(logits(loaded), before)
    assert torch.equal(logits(loaded), before)
    assert count_exact(loaded, records) == 0
    schedule = CURRICULUM if method == "memft-sw" else SHORT
    assert (trained.steps, trained.visits) == (schedule.steps(10), sum(schedule.exposed(10)))
    assert trained.parameters == 2 * 64 * 16
    assert trained.seconds > 0


def test_the_curve_counts_what_training_saw(
    loaded: BaseModel, records: list[EncodedRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_unit, "DROPOUT", 0.0)  # of 0.96 of the tokens at the end training saw 0.76
    trained = train(loaded, records, "memft-sw")
    steps, shares = zip(*trained.curve, strict=True)
    assert 20 < len(steps) <= 40
    assert list(steps) == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, trained.steps)
    # Twenty epochs of a step each with half of the records, then two steps to an epoch: never seen is not ordered.
    assert all(share <= 0.5 for step, share in trained.curve if step <= 20)
    assert shares[0] < 0.4
    with trained.attached():
        probabilities = torch.cat([probs for _, probs in answer_probabilities(loaded.model, records)])
    assert float((probabilities > 0.5).float().mean()) == pytest.approx(shares[-1], abs=0.04)  # the last steps


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 80_000])
def test_a_curve_has_the_first_and_the_last_step_and_a_few_dozen(steps: int) -> None:
    found = published.moments(steps)
    assert (found[0], found[-1]) == (1, steps)
    assert len(found) <= 40
    assert found == sorted(set(found))
    assert all(after <= before + 1 or after <= 1.5 * before for before, after in pairwise(found))


def test_a_run_repeats_bit_for_bit_and_leaves_the_generator_alone(
    loaded: BaseModel, records: list[EncodedRecord]
) -> None:
    state = torch.get_rng_state()
    first, second = (train(loaded, records, "memft-ot") for _ in range(2))
    assert torch.equal(first.unit.A, second.unit.A)
    assert first.curve == second.curve
    assert torch.equal(torch.get_rng_state(), state)
    other = train_published(loaded, records, "memft-ot", 16, SHORT, seed=4)
    assert not torch.equal(first.unit.B, other.unit.B)


def test_one_long_record_is_trained_with_the_sliding_window(loaded: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = encode(loaded, {"text": "31415926535897932384626433832795028841971693993751058209749445923078"})
    states: list[SlidingState] = []

    def watched(losses, mask, correct, state):
        weights, after = memft_sw(losses, mask, correct, state)
        states.append(after)
        return weights, after

    monkeypatch.setattr(published, "memft_sw", watched)
    trained = train_published(loaded, [record], "memft-sw", 16, Schedule(1e-2, 120, 1), seed=0, unit="down_proj")
    assert len(states) == trained.steps == 120
    assert max(float(state.expansion) for state in states) > 1  # an anchor that stayed
    assert int(states[-1].anchor) > int(states[0].anchor) or int(states[-1].anchor) == -1
    assert trained.curve[-1][1] > trained.curve[0][1]


@pytest.mark.parametrize(
    ("method", "schedule", "message"),
    [
        ("lora", SHORT, "method must be one of"),
        ("sft", CURRICULUM, "curriculum belongs to memft-sw"),
        ("memft-sw", SHORT, "sliding window is for one long record, not for 10"),
        ("sft", replace(SHORT, batch_records=4), "do not divide"),
    ],
)
def test_contradictions_are_refused(
    loaded: BaseModel, records: list[EncodedRecord], method: str, schedule: Schedule, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_published(loaded, records, method, 4, schedule, seed=0)


def test_a_layer_or_unit_that_does_not_exist_is_refused(loaded: BaseModel, records: list[EncodedRecord]) -> None:
    with pytest.raises(InputError, match="layers are 0 to 2, not 3"):
        train_published(loaded, records, "sft", 4, SHORT, seed=0, layer=3)
    with pytest.raises(ValueError, match='kind must be "branch" or "down_proj"'):
        train_published(loaded, records, "sft", 4, SHORT, seed=0, unit="attention")
