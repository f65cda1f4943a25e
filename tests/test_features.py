"""The model's end over features says what all of it says, on every architecture, with an adapter anywhere in it."""

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from loramem.models.batches import answer_logits, make_batch
from loramem.models.certificate import free_running
from loramem.models.decoding import forced_batch, greedy_decode
from loramem.models.ending import Ending
from loramem.models.features import HIDDEN, _watched, collect, collect_decoding
from loramem.models.layers import LastLayer, decoder_layers, linears
from loramem.models.placement import Placement
from loramem.models.prefix import SHARED_PREFIX_TOKENS

from .test_batches import encoded
from .test_trunk import ARCHITECTURES, RECORDS, TOLERANCE, build, difference, shared_model


def adapted(model: PreTrainedModel, placement: Placement, scale: float = 0.1) -> tuple[nn.Module, list[LoraLayer]]:
    """An adapter that changes what every one of its modules gives."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(placement.modules),
        layers_to_transform=list(placement.layers),
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=scale, generator=torch.Generator().manual_seed(1))
    return peft, [module for _, module in sorted(peft.named_modules()) if isinstance(module, LoraLayer)]


def full_logits(model: nn.Module, records: Sequence[int]) -> Tensor:
    return answer_logits(model, make_batch([RECORDS[index] for index in records], "cpu"))


RUNGS = [(name, rung) for name in ARCHITECTURES for rung in range(3)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_without_an_adapter_the_end_gives_the_logits_of_the_full_model(architecture: str) -> None:
    model = shared_model(architecture)
    features = collect(model, RECORDS)
    assert features.owners.tolist() == [index for index, record in enumerate(RECORDS) for _ in record.answer_ids]
    every = Ending(model, features).logits(slice(None))
    assert every.std(0).mean() > 0.5  # the tolerance means something
    for index in range(len(RECORDS)):
        assert difference(every[features.owners == index], full_logits(model, [index])) < TOLERANCE


@pytest.mark.parametrize(("architecture", "rung"), RUNGS)
def test_an_adapter_behind_the_last_attention_is_felt_and_gets_the_full_gradient(architecture: str, rung: int) -> None:
    model = build(architecture)
    features = collect(model, RECORDS)
    without = Ending(model, features).logits(slice(None)).detach()
    placement = Placement.ladder(model)[rung]
    assert placement.layers == (len(decoder_layers(model)) - 1,)
    peft, layers = adapted(model, placement)
    ending = Ending(model, features, layers)

    logits, full = ending.logits(slice(None)), full_logits(peft, range(len(RECORDS)))
    assert difference(without, full) > 0.01
    assert difference(logits, full) < TOLERANCE
    weights = [weight for weight in peft.parameters() if weight.requires_grad]
    assert len(weights) == 2 * len(layers)
    through_end, through_all = (
        torch.autograd.grad(torch.logsumexp(found, 1).sum(), weights) for found in (logits, full)
    )
    for mine, expected in zip(through_end, through_all, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_meets_the_same_features_but_for_rounding(architecture: str) -> None:
    model = shared_model(architecture)
    features = collect(model, RECORDS)
    met = collect_decoding(model, RECORDS, features, free_running(RECORDS))
    for name in HIDDEN:
        assert difference(getattr(met, name), getattr(features, name)) < TOLERANCE
    assert torch.equal(met.targets, features.targets)


@pytest.mark.parametrize("alone", [False, True])
def test_what_decoding_meets_is_bit_for_bit_what_it_meets_with_an_adapter(alone: bool) -> None:
    """Of an adapter that gives every value back; so training over it is training over what its proof computes."""
    model = build("qwen3").to(torch.bfloat16)
    batches = [[index] for index in range(len(RECORDS))] if alone else free_running(RECORDS)
    features = collect(model, RECORDS)
    met = collect_decoding(model, RECORDS, features, batches)
    assert not torch.equal(met.entering, features.entering)
    decoded = dict[int, Tensor]()
    adapted(model, Placement.ladder(model)[0])
    for batch in batches:
        prompts, answers = [RECORDS[i].prompt_ids for i in batch], [RECORDS[i].answer_ids for i in batch]
        longest = max(map(len, answers))
        with _watched(LastLayer.of(model)) as passes:
            greedy_decode(model, prompts, longest, answers[0][-1], forced=answers)
        entering = torch.stack([seen["entering"][:, -1] for seen in passes[-longest:]], 1)
        decoded |= {index: entering[row, : len(answers[row])] for row, index in enumerate(batch)}
    assert torch.equal(torch.cat([decoded[index] for index in range(len(RECORDS))]), met.entering)


def test_records_that_are_not_decoded_keep_the_features_that_are_known() -> None:
    model = build("qwen3").to(torch.bfloat16)
    features = collect(model, RECORDS)
    every = collect_decoding(model, RECORDS, features, [[index] for index in range(len(RECORDS))])
    some = collect_decoding(model, RECORDS, features, [[1]])
    decoded = features.owners == 1
    for name in HIDDEN:
        whole, one = getattr(every, name), getattr(some, name)
        assert torch.equal(one[decoded], whole[decoded])
        assert torch.equal(one[~decoded], getattr(features, name)[~decoded])
    assert not torch.equal(some.entering[decoded], features.entering[decoded])


@pytest.mark.parametrize("rung", range(3))
@torch.no_grad()
def test_a_change_after_the_constants_were_taken_is_felt(rung: int) -> None:
    model = build("qwen3")
    features = collect(model, RECORDS)
    peft, layers = adapted(model, Placement.ladder(model)[rung], scale=0.0)
    ending = Ending(model, features, layers)
    for layer in layers:
        layer.lora_B["default"].weight.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    assert difference(ending.logits(slice(None)), full_logits(peft, range(len(RECORDS)))) < TOLERANCE


@torch.no_grad()
def test_some_rows_and_some_tokens_are_those_of_all() -> None:
    model = build("phi3")
    _, layers = adapted(model, Placement.ladder(model)[0])
    ending = Ending(model, collect(model, RECORDS), layers)
    every = ending.logits(slice(None))
    tokens = torch.tensor([5, 60, 7])
    head = partial(linear, weight=model.get_output_embeddings().weight[tokens])
    parts = torch.cat([ending.logits(rows, head) for rows in ending.chunks(4)])
    torch.testing.assert_close(parts, every[:, tokens])


@pytest.mark.parametrize(
    ("architecture", "rung", "runs"),
    [("qwen3", 0, {"down_proj"}), ("qwen3", 1, {"gate_proj", "up_proj", "down_proj"}), ("gpt2", 0, {"c_proj"})],
)
@torch.no_grad()
def test_nothing_that_is_constant_is_computed_again(architecture: str, rung: int, runs: set[str]) -> None:
    model = build(architecture)
    _, layers = adapted(model, Placement.ladder(model)[rung])
    ending = Ending(model, collect(model, RECORDS), layers)
    seen = set[str]()
    for layer in decoder_layers(model):
        for name, module in linears(layer):
            module.register_forward_hook(lambda *_, name=name: seen.add(name))
        for name, module in layer.named_modules():
            if isinstance(module, LoraLayer):
                module.register_forward_hook(lambda *_, name=name: seen.add(name.rpartition(".")[2]))
    ending.logits(slice(None))
    assert seen == runs


@torch.no_grad()
def test_deviations_of_another_pass_are_dealt_out_in_training_alone() -> None:
    model = build("llama")
    features = collect(model, RECORDS)
    half = copy.deepcopy(model).to(torch.bfloat16)
    others = collect(half, RECORDS).to(torch.float32)
    _, layers = adapted(model, Placement.ladder(model)[0])
    mine, theirs = Ending(model, features, layers), Ending(model, others, layers)
    plain = mine.logits(slice(None))
    mine.deviate([theirs])
    torch.testing.assert_close(mine.logits(slice(None)), plain)
    generator = torch.Generator().manual_seed(0)
    mine.shuffle_deviations(generator)
    first = mine.logits(slice(None))
    mine.shuffle_deviations(generator)
    second = mine.logits(slice(None))
    torch.testing.assert_close(mine.logits(slice(None), deviating=False), plain)
    rounding = difference(theirs.logits(slice(None)), plain)
    assert 1e-3 < rounding < 0.1
    for dealt in (first, second):
        assert rounding / 5 < difference(dealt, plain) < rounding * 5
    assert difference(first, second) > 0


@torch.no_grad()
def test_a_common_prefix_is_run_once_and_changes_nothing() -> None:
    prefix = list(range(3, 3 + SHARED_PREFIX_TOKENS))
    records = [encoded([*prefix, *record.prompt_ids], record.answer_ids) for record in RECORDS]
    model, rows = shared_model("qwen3"), []
    handle = decoder_layers(model)[0].register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:2]))
    try:
        batch = forced_batch(model, records)
        found = answer_logits(model, batch)
    finally:
        handle.remove()
    longest = max(record.total_tokens for record in records)
    assert rows == [(1, SHARED_PREFIX_TOKENS), (len(records), longest - SHARED_PREFIX_TOKENS)]
    assert difference(found, answer_logits(model, make_batch(records, "cpu"))) < TOLERANCE
    features = collect(model, records)
    assert difference(Ending(model, features).logits(slice(None)), found) < TOLERANCE


def test_the_ladder_ends_in_the_default_placement_and_begins_with_the_mlps_last_module() -> None:
    model = shared_model("qwen3")
    rungs = Placement.ladder(model)
    assert [rung.modules for rung in rungs] == [
        ("down_proj",),
        ("down_proj", "gate_proj", "up_proj"),
        ("down_proj", "gate_proj", "o_proj", "up_proj"),
        Placement.default(model).modules,
    ]
    assert LastLayer.of(model).projection is decoder_layers(model)[-1].self_attn.o_proj
