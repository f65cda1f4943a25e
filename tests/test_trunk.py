"""The tail alone says what the full model says, on every architecture; what cannot be split is run whole."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from loramem.models import trunk as trunk_module
from loramem.models.batches import answer_logits, group_by_length, make_batch, token_losses
from loramem.models.layers import decoder_layers, linear_modules, position_wise_blocks
from loramem.models.trunk import SPLIT_TOLERANCE, Trunk, splits_exactly
from loramem.records.prompts import EncodedRecord

from .test_batches import SPREAD, encoded, full_logits

VOCABULARY, WIDTH, LAYERS = 64, 32, 3
TOLERANCE = 1e-5  # of the logits' scale; measured: below 1e-6, also against a record alone

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": SPREAD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
GEMMA = {
    **GROUPED,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
ROPES = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 100.0}}
ARCHITECTURES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 8}),
    "qwen2": (Qwen2Config, GROUPED),
    "llama": (LlamaConfig, GROUPED),
    "mistral": (MistralConfig, {**GROUPED, "sliding_window": 5}),
    "gemma2": (Gemma2Config, {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}),
    "gemma3": (Gemma3TextConfig, {**GEMMA, "rope_parameters": ROPES}),
    "phi3": (Phi3Config, {**GROUPED, "num_hidden_layers": 2}),
    "gpt_neox": (GPTNeoXConfig, SHAPE),
    "gpt2": (GPT2Config, {**GPT2, "initializer_range": SPREAD, "bos_token_id": 1, "eos_token_id": 2}),
}
SPLITS = [
    (name, layer)
    for name, (_, arguments) in ARCHITECTURES.items()
    for layer in range(1, arguments.get("num_hidden_layers", LAYERS))
]


def build(architecture: str, **other: object) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, arguments = ARCHITECTURES[architecture]
    config = kind(**copy.deepcopy({**arguments, **other}))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


shared_model = cache(build)  # for tests that leave the model as it was


def random_record(prompt_tokens: int, answer_tokens: int, seed: int) -> EncodedRecord:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (prompt_tokens + answer_tokens,), generator=generator).tolist()
    return encoded(ids[:prompt_tokens], ids[prompt_tokens:])


LENGTHS = ((7, 2), (14, 5), (3, 9), (20, 3), (9, 9), (5, 4), (14, 5))  # prompt and answer; longer than the windows
RECORDS = [random_record(*lengths, seed) for seed, lengths in enumerate(LENGTHS)]
COMPOSITIONS = ([3, 0], [6, 2, 1], [5], [1, 6], [4, 3, 2, 1, 0, 5, 6])  # cached in order of length: 0 5 2 4 1 6 3


def of_trunk(trunk: Trunk, indices: Sequence[int]) -> Tensor:
    return trunk.logits(indices, trunk.batch(indices))


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the logits' scale."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.fixture
def model() -> PreTrainedModel:
    return shared_model("qwen3")


# --- the same logits


@pytest.mark.parametrize(("architecture", "layer"), SPLITS)
@torch.no_grad()
def test_the_tail_gives_the_logits_of_the_full_model_and_of_each_record_alone(architecture: str, layer: int) -> None:
    model = shared_model(architecture)
    alone = [full_logits(model, record) for record in RECORDS]
    trunk = Trunk(model, RECORDS, layer)
    assert trunk.first_layer == layer
    for indices in COMPOSITIONS:
        tail = of_trunk(trunk, indices)
        assert tail.std(0).mean() > 0.5  # the tolerance means something
        assert difference(tail, answer_logits(model, trunk.batch(indices))) < TOLERANCE
        assert difference(tail, torch.cat([alone[index] for index in indices])) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 64}),
        ("gemma3", {"rope_parameters": {**ROPES, "sliding_attention": ROPES["full_attention"]}}),
    ],
    ids=["mistral window", "gemma2 window", "gemma2 attention cap", "gemma2 final cap", "gemma3 window", "gemma3 rope"],
)
@torch.no_grad()
def test_windows_caps_and_ropes_of_these_models_are_felt(architecture: str, without: dict[str, object]) -> None:
    batch = make_batch(RECORDS, "cpu")
    other = build(architecture, **without)
    assert difference(answer_logits(other, batch), answer_logits(shared_model(architecture), batch)) > 100 * TOLERANCE


@torch.no_grad()
def test_a_single_record_can_be_split(model: PreTrainedModel) -> None:
    trunk = Trunk(model, RECORDS[3:4], 2)
    assert trunk.first_layer == 2
    assert difference(of_trunk(trunk, [0]), full_logits(model, RECORDS[3])) < TOLERANCE


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_a_model_in_half_precision_is_split_within_its_rounding(architecture: str) -> None:
    model = copy.deepcopy(shared_model(architecture)).to(torch.bfloat16)
    trunk = Trunk(model, RECORDS, 1)
    assert trunk.first_layer == 1
    assert trunk.bytes == 2 * WIDTH * sum(record.total_tokens for record in RECORDS)
    for indices in COMPOSITIONS:
        tail = of_trunk(trunk, indices)
        assert tail.dtype == torch.float32
        assert difference(tail, answer_logits(model, trunk.batch(indices))) <= SPLIT_TOLERANCE[torch.bfloat16]


# --- adapters above the split


@pytest.mark.parametrize(("architecture", "layer"), [(name, layer) for name, layer in SPLITS if layer < 3])
def test_an_adapter_that_changes_after_caching_is_felt_and_gets_the_full_gradient(
    architecture: str, layer: int
) -> None:
    model = build(architecture)
    layers = decoder_layers(model)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(linear_modules(layers[-1])),
        layers_to_transform=list(range(layer, len(layers))),
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
    )
    adapter = get_peft_model(model, config).eval()
    weights = {name: weight for name, weight in adapter.named_parameters() if weight.requires_grad}
    assert not any(f".{below}." in name for name in weights for below in range(layer))
    trunk = Trunk(model, RECORDS, layer)
    assert trunk.first_layer == layer
    indices = COMPOSITIONS[1]
    batch = trunk.batch(indices)
    before = of_trunk(trunk, indices).detach()
    with torch.no_grad():
        for name, weight in weights.items():
            if ".lora_B." in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))

    tail, full = trunk.logits(indices, batch), answer_logits(model, batch)
    assert difference(before, full) > 0.05
    assert difference(tail, full) < TOLERANCE
    through_tail, through_full = (
        torch.autograd.grad(token_losses(logits, batch).mean(), list(weights.values())) for logits in (tail, full)
    )
    for mine, expected in zip(through_tail, through_full, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# --- what is run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_mlp_of_the_last_layer_alone_sees_no_more_than_answers(architecture: str) -> None:
    model, seen = build(architecture), dict[int, int]()
    layers = decoder_layers(model)
    for place, layer in enumerate(layers):
        (mlp,) = position_wise_blocks(layer)
        assert mlp is layer.get_submodule("mlp")
        act = next(module for name, module in mlp.named_modules() if "act" in name)
        act.register_forward_hook(lambda _, args, __, place=place: seen.update({place: args[0].shape[-2]}))
    trunk = Trunk(model, RECORDS, 1)
    of_trunk(trunk, [3, 1])  # 23 and 19 tokens, of which the answers are at most five
    assert seen == {**dict.fromkeys(range(len(layers) - 1), 23), len(layers) - 1: 6}


@pytest.fixture
def passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """How often the attention of each layer ran. A layer's own hooks run even where it computes nothing."""
    counts = [0] * LAYERS
    handles = []
    layer: Any
    for place, layer in enumerate(decoder_layers(model)):

        def count(*_: object, place: int = place) -> None:
            counts[place] += 1

        handles.append(layer.self_attn.register_forward_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_layers_below_the_split_run_once_per_record(
    model: PreTrainedModel, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk_module, "TRUNK_RECORDS", 2)
    cached = len(group_by_length(RECORDS, range(len(RECORDS)), 2, trunk_module.TRUNK_TOKENS))
    assert cached == 4
    assert splits_exactly(model, 2, RECORDS)
    check = passes.copy()
    trunk = Trunk(model, RECORDS, 2)
    # The check once more; then one pass per batch, in which the layers above are not run.
    assert passes == [2 * check[0] + cached, 2 * check[1] + cached, 2 * check[2]]
    before = passes.copy()
    for indices in COMPOSITIONS:
        of_trunk(trunk, indices)
    assert passes == [before[0], before[1], before[2] + len(COMPOSITIONS)]


@torch.no_grad()
def test_an_adapter_from_the_first_layer_on_needs_no_cache_and_no_check(
    model: PreTrainedModel, passes: list[int]
) -> None:
    trunk = Trunk(model, RECORDS, 0)
    assert (trunk.first_layer, trunk.bytes, sum(passes)) == (0, 0, 0)
    assert torch.equal(of_trunk(trunk, [2, 4]), answer_logits(model, trunk.batch([2, 4])))
    assert passes == [2] * LAYERS


@torch.no_grad()
@pytest.mark.parametrize("cache_bytes", [0, 3000])
def test_a_small_budget_changes_no_logits(
    model: PreTrainedModel, cache_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="loramem.models.trunk")
    ample = Trunk(model, RECORDS, 1)
    assert not caplog.records
    tight = Trunk(model, RECORDS, 1, cache_bytes=cache_bytes)
    assert "host memory" in caplog.text
    assert tight.bytes == ample.bytes == 4 * WIDTH * sum(record.total_tokens for record in RECORDS)
    # No padded batch is kept alive behind a slice of it.
    assert sum(hidden.untyped_storage().nbytes() for hidden in ample._hidden) == ample.bytes
    for indices in COMPOSITIONS:
        assert torch.equal(of_trunk(tight, indices), of_trunk(ample, indices))


# --- the model afterwards


def assert_untouched(model: PreTrainedModel, logits: Tensor) -> None:
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(answer_logits(model, make_batch(RECORDS, "cpu")), logits)


@torch.no_grad()
def test_the_model_is_whole_again_after_the_tail(model: PreTrainedModel) -> None:
    logits = answer_logits(model, make_batch(RECORDS, "cpu"))
    trunk = Trunk(model, RECORDS, 2)
    assert_untouched(model, logits)
    of_trunk(trunk, [0, 1])
    assert_untouched(model, logits)


@torch.no_grad()
def test_the_model_is_whole_again_when_the_tail_fails(model: PreTrainedModel) -> None:
    logits = answer_logits(model, make_batch(RECORDS, "cpu"))
    trunk = Trunk(model, RECORDS, 2)

    def fail(*_: object) -> None:
        raise MemoryError

    handle = decoder_layers(model)[2].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        of_trunk(trunk, [0, 1])
    handle.remove()
    assert_untouched(model, logits)


@torch.no_grad()
def test_a_forward_that_someone_else_replaced_is_put_back() -> None:
    model = build("qwen3")
    layer, calls = decoder_layers(model)[0], list[None]()
    original: Callable[..., Tensor] = layer.forward

    def replaced(*args: Any, **named: Any) -> Tensor:
        calls.append(None)
        return original(*args, **named)

    layer.forward = replaced
    trunk = Trunk(model, RECORDS, 1)
    before = len(calls)
    of_trunk(trunk, [0, 1])
    assert len(calls) == before
    assert vars(layer)["forward"] is replaced


# --- what cannot be split


class Leaving(nn.Module):
    """Layer 0 of a model whose last layer takes more than hidden states: its own output stays in ``left``."""

    def __init__(self, layer: nn.Module, left: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.left = layer, left

    def forward(self, *args: Any, **named: Any) -> Tensor:
        self.left["hidden"] = self.layer(*args, **named)
        return self.left["hidden"]


class Taking(nn.Module):
    """The last layer, which adds to its output what ``take`` finds."""

    def __init__(self, layer: nn.Module, take: Callable[[], Tensor | float]) -> None:
        super().__init__()
        self.layer, self.take = layer, take

    def forward(self, *args: Any, **named: Any) -> Tensor:
        hidden: Tensor = self.layer(*args, **named)
        return hidden + self.take()


@pytest.mark.parametrize(
    ("take", "lasts"),
    [
        (lambda left: left["hidden"], False),  # as Gemma3n shares keys and values: a dictionary of each pass
        (lambda left: left.pop("hidden", 0.0), False),
        (lambda left: left.pop("hidden", float("nan")), False),
        (lambda left: left.pop("hidden"), True),
        (lambda left: left["hidden"], True),
    ],
    ids=["missing", "differs", "not a number", "of the pass before, once", "of the pass before"],
)
@torch.no_grad()
def test_a_model_that_takes_more_than_hidden_states_is_run_whole(
    take: Callable[[dict[str, Tensor]], Tensor | float], lasts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, left = build("qwen3"), dict[str, Tensor]()
    layers = decoder_layers(model)
    layers[0], layers[-1] = Leaving(layers[0], left), Taking(layers[-1], lambda: take(left))
    if not lasts:
        model.get_input_embeddings().register_forward_hook(lambda *_: left.clear())
    logits = answer_logits(model, make_batch(RECORDS, "cpu"))
    trunk = Trunk(model, RECORDS, 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "every layer is run" in caplog.text
    assert (trunk.first_layer, trunk.bytes) == (0, 0)
    for indices in COMPOSITIONS:
        assert torch.equal(of_trunk(trunk, indices), answer_logits(model, trunk.batch(indices)))
    assert_untouched(model, logits)
