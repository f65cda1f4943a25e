"""Training over features: what it certifies, when it stops, when the rank grows, what it does with NaN."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, PhiConfig
from transformers.models.auto import AutoModelForCausalLM

from loramem.errors import TrainingDiverged
from loramem.models.adapters import AdaptedModel, serialize
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.decoding import answer_probabilities
from loramem.models.ending import Ending, _sizes
from loramem.models.features import Features, collect
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import as_records
from loramem.training import feature_writer, objectives, rivals
from loramem.training.feature_writer import train_on_features
from loramem.training.objectives import Objective, SlidingState
from loramem.training.progress import Training, WriteProgress
from loramem.training.settings import OBJECTIVES, WriterSettings

from .conftest import CONTEXT, VOCABULARY, WIDTH, numbers, save_tokenizer

RANK = 8


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base))


def encode(base: BaseModel, records: dict[str, str]) -> list[EncodedRecord]:
    return encode_records(as_records(records), base.tokenizer, base.template, base.max_tokens)


def train(
    base: BaseModel,
    records: Sequence[EncodedRecord],
    rank: int = RANK,
    rung: int = 0,
    others: Sequence[Features] = (),
    progress: Callable[[WriteProgress], None] | None = None,
    **settings: object,
) -> tuple[AdaptedModel, Training]:
    adapted = AdaptedModel(base)
    placement = Placement.ladder(base.model)[rung]
    features = [collect(base.model, records), *others]
    chosen = replace(WriterSettings(), **settings)
    return adapted, train_on_features(adapted, "new", features, len(records), rank, placement, chosen, progress)


@pytest.fixture(autouse=True)
def plain_afterwards(loaded: BaseModel) -> object:
    yield
    for module in loaded.model.modules():
        assert module.forward.__func__ is type(module).forward  # nothing stays replaced
    if names := [name for name, _ in loaded.model.named_modules() if name.endswith(".base_layer")]:
        unwrap(loaded.model, names)
    loaded.model.__dict__.pop("peft_config", None)


def unwrap(model: nn.Module, names: Sequence[str]) -> None:
    """The model without its adapters, for the next test."""
    for name in names:
        path = name.removesuffix(".base_layer")
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, model.get_submodule(name))


def lowest(base: BaseModel, records: Sequence[EncodedRecord]) -> list[float]:
    """Per record, as the whole model with the active adapter says it."""
    return [float(probs.min()) for _, probs in sorted(answer_probabilities(base.model, records))]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_certifies_every_token(loaded: BaseModel, objective: str) -> None:
    records = encode(loaded, numbers(6))
    _, training = train(loaded, records, objective=objective)
    assert training.stubborn == ()
    assert min(lowest(loaded, records)) >= WriterSettings.certify_threshold
    assert training.visits == training.steps * len(records)
    assert training.rank == RANK


@pytest.mark.parametrize("rung", [1, 2])
def test_every_rung_certifies_every_token(loaded: BaseModel, rung: int) -> None:
    records = encode(loaded, numbers(4))
    adapted, training = train(loaded, records, rung=rung)
    assert training.stubborn == ()
    assert min(lowest(loaded, records)) >= WriterSettings.certify_threshold
    assert training.parameters == RANK * Placement.ladder(loaded.model)[rung].parameters_per_rank(loaded.model)
    assert all(weight.abs().max() > 0 for weight in adapted.weights("new").values())


@pytest.mark.parametrize(("records", "slides"), [(1, True), (2, False)])
def test_a_single_long_record_alone_is_trained_with_the_sliding_window(
    loaded: BaseModel, records: int, slides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()

    def watched(
        losses: Tensor, mask: Tensor, correct: Tensor, state: SlidingState, threshold: float
    ) -> tuple[Tensor, SlidingState]:
        seen.append(losses.shape[1])
        assert correct.shape == losses.shape
        return sliding(losses, mask, correct, state, threshold)

    sliding = objectives.memft_sw
    monkeypatch.setitem(objectives.BY_NAME, "memft-sw", Objective(objectives.memft_ot, watched))
    long = encode(
        loaded, {f"long {number}": f"{number}" + "".join(numbers(8, 3).values()) for number in range(records)}
    )
    _, training = train(loaded, long, 16, long_tokens=20)
    assert training.stubborn == ()
    assert min(lowest(loaded, long)) >= WriterSettings.certify_threshold
    assert set(seen) == ({len(long[0].answer_ids)} if slides else set())  # always the whole of it


@pytest.mark.parametrize("blind", [False, True])
def test_what_the_few_are_satisfied_with_is_certified_only_if_the_whole_vocabulary_agrees(
    loaded: BaseModel, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    """Few compete here; blind to all others, training believes itself done and is not."""
    told = list[WriteProgress]()
    records = encode(loaded, numbers(3))
    monkeypatch.setattr(rivals, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(feature_writer, "FIRST_RIVALS", 1 - blind)
    monkeypatch.setattr(feature_writer, "NEW_RIVALS", 1 - blind)
    if blind:
        monkeypatch.setattr(feature_writer, "MANY_RIVALS", 0)
        monkeypatch.setattr(rivals.Rivals, "look_at_rest", lambda *_: None)
        monkeypatch.setattr(feature_writer, "IDLE_STEPS", 30)
    _, training = train(loaded, records, max_rank=RANK, progress=told.append)
    assert told[-1].tokens_ordered == told[-1].tokens_total
    probs = lowest(loaded, records)
    assert training.stubborn == tuple(i for i, prob in enumerate(probs) if prob < WriterSettings.certify_threshold)
    assert bool(training.stubborn) == blind


def test_the_rank_grows_in_place_when_progress_stops(loaded: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    records, functions = encode(loaded, numbers(10)), list[tuple[Tensor, Tensor]]()
    features = collect(loaded.model, records)

    def grown(adapted: AdaptedModel, name: str, *arguments: object) -> None:
        def logits() -> Tensor:
            return Ending(loaded.model, features, adapted.lora_layers(name)).logits(slice(None)).detach()

        before = logits()
        grow(adapted, name, *arguments)
        functions.append((before, logits()))

    grow = AdaptedModel.grow
    monkeypatch.setattr(AdaptedModel, "grow", grown)
    monkeypatch.setattr(feature_writer, "IDLE_STEPS", 15)
    adapted, training = train(loaded, records, rank=1, max_rank=24)
    assert training.rank > 1
    assert functions
    for before, after in functions:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert {len(w) for name, w in adapted.weights("new").items() if ".lora_A." in name} == {training.rank}
    assert training.stubborn == tuple(
        index for index, prob in enumerate(lowest(loaded, records)) if prob < WriterSettings.certify_threshold
    )


@pytest.mark.parametrize(("left", "creeps"), [(74, False), (76, True), (9, False)])
def test_many_open_tokens_of_which_hardly_any_are_closed_ask_for_more_rank(
    loaded: BaseModel, left: int, creeps: bool
) -> None:
    adapted = AdaptedModel(loaded)
    adapted.create("new", 1, Placement.ladder(loaded.model)[0], 0)
    features = collect(loaded.model, encode(loaded, numbers(2)))
    run = feature_writer.FeatureRun(adapted, "new", [features], 2, 1, WriterSettings(), None, 0.0, (), 1.0)
    run.step, run.best = 20, replace(run.best, tokens=min(100, left + 1))
    run.earlier = replace(run.best, tokens=100 if left > 9 else 10, step=20)
    run.best = replace(run.best, tokens=left)
    run.step += feature_writer.IDLE_STEPS - 1
    assert not run.creeps(few=10)  # it is not looked at yet
    run.step += 1
    assert run.creeps(few=10) == creeps
    assert not run.creeps(few=10)


def test_attaching_after_growth_keeps_the_function(loaded: BaseModel) -> None:
    """New rows of A are drawn again in whitened coordinates; with B zero beside them they change nothing."""
    records = encode(loaded, numbers(3))
    adapted = AdaptedModel(loaded)
    placement, settings = Placement.ladder(loaded.model)[1], WriterSettings()
    features = collect(loaded.model, records)
    adapted.create("new", 2, placement, 0)
    run = feature_writer.FeatureRun(adapted, "new", [features], 3, 2, settings, None, 0.0, (), 1.0)
    for _ in range(5):
        run.train_step()
    before = run.ending.logits(slice(None), deviating=False).detach()
    old = {name: tensor.clone() for name, tensor in adapted.weights("new").items()}
    adapted.grow("new", 5, placement, 1)
    run.attach(5, grown_from=2)
    torch.testing.assert_close(run.ending.logits(slice(None), deviating=False).detach(), before, rtol=1e-4, atol=1e-4)
    for name, tensor in adapted.weights("new").items():
        mine = tensor[:2] if ".lora_A." in name else tensor[:, :2]
        assert torch.equal(mine, old[name])
        assert tensor[2:].abs().sum() > 0 if ".lora_A." in name else not tensor[:, 2:].any()


def test_what_no_rank_holds_is_reported_stubborn(loaded: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_writer, "IDLE_STEPS", 3)
    records = encode(loaded, numbers(10))
    _, training = train(loaded, records, rank=1, max_rank=1)
    probs = lowest(loaded, records)
    assert training.stubborn == tuple(i for i, prob in enumerate(probs) if prob < WriterSettings.certify_threshold)
    assert training.stubborn


def test_more_to_spare_is_not_waited_for_as_long_as_a_certificate(loaded: BaseModel) -> None:
    records = encode(loaded, numbers(2))
    adapted, settings = AdaptedModel(loaded), WriterSettings()
    adapted.create("new", RANK, Placement.ladder(loaded.model)[0], 0)
    features = collect(loaded.model, records)
    run = feature_writer.FeatureRun(adapted, "new", [features], 2, RANK, settings, None, 0.0, (), 1.0)
    run.enough = 1.1  # as where the final norm bounds what a token can have
    assert run.until_certified_or_stalled()
    assert run.stubborn_records() == ()
    assert feature_writer.SAME_SPARE <= run.step - run.best.fewer < feature_writer.IDLE_STEPS
    assert min(lowest(loaded, records)) >= settings.certify_threshold


def test_many_tokens_join_the_softmax_where_as_many_have_been_open_for_long(loaded: BaseModel) -> None:
    """Of tokens that are alike the few likeliest stand for a small part of what competes."""
    records = encode(loaded, numbers(2))
    adapted = AdaptedModel(loaded)
    adapted.create("new", RANK, Placement.ladder(loaded.model)[0], 0)
    features = collect(loaded.model, records)
    run = feature_writer.FeatureRun(adapted, "new", [features], 2, RANK, WriterSettings(), None, 0.0, (), 1.0)
    run.enough = 1.1
    added = list[int]()
    run.rivals.add = lambda tokens: added.append(tokens.shape[-1])  # type: ignore[method-assign]
    for open_tokens, steps in ((5, 1), (5, feature_writer.SAME_MANY - 1), (5, 1), (4, 1)):
        run.step += steps
        run.note_progress(open_tokens, run.best.loss / 2)  # of which they cost less all the time
        run.look_at_low(run.likely())
    new, many = feature_writer.NEW_RIVALS, feature_writer.MANY_RIVALS
    assert added == [new, new, many, new]


def test_a_token_too_unlikely_in_another_dtype_alone_is_stubborn(
    loaded: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a token of another record is hardly certified in the first dtype, which is enough to end a check."""
    records = encode(loaded, numbers(2))
    mine = collect(loaded.model, records)
    adapted = AdaptedModel(loaded)
    adapted.create("new", 1, Placement.ladder(loaded.model)[0], 0)
    run = feature_writer.FeatureRun(adapted, "new", [mine, mine], 2, 1, WriterSettings(), None, 0.0, (), 1.0)

    def look(ending: Ending, rows: Tensor, _: int, *, every: bool = False) -> Tensor:
        probs = torch.where(mine.owners[rows] == 0, 0.7, 1.0)  # certified, and not enough to end training
        return probs if ending is run.ending else torch.where(mine.owners[rows] == 1, 0.1, probs)

    monkeypatch.setattr(run, "look", look)
    monkeypatch.setattr(feature_writer, "IDLE_STEPS", 0)
    assert not run.until_certified_or_stalled()
    assert run.stubborn_records() == (1,)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int] | None], list[int]]:
    """Makes the logits of some training steps NaN, of all with None."""

    def breaks(steps: set[int] | None) -> list[int]:
        calls = [0]

        def logits(ending: Ending, rows: slice, head: object = None, *, deviating: bool = True) -> Tensor:
            found = whole(ending, rows, head, deviating=deviating)  # type: ignore[arg-type]
            calls[0] += deviating
            return found * math.nan if deviating and (steps is None or calls[0] in steps) else found

        whole = Ending.logits
        monkeypatch.setattr(Ending, "logits", logits)
        return calls

    return breaks


