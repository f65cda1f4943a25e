"""Left padding: harmless or refused, measured on the model when it is loaded."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramem import MemoryStore
from loramem.errors import UnsupportedBaseModel
from loramem.models.architecture import check_architecture
from loramem.models.decoding import greedy_decode
from loramem.models.layers import decoder_layers
from loramem.models.prefix import shared_prefix

from .architectures import build_tiny, tiny_config


def loud(family: str, **changes: object) -> PreTrainedModel:
    """A model whose layers matter: weights eight times as large, and padding that is no zero."""
    torch.manual_seed(0)
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in decoder_layers(model).parameters():
        if parameter.ndim == 2:
            parameter.data *= 8
    embeddings = model.get_input_embeddings().weight.data
    embeddings[0] = embeddings[1]
    return model


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "lfm2", "deepseek_v3"])
def test_recurrences_that_mask_padding_decode_alike_alone_and_in_a_batch(family: str) -> None:
    model = loud(family)
    check_architecture(model)
    prefix = list(range(40, 60))
    for shared in ([], prefix):  # a prefix that is run once would leave padding between it and the key
        prompts = [[*shared, *range(100 + 10 * row, 103 + 14 * row)] for row in range(3)]
        together = greedy_decode(model, prompts, 8, end_id=1)
        assert together == [greedy_decode(model, [prompt], 8, end_id=1)[0] for prompt in prompts]


def test_a_prefix_is_shared_where_all_layers_attend() -> None:
    prompts = [[*range(40, 60), 7], [*range(40, 60), 8, 9]]
    assert shared_prefix(loud("llama"), prompts) == 20
    assert shared_prefix(loud("qwen3_next"), prompts) == 0


@pytest.mark.parametrize(
    "family, reason",
    [
        ("rwkv", "decodes a prompt otherwise in a padded batch than alone"),
        ("recurrent_gemma", "decodes a prompt otherwise in a padded batch than alone"),
        ("mamba", "no projection of attention or of a dense or shared MLP"),
        ("longcat_flash", "exactly one stack of decoder layers"),
    ],
)
def test_what_padding_or_placement_forbids_is_refused(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedBaseModel, match=reason):
        check_architecture(loud(family))


def test_a_model_that_sees_the_tokens_to_the_right_is_refused() -> None:
    check_architecture(loud("bert"))
    with pytest.raises(UnsupportedBaseModel, match="attention to the right"):
        check_architecture(loud("bert", is_decoder=False))


def test_bfloat16_rounding_is_no_reason_to_refuse() -> None:
    for family in ("llama", "qwen3_moe", "jamba"):
        check_architecture(loud(family).to(torch.bfloat16))
    with pytest.raises(UnsupportedBaseModel):
        check_architecture(loud("recurrent_gemma").to(torch.bfloat16))


def test_a_refused_model_makes_no_store(tmp_path: Path) -> None:
    folder = build_tiny("mamba", tmp_path / "tiny-mamba")
    with pytest.raises(UnsupportedBaseModel):
        MemoryStore(tmp_path / "memory", str(folder))
    assert not (tmp_path / "memory").exists()
