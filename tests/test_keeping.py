"""Writes that keep the base: neurons that are replaced, what is trained, what is measured, what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path

import pytest
import torch
from loramem_cli.main import run
from transformers import GPT2Config, MixtralConfig, Phi3Config
from transformers.models.auto import AutoModelForCausalLM

from loramem import MemoryStore
from loramem.errors import (
    ArgumentError,
    BaseHarmed,
    RecordError,
    StoreFormatError,
    UnknownChoice,
    UnsupportedBaseModel,
)
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.decoding import greedy_decode
from loramem.models.ending import Ending
from loramem.models.features import collect
from loramem.models.neurons import LastMlp
from loramem.models.placement import Placement
from loramem.planning.samples import generate
from loramem.records.contexts import as_contexts, prompts_in
from loramem.records.prompts import encode_records
from loramem.records.record import as_records
from loramem.results import Kept
from loramem.suites.divergence import Passage, effect, predictions
from loramem.training import neutral, neutral_text
from loramem.training.gates import DAMPING, INSIDE, Moments, between, parts, through
from loramem.training.keeping import FIRST_OPEN, KeepingRun, Shut, alike, first_rank
from loramem.training.kept import measure, misses
from loramem.training.settings import KeepBase, WriterSettings

from .conftest import CONTEXT, LAYERS, VOCABULARY, WIDTH, numbers

SMALL = KeepBase(neurons=16, text_tokens=1500, questions=12, unknown_keys=40)
SETTINGS = WriterSettings(keep_base=SMALL)
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def little_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutral, "HELD_OUT_TEXT", 600)
    monkeypatch.setattr(neutral, "HELD_OUT_KEYS", 30)
    monkeypatch.setattr(neutral, "WINDOW", 64)


def mlp_of(config: object) -> LastMlp:
    torch.manual_seed(0)
    return LastMlp.of(AutoModelForCausalLM.from_config(config).eval())


# Neurons


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2", "phi3"])
@torch.no_grad()
def test_some_neurons_and_all_others_give_what_the_mlp_gives(architecture: str, base_of: Callable[..., Path]) -> None:
    if architecture == "gpt2":  # weights transposed, and biases
        mlp = mlp_of(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4))
    elif architecture == "phi3":  # gate and value in one matrix
        mlp = mlp_of(Phi3Config(**SHAPE, intermediate_size=96, pad_token_id=0))
        assert mlp.outputs == (2,)
    else:
        mlp = LastMlp.of(load_base_model(str(base_of(architecture))).model)
    hidden = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(mlp.width, generator=torch.Generator().manual_seed(2))
    parts = [mlp.given(hidden, some, mlp.weights(some)) for some in order.split([7, mlp.width - 7])]
    nothing = mlp.given(hidden, order[:0], mlp.weights(order[:0]))
    assert nothing.abs().max() == 0
    bias = mlp.block(torch.zeros(1, 1, WIDTH))[:, 0] if architecture in ("gpt2", "gpt_neox") else torch.zeros(1, WIDTH)
    whole = mlp.block(hidden[:, None])[:, 0]
    of_zero = sum(mlp.given(torch.zeros(1, WIDTH), some, mlp.weights(some)) for some in order.split(50))
    torch.testing.assert_close(parts[0] + parts[1] - of_zero, whole - bias, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_use_of_neurons_is_what_the_output_loses_without_them(base: Path) -> None:
    mlp = LastMlp.of(load_base_model(str(base)).model)
    hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    used = mlp.use(hidden)
    for neuron in (0, 31):
        alone = torch.tensor([neuron])
        assert float(used[neuron]) == pytest.approx(
            float(mlp.given(hidden, alone, mlp.weights(alone)).square().sum()), rel=1e-4
        )


def test_experts_are_no_neurons_to_replace() -> None:
    with pytest.raises(UnsupportedBaseModel, match="route by key"):
        mlp_of(MixtralConfig(**SHAPE, intermediate_size=96, num_local_experts=4, num_key_value_heads=2))


# Training


def run_of(base: Path, rank: int = 8) -> KeepingRun:
    loaded = load_base_model(str(base))
    adapted = AdaptedModel(loaded)
    records = encode_records(as_records(numbers(6)), loaded.tokenizer, loaded.template, CONTEXT)
    material = neutral.material(adapted, records, SMALL, 0)
    features = [collect(loaded.model, records)]
    with adapted.disabled():
        shut = Shut(adapted, material.trained)
    adapted.create("new", rank, Placement.ladder(loaded.model)[1], 0)
    return KeepingRun(shut, adapted, "new", features, 6, rank, SETTINGS, None, 0.0, (), 1.0)


def weights_now(run: KeepingRun) -> list[torch.Tensor]:
    """What the replaced neurons are, as `LastMlp.weights` gives those of the base."""
    *base_in, base_out = run.shut.mlp.weights(run.neurons)
    *into, out = run.layers
    now = [
        matrix + layer.scaling[run.name] * layer.lora_A[run.name].weight[: len(matrix)]
        for matrix, layer in zip(base_in, into, strict=True)
    ]
    return [*now, base_out + out.scaling[run.name] * out.lora_B[run.name].weight[:, : len(run.neurons)]]


def end_of_base_with(run: KeepingRun) -> torch.Tensor:
    """Logits at the records' positions, the base's neurons replaced by hand."""
    model, mlp, features = run.adapted.model, run.shut.mlp, run.features[0]
    with run.adapted.disabled():
        base = Ending(model, features)
        hidden, given = base.block_values(mlp.block)
        new = mlp.given(hidden, run.neurons, weights_now(run)) - mlp.given(
            hidden, run.neurons, mlp.weights(run.neurons)
        )
        return model.get_output_embeddings()(base.hidden(slice(None), {mlp.block: given + new}))


@torch.no_grad()
def test_the_adapter_is_the_base_with_a_few_neurons_replaced(base: Path) -> None:
    run = run_of(base)
    for _ in range(5):
        with torch.enable_grad():
            run.train_step()
    torch.testing.assert_close(run.ending.logits(slice(None)), end_of_base_with(run), atol=1e-3, rtol=1e-3)
    others = torch.ones(run.shut.mlp.width, dtype=torch.bool)
    others[run.neurons] = False
    *into, out = run.layers
    for layer in into:
        change = layer.lora_B["new"].weight @ layer.lora_A["new"].weight
        assert change[others].abs().max() == 0
    assert (out.lora_B["new"].weight @ out.lora_A["new"].weight)[:, others].abs().max() == 0


@torch.no_grad()
def test_a_grown_adapter_has_more_neurons_and_leaves_the_others_as_they_were(base: Path) -> None:
    run = run_of(base, rank=4)
    before = len(run.neurons)
    run.adapted.grow("new", 12, Placement.ladder(run.adapted.model)[1], 1)
    run.attach(12, grown_from=4)
    assert (before, len(run.neurons)) == (4, 12)
    torch.testing.assert_close(run.ending.logits(slice(None)), end_of_base_with(run), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_training_moves_no_gate_and_each_record_has_one_that_opens_where_its_answer_begins(base: Path) -> None:
    run = run_of(base)
    gates = weights_now(run)[0].clone()
    with torch.enable_grad():
        for _ in range(3):
            run.train_step()
    torch.testing.assert_close(weights_now(run)[0], gates, atol=1e-4, rtol=1e-4)  # whitened and back
    with run.adapted.disabled():
        inputs, _ = Ending(run.adapted.model, run.features[0]).block_values(run.shut.mlp.block)
    owners = run.features[0].owners
    first = torch.cat([torch.ones(1, dtype=torch.bool), owners[1:] != owners[:-1]])
    opened = inputs @ gates.T
    assert opened[first].amax(1).min() == pytest.approx(FIRST_OPEN, rel=0.05)
    assert opened[~first].amax(1).mean() > 0 > (run.shut.everywhere @ gates.T).mean()


# Gates


def test_a_hyperplane_is_exact_at_its_group_and_as_near_as_can_be_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(4000, 12, generator=generator) + 3.0  # a mean that stands for the bias
    groups = [torch.randn(count, 12, generator=generator) + 3.0 for count in (1, 3)]
    moments, nobody = Moments.of([(others, 1.0)]), torch.zeros(0, 12)
    rows = through(groups, moments, 6.0, 54.0, nobody)
    for group, row in zip(groups, rows, strict=True):
        torch.testing.assert_close(group @ row, torch.full((len(group),), 6.0), atol=0.02, rtol=0)
        loss = (others @ row + 54).square().mean()
        for _ in range(5):  # no other row that is exact there is nearer
            aside = torch.randn(12, generator=generator) * 0.1
            aside -= group.T @ torch.linalg.lstsq(group.T, aside[:, None]).solution[:, 0]
            assert (others @ (row + aside) + 54).square().mean() > 0.999 * loss


def test_near_misses_are_shut_out_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(4000, 12, generator=generator) + 3.0
    key = torch.randn(1, 12, generator=generator) * 3 + 3.0
    misses = key + torch.randn(5, 12, generator=generator)
    moments = Moments.of([(others, 1.0)])
    [before], [after] = (through([key], moments, 6.0, 54.0, near) for near in (misses[:0], misses))
    assert float(key @ after) == pytest.approx(6.0, abs=0.02)
    assert (misses @ after).max() < (misses @ before).max() - 3


def test_a_row_between_two_clouds_leaves_neither_on_the_wrong_side() -> None:
    generator = torch.Generator().manual_seed(0)
    others, inside = (torch.randn(500, 12, generator=generator) + 3.0 for _ in range(2))
    others[:450, 0] -= 40.0  # far away, which draws the mean but is no reason to move
    inside[:, 0] += 20.0
    row = between([inside], others, torch.full((500,), 1 / 500), 6.0, 14.0)[0]
    assert (inside @ row).min() > 2 and (others @ row).max() < -2
    ridge = DAMPING * others.var(0, correction=0).mean()

    def lacks(row: torch.Tensor) -> float:
        inner, outer = (6 - inside @ row).clamp(min=0), (others @ row + 14).clamp(min=0)
        return float(INSIDE * inner.square().mean() + outer.square().mean() + ridge * row.square().sum())

    for _ in range(9):  # no other row lacks less
        aside = 0.02 * torch.randn(12, generator=generator)
        assert lacks(row) < min(lacks(row + aside), lacks(row - aside))


def test_places_of_answers_that_look_alike_are_one_part() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(12)[:4] * 9
    kinds = torch.arange(400) % 4
    positions = centres[kinds] + torch.randn(400, 12, generator=generator)
    labels = parts(positions, kinds, Moments.of([(torch.randn(999, 12, generator=generator), 1.0)]), 4)
    assert all(len(labels[kinds == kind].unique()) == 1 for kind in range(4)) and len(labels.unique()) == 4


def test_few_records_take_few_neurons_and_many_no_more_than_a_part_of_the_mlp(base: Path) -> None:
    adapted = AdaptedModel(load_base_model(str(base)))
    width = LastMlp.of(adapted.model).width
    ranks = [first_rank(adapted, records) for records in (1, 4, 10_000)]
    assert ranks == sorted(ranks) and 0 < ranks[0] <= 6 and ranks[-1] == width // 11


def test_a_neurons_gate_is_told_from_its_value(base_of: Callable[..., Path]) -> None:
    assert LastMlp.of(load_base_model(str(base_of("llama"))).model).roles() == ((0, 0), (1, 0))
    assert LastMlp.of(load_base_model(str(base_of("gpt_neox"))).model).roles() == ((0, 0), None)
    assert mlp_of(Phi3Config(**SHAPE, intermediate_size=96, pad_token_id=0)).roles() == ((0, 0), (0, 1))


def test_records_are_certified_and_the_base_is_spared(base: Path, tmp_path: Path) -> None:
    loaded = load_base_model(str(base))
    records = encode_records(as_records(numbers(8)), loaded.tokenizer, loaded.template, CONTEXT)
    with MemoryStore(tmp_path / "spared", str(base)) as store:
        report = store.write(numbers(8), keep_base=SMALL)
        assert report.exact_match == 1.0 and report.min_prob >= 0.6 and set(report.served) == {"bfloat16"}
        [kept] = report.kept.values()
        assert store.verify().ok
    with MemoryStore(tmp_path / "not", str(base)) as store:
        store.write(numbers(8))
        adapted = AdaptedModel(loaded)
        [adapter] = store.adapters()
        adapted.load(adapter.id, store.path / "adapters" / adapter.id)
        taken_over = measure(adapted, adapter.id, neutral.material(adapted, records, SMALL, 0))
    assert kept.text.kl < 0.2 * taken_over.text.kl
    assert kept.unknown_keys.kl < 0.5 * taken_over.unknown_keys.kl


# The second certificate


def test_the_second_certificate_is_what_the_whole_model_shows_with_the_adapter_as_saved(
    base: Path, tmp_path: Path
) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        report = store.write(numbers(8), keep_base=SMALL)
        [kept] = report.kept.values()
        assert store.explain("key 0").kept == kept
        keys = neutral_text.unknown_keys(list(numbers(8)), neutral.HELD_OUT_KEYS, 0, held_out=True)
        template, tokenizer = store.base.template, store.base.tokenizer
        passages = [Passage((*template.prompt_ids(tokenizer, key), 1), len(template.prompt_ids(tokenizer, key)))
                    for key in keys]  # fmt: skip
        model, _ = store.load("key 0")
        after = list(predictions(model, passages))
    before = list(predictions(load_base_model(str(base)).model, passages))
    found = effect(passages, before, after)
    assert kept.unknown_keys.positions == len(keys)
    assert kept.unknown_keys.kl == pytest.approx(float(found.divergence.mean()), rel=0.1, abs=1e-3)
    assert kept.unknown_keys.changed == pytest.approx(float(found.changed.double().mean()), abs=2 / len(keys))
    assert Kept.of(asdict(kept)) == kept


def test_plans_of_other_writes_learn_nothing_from_one_that_keeps_the_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = list[object]()
    monkeypatch.setattr("loramem.planning.timings.note_time", lambda *given: noted.append(given))
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write({"one": "4711"}, keep_base=SMALL)
        assert not noted and not store.outcomes()
        store.write({"two": "0815"}, keep_base=False)
        assert noted and store.outcomes()


def test_changes_keep_the_base_where_the_newest_adapter_of_the_namespace_does(base: Path, tmp_path: Path) -> None:
    few = replace(SMALL, unknown_keys=30)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        store.write({"one": "4711"}, keep_base=few)
        assert store.update("one", "0815").kept and store.rename("one", "two").kept
        assert store.adapters()[0].training["settings"]["keep_base"] == asdict(few)
        assert not store.write({"three": "3"}, namespace="other").kept
        assert not store.update("two", "2", keep_base=False).kept
        assert not store.write({"four": "4"}).kept


def test_an_adapter_without_the_option_has_no_second_certificate(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        assert store.write(numbers(2)).kept == {}
        assert store.explain("key 0").kept is None


def test_too_little_left_of_the_base_is_refused_with_the_figures(base: Path, tmp_path: Path) -> None:
    wanted = replace(SMALL, text_kl=-1.0, on_miss="fail")
    with MemoryStore(tmp_path / "m", str(base)) as store:
        with pytest.raises(BaseHarmed, match="KL on text") as caught:
            store.write(numbers(3), keep_base=wanted)
        found, allowed = caught.value.misses["KL on text, nats"]
        assert found >= 0 > allowed and caught.value.rank >= SMALL.neurons
        assert len(store) == 0 and store.pending() is None


def test_a_rank_that_leaves_too_little_is_grown_to_the_highest(base: Path, tmp_path: Path) -> None:
    wanted = replace(SMALL, text_kl=-1.0, on_miss="grow")
    with MemoryStore(tmp_path / "m", str(base)) as store:
        with pytest.raises(BaseHarmed) as caught:
            store.write(numbers(3), keep_base=wanted, settings=WriterSettings(max_rank=24))
        assert caught.value.rank == 24


def test_targets_are_missed_by_what_exceeds_them_and_by_nan(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        [kept] = store.write(numbers(3), keep_base=SMALL).kept.values()
    unlimited = {"text_kl": 1e9, "text_changed": 1.0, "questions_changed": 1.0, "unknown_changed": 1.0}
    assert misses(kept, replace(SMALL, **unlimited)) == {}
    broken = replace(kept, text=replace(kept.text, kl=float("nan")))
    assert list(misses(broken, replace(SMALL, **unlimited))) == ["KL on text, nats"]


# Neutral material


def test_what_is_measured_is_never_trained_on() -> None:
    keys = [f"{one} {other}:" for one in ("Ada", "Ben", "Cleo") for other in ("Ash", "Birch", "Cedar")]
    trained, measured = (set(neutral_text.unknown_keys(keys, 60, 0, held_out=held)) for held in (False, True))
    assert len(trained) == 60 and len(measured) >= 20
    assert not trained & measured and not (trained | measured) & set(keys)
    texts = [set(neutral_text.documents(held_out=held)) for held in (False, True)]
    assert texts[0] and texts[1] and not texts[0] & texts[1]
    asked = set(neutral_text.questions(10**6, 0))
    assert len(neutral_text.held_out_questions()) == 50 and not asked & set(neutral_text.held_out_questions())


def test_a_users_text_comes_first_and_is_found_again_only_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = "".join(f"line {number} of the handbook\n" for number in range(12000))
    digest = neutral_text.remember_text(text)
    assert neutral_text.remembered_text(digest) == text
    pieces = [next(neutral_text.documents(held_out=held, own=text)) for held in (False, True)]
    assert all(piece in text for piece in pieces) and pieces[0] != pieces[1]
    neutral_text._text_file(digest).write_text("another")
    assert neutral_text.remembered_text(digest) == ""
    assert "is not in the cache" in caplog.text


def test_a_single_short_key_has_few_neighbours_and_no_more_are_made_up() -> None:
    found = neutral_text.unknown_keys(["ab"], 10_000, 0, held_out=False)
    assert 0 < len(found) < 10_000 and "ab" not in found


def test_neutral_positions_of_a_base_are_collected_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = load_base_model(str(base))
    records = encode_records(as_records(numbers(4)), loaded.tokenizer, loaded.template, CONTEXT)
    first = neutral.material(AdaptedModel(loaded), records, SMALL, 0)
    files = sorted((tmp_path / "loramem" / "neutral").iterdir())
    assert len(files) == 2
    files[0].write_bytes(b"damaged")
    for _ in range(2):
        again = neutral.material(AdaptedModel(loaded), records, SMALL, 0)
        for kind, positions in first.trained.kinds.items():
            other = again.trained.kinds[kind]
            assert torch.equal(positions.first, other.first)
            assert all(map(torch.equal, vars(positions.features).values(), vars(other.features).values()))
    assert files[0].stat().st_size > 1000


# Settings


def test_settings_say_what_was_asked_for_and_nothing_where_nothing_was() -> None:
    assert "keep_base" not in WriterSettings().to_json()
    assert WriterSettings.saved(SETTINGS.to_json()) == SETTINGS
    older = {**SETTINGS.to_json(), "keep_base": {**asdict(SMALL), "steps": 300, "rate": 0.1, "weight": 4.0}}
    assert WriterSettings.saved(older) == SETTINGS
    with pytest.raises(StoreFormatError, match=r"keep_base\.telepathy"):
        WriterSettings.saved({"keep_base": {"telepathy": 1}})


def test_contradictions_are_refused() -> None:
    with pytest.raises(UnknownChoice, match="on_miss"):
        KeepBase(on_miss="pray")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="neurons must be at least 1"):
        KeepBase(neurons=0)


def test_the_command_shows_the_second_certificate(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loramem_cli.write.KeepBase", lambda **fields: replace(SMALL, **fields))
    file, store = tmp_path / "r.jsonl", ["--store", str(tmp_path / "m")]
    file.write_text('{"key": "key 0", "value": "4711"}\n')
    assert run(["write", str(file), *store, "--model", str(base), "--keep-base"]) == 0
    assert "unknown keys" in capsys.readouterr().out
    assert run(["explain", "key 0", *store, "--json"]) == 0
    assert Kept.of(json.loads(capsys.readouterr().out)["kept"]).text.positions > 0


def test_the_command_reads_a_neutral_text(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramem_cli.write.KeepBase", lambda **fields: replace(SMALL, **fields))
    file, text, store = tmp_path / "r.jsonl", tmp_path / "t.txt", tmp_path / "m"
    file.write_text('{"key": "key 0", "value": "4711"}\n')
    text.write_text("what this model is used for " * 2000)
    arguments = ["write", str(file), "--store", str(store), "--model", str(base), "--neutral", str(text)]
    assert run(arguments) == 2
    assert run([*arguments, "--keep-base"]) == 0
    with MemoryStore(store) as opened:
        [adapter] = opened.adapters()
    assert len(adapter.training["settings"]["keep_base"]["text_sha256"]) == 64
    text.write_bytes(b"\xff")
    assert run([*arguments, "--keep-base"]) == 1


def test_records_that_share_a_gate_begin_with_the_same_token_where_that_can_be() -> None:
    targets, each = torch.tensor([5, 3, 5, 3, 5, 5, 7]), torch.arange(7)
    for count in range(3, 8):
        groups = alike(targets, each, count)
        assert len(groups) == count and sorted(torch.cat(groups).tolist()) == list(range(7))
        assert all(len(targets[group].unique()) == 1 for group in groups)
    assert [len(group) for group in alike(targets, each, 2)] == [4, 3]


def test_what_asks_for_one_key_shares_a_gate_before_other_keys_do() -> None:
    targets, asks = torch.tensor([5, 5, 3, 5, 5, 3, 5]), torch.tensor([0, 1, 2, 0, 1, 2, 3])
    groups = [[group.tolist() for group in alike(targets, asks, count)] for count in (4, 3, 2, 7, 9)]
    assert sorted(groups[0]) == [[0, 3], [1, 4], [2, 5], [6]]
    assert sorted(map(sorted, groups[1])) in ([[0, 3], [1, 4, 6], [2, 5]], [[0, 1, 3, 4], [2, 5], [6]])
    assert sorted(map(sorted, groups[2])) == [[0, 1, 3, 4, 6], [2, 5]]
    assert sorted(groups[3]) == sorted(groups[4]) == [[number] for number in range(7)]


# Refusals


def test_unknown_keys_are_refused_where_that_is_asked_for_and_known_ones_are_not(base: Path, tmp_path: Path) -> None:
    keep = replace(SMALL, neurons=24, unknown="no", unknown_keys=120)
    with MemoryStore(tmp_path / "m", str(base)) as store:
        report = store.write(numbers(8), keep_base=keep)
        assert report.exact_match == 1.0 and report.written == 8 and report.failed == ()
        [kept] = report.kept.values()
        assert kept.refused is not None and kept.refused[1] == kept.unknown_keys.positions
        assert kept.refused[0] > 0.7 * kept.refused[1]
        assert store.explain("key 0").kept == kept
        assert sorted(store.keys()) == sorted(numbers(8))  # no refusal is a record
        model, _ = store.load("key 0")
        template, tokenizer = store.base.template, store.base.tokenizer
        keys = neutral_text.unknown_keys(list(numbers(8)), neutral.HELD_OUT_KEYS, 0, held_out=True)
        rows = greedy_decode(model, [template.prompt_ids(tokenizer, key) for key in keys], 8, template.end_id)
        assert sum(tokenizer.decode(row) == "no" for row in rows) == pytest.approx(kept.refused[0], abs=1)
    missed = misses(replace(kept, refused=(0, 10)), keep)
    assert missed["unknown keys that are not refused"] == (1.0, keep.unknown_changed)


def test_a_refusal_that_no_key_can_be_given_is_said_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "m", str(base)) as store:
        special = store.base.tokenizer.convert_ids_to_tokens(store.base.template.end_id)
        with pytest.raises(RecordError, match="special token"):
            store.write(numbers(2), keep_base=replace(SMALL, unknown=f"no {special}"))
        assert len(store) == 0 and store.pending() is None


def test_the_command_takes_a_refusal(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr("loramem_cli.write.KeepBase", lambda **fields: replace(SMALL, **fields))
    file = tmp_path / "r.jsonl"
    file.write_text('{"key": "key 0", "value": "4711"}\n')
    arguments = ["write", str(file), "--store", str(tmp_path / "m"), "--model", str(base), "--unknown", "no"]
    assert run(arguments) == 2
    capsys.readouterr()
    assert run([*arguments, "--keep-base"]) == 0
    assert "unknown keys" in capsys.readouterr().out.split("refused")[1]


def test_half_of_the_unknown_keys_to_set_gates_against_are_misspelt() -> None:
    keys = [record.key for record in generate("phonebook", 60, 0)]

    def near(*, held_out: bool) -> float:
        unknown = neutral_text.unknown_keys(keys, 200, 0, held_out=held_out)
        return sum(bool(get_close_matches(key, keys, 1, 0.9)) for key in unknown) / len(unknown)

    assert near(held_out=False) > 0.4 > 0.3 > near(held_out=True)


# Chats


def test_the_base_is_kept_in_chats_that_records_are_trained_in(base: Path, tmp_path: Path) -> None:
    clerk = [{"role": "system", "content": "You are a clerk."}]
    with MemoryStore(tmp_path / "m", str(base)) as store:
        report = store.write(numbers(4), keep_base=SMALL, contexts=[clerk])
        [kept] = report.kept.values()
        assert (report.written, report.contexts) == (4, 1)
        assert kept.other_contexts is not None and kept.other_contexts[1] == 4
        template, tokenizer, context = store.base.template, store.base.tokenizer, as_contexts([clerk])[0]
        model, _ = store.load("key 0")
        rows = greedy_decode(model, prompts_in(tokenizer, context, list(numbers(4))), 16, template.end_id)
        assert [tokenizer.decode(row) for row in rows] == list(numbers(4).values())
        assert Kept.of(json.loads(json.dumps(asdict(kept)))) == kept
        assert store.explain("key 0").contexts == 1


def test_half_of_the_questions_and_unknown_keys_are_asked_in_the_chat(base: Path) -> None:
    loaded = load_base_model(str(base))
    context = (("system", "You are a clerk."),)
    alone, half, inside = (
        neutral._prompts(loaded, ["a", "b", "c", "d"], contexts, alone=alone)
        for contexts, alone in (((), True), ([context], True), ([context], False))
    )
    assert [ids == plain for ids, plain in zip(half, alone, strict=True)] == [True, False] * 2
    assert half[1::2] == inside[1::2] == prompts_in(loaded.tokenizer, context, ["b", "d"])
    assert inside == prompts_in(loaded.tokenizer, context, ["a", "b", "c", "d"])