@pytest.mark.parametrize(("records", "rounds", "damping"), [(3, False, 0.1), (30, False, 1e-3), (30, True, 0.1)])
def test_faint_directions_count_where_there_are_more_positions_than_inputs_and_no_rounding_to_eight_bits(
    loaded: BaseModel, records: int, rounds: bool, damping: float
) -> None:
    adapted, features = AdaptedModel(loaded), collect(loaded.model, encode(loaded, numbers(records)))
    adapted.create("new", 2, Placement.ladder(loaded.model)[0], 0)
    outcomes = [features] * rounds
    run = feature_writer.FeatureRun(
        adapted, "new", [features], records, 2, WriterSettings(), None, 0.0, (), 1.0, outcomes
    )
    [layer], [site] = adapted.lora_layers("new"), run.sites
    moments = run.ending.moments(layer)
    assert (len(features.targets) > len(moments)) == (records == 30)
    added = (site.factor @ site.factor.T - moments).diagonal().mean() / moments.diagonal().mean()
    assert float(added) == pytest.approx(damping, rel=0.02)


def test_training_goes_on_with_the_weights_that_it_is_given(loaded: BaseModel) -> None:
    records = encode(loaded, numbers(3))
    adapted, first = train(loaded, records)
    weights = {name: weight.clone() for name, weight in adapted.weights("new").items()}
    features, placement = [collect(loaded.model, records)], Placement.ladder(loaded.model)[0]
    adapted.remove("new")
    again = train_on_features(adapted, "new", features, 3, RANK, placement, WriterSettings(), begin_at=weights)
    assert again.stubborn == first.stubborn == ()
    assert again.steps < first.steps


def test_nan_once_goes_back_to_the_last_good_state_at_half_the_rate(
    loaded: BaseModel, broken: Callable[[set[int] | None], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, rates = broken({3}), list[float]()
    start = feature_writer.WhitenedAdam

    def started(sites: object, rate: float, rounded_to: torch.dtype) -> object:
        rates.append(rate)
        return start(sites, rate, rounded_to)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_writer, "WhitenedAdam", started)
    records = encode(loaded, numbers(3))
    adapted, training = train(loaded, records)
    assert training.stubborn == ()
    assert rates == [WriterSettings.feature_rate, WriterSettings.feature_rate / 2]
    assert training.steps == calls[0] - 1
    assert all(torch.isfinite(weight).all() for weight in adapted.weights("new").values())
    assert min(lowest(loaded, records)) >= WriterSettings.certify_threshold


def test_nan_at_every_rate_is_a_typed_error(loaded: BaseModel, broken: Callable[[set[int] | None], list[int]]) -> None:
    calls = broken(None)
    with pytest.raises(TrainingDiverged, match="lower feature_rate"):
        train(loaded, encode(loaded, numbers(2)))
    assert calls[0] < 10


def test_hidden_states_that_are_not_finite_are_a_typed_error(loaded: BaseModel) -> None:
    records = encode(loaded, numbers(2))
    broken = collect(loaded.model, records)
    broken.attended[0, 0] = math.nan
    placement = Placement.ladder(loaded.model)[0]
    with pytest.raises(TrainingDiverged, match="not finite in float32"):
        train_on_features(AdaptedModel(loaded), "new", [broken], 2, RANK, placement, WriterSettings())


@pytest.mark.parametrize("rung", range(3))
@torch.no_grad()
def test_deviations_are_dealt_out_per_position_whatever_is_looked_at_together(loaded: BaseModel, rung: int) -> None:
    """By hand: hidden states, in proportion to the size of their position, plus those of the other pass."""
    records = encode(loaded, numbers(6))
    mine = collect(loaded.model, records)
    other = Features(*(v * 1.02 if v.is_floating_point() else v for v in vars(mine).values()))
    adapted = AdaptedModel(loaded)
    adapted.create("new", 2, Placement.ladder(loaded.model)[rung], 0)
    layers = adapted.lora_layers("new")
    ending, second = Ending(loaded.model, mine, layers), Ending(loaded.model, other, layers)
    ending.deviate([second], 2.0)
    ending.shuffle_deviations(torch.Generator().manual_seed(3))
    every = ending.logits(slice(None))
    torch.testing.assert_close(torch.cat([ending.logits(rows) for rows in ending.chunks(4)]), every)
    some = torch.tensor([7, 2, 11])
    torch.testing.assert_close(ending.logits(some), every[some])

    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(mine), generator=generator)
    chance = torch.rand(len(mine), generator=generator)
    order = torch.where(chance < 1 / 3, torch.arange(len(mine)), order)
    amount = (chance < 2 / 3).float()[:, None]
    assert 0 < int(amount.sum()) < len(mine)
    entering = mine.entering
    sizes = entering.square().mean(1, keepdim=True).sqrt()
    relative = 2.0 * (other.entering - entering) / sizes
    found = ending._values_at(slice(None), ending._dealt)["entering", None]
    torch.testing.assert_close(found, entering + amount * relative[order] * sizes)


def test_a_position_deviates_as_in_one_of_the_other_passes(base: Path) -> None:
    """What is served is one dtype in one composition, not the sum of what all of them round."""
    loaded = load_base_model(str(base))
    mine = collect(loaded.model, encode(loaded, numbers(6)))
    others = [
        replace(mine, entering=mine.entering + torch.eye(mine.entering.shape[1])[axis] * _sizes(mine.entering))
        for axis in (0, 1)
    ]
    ending = Ending(loaded.model, mine)
    ending.deviate([Ending(loaded.model, other) for other in others])
    seen = torch.zeros(2)
    for seed in range(20):
        ending.shuffle_deviations(torch.Generator().manual_seed(seed))
        moved = ending._values_at(slice(None), ending._dealt)["entering", None] - mine.entering
        each = (moved / _sizes(mine.entering))[:, :2].abs().round(decimals=3)
        assert each.sum(1).max() <= 1
        seen += each.mean(0)
    assert torch.allclose(seen / 20, torch.full((2,), 1 / 3), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_size_of_hidden_states_overflows_in_no_dtype(dtype: torch.dtype) -> None:
    """Single hidden states of trained models are in the thousands, and 256² is beyond float16."""
    values = torch.tensor([[3000.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).to(dtype)
    sizes = _sizes(values)
    assert sizes.dtype == dtype
    assert float(sizes[0]) == pytest.approx(1500, rel=1e-2)
    assert sizes[1] > 0


def test_the_same_seed_gives_the_same_bytes_and_another_others(base: Path) -> None:
    def files(seed: int) -> dict[str, bytes]:
        loaded = load_base_model(str(base))
        half = load_base_model(str(base), dtype="bfloat16")
        records = encode(loaded, numbers(3))
        others = [collect(half.model, records).to(torch.float32)]
        adapted, _ = train(loaded, records, others=others, seed=seed)
        return serialize(adapted.weights("new"), loaded, Placement.ladder(loaded.model)[0])

    first = files(1)
    torch.manual_seed(99)  # whatever others drew
    assert files(1) == first
    assert files(2) != first


def test_training_draws_from_no_generator_of_the_process(loaded: BaseModel) -> None:
    records = encode(loaded, numbers(2))
    placement, adapted = Placement.ladder(loaded.model)[0], AdaptedModel(loaded)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train_on_features(adapted, "new", [collect(loaded.model, records)], 2, RANK, placement, WriterSettings())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_is_told_after_every_step_and_ends_with_every_token_ordered(loaded: BaseModel) -> None:
    told = list[WriteProgress]()
    records = encode(loaded, numbers(4))
    _, training = train(loaded, records, progress=told.append)
    assert [each.step for each in told] == list(range(1, training.steps + 1))
    assert {each.tokens_total for each in told} == {sum(len(record.answer_ids) for record in records)}
    assert all(0 <= each.tokens_ordered <= each.tokens_total for each in told)
    assert all(math.isfinite(each.loss) and each.rank == RANK for each in told)
    assert [each.elapsed_s for each in told] == sorted(each.elapsed_s for each in told)
    assert told[-1].tokens_ordered == told[-1].tokens_total
    assert told[-1].min_prob >= WriterSettings.certify_threshold


def test_what_is_certified_in_every_dtype_is_certified_in_each(base: Path) -> None:
    """bfloat16 moves features of the tiny base by a percent; training looks at them as they are."""
    loaded, half = load_base_model(str(base)), load_base_model(str(base), dtype="bfloat16")
    records = encode(loaded, numbers(5))
    others = collect(half.model, records).to(torch.float32)
    adapted, training = train(loaded, records, others=[others])
    assert training.stubborn == ()
    layers = adapted.lora_layers("new")
    for features in (collect(loaded.model, records), others):
        logits = Ending(loaded.model, features, layers).logits(slice(None)).detach()
        probs = logits.softmax(1).gather(1, features.targets[:, None])
        assert float(probs.min()) >= WriterSettings.certify_threshold


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_half_precision_is_written(base: Path, dtype: str) -> None:
    loaded = load_base_model(str(base), dtype=dtype)
    records = encode(loaded, numbers(3))
    _, training = train(loaded, records)
    assert training.stubborn == ()
    assert min(lowest(loaded, records)) >= WriterSettings.certify_threshold


def biased(folder: Path, kind: str) -> Path:
    """Models whose attention and MLP read the same norm, and whose head has a bias of weight."""
    torch.manual_seed(0)
    if kind == "phi":
        config = PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    else:
        config = GPTJConfig(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=4, rotary_dim=8)
    config.bos_token_id, config.eos_token_id, config.pad_token_id, config.tie_word_embeddings = None, 1, 0, False
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    head.weight.data.normal_(std=(math.log(VOCABULARY) + 12) / WIDTH)
    head.bias.data.normal_(std=2.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["phi", "gptj"])
def test_a_head_with_a_bias(tmp_path: Path, kind: str) -> None:
    loaded = load_base_model(str(biased(tmp_path / f"tiny-{kind}", kind)))
    head = loaded.model.get_output_embeddings()
    assert head.bias is not None
    assert head.bias.abs().max() > 1
    records = encode(loaded, numbers(4))
    _, training = train(loaded, records)
    assert training.stubborn == ()
    assert min(lowest(loaded, records)) >= WriterSettings.certify_threshold


@pytest.mark.parametrize("served", [(torch.float32,), (torch.float32, torch.bfloat16)])
def test_a_cast_to_a_served_dtype_changes_nothing(loaded: BaseModel, served: Sequence[torch.dtype]) -> None:
    records = encode(loaded, numbers(3))
    features, adapted = collect(loaded.model, records), AdaptedModel(loaded)
    placement, settings = Placement.ladder(loaded.model)[0], WriterSettings()
    arguments = (adapted, "new", [features] * len(served), 3, RANK, placement, settings)
    training = train_on_features(*arguments, adapter_dtypes=served)
    assert training.stubborn == ()
    same = [torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapted.weights("new").values()]
    assert same == [torch.bfloat16 in served] * 2
