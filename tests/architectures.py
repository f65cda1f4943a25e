"""Tiny base models of every architecture that transformers offers as a causal language model, and what becomes of them.

One table of sizes serves them all: a configuration takes the names it knows. `OVERRIDES` holds what a family needs
besides, `NOT_BUILT` the families that cannot be made tiny, with the reason.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loramem import MemoryStore
from loramem.base_model import load_base_model
from loramem.errors import BaseModelError
from loramem.placement import Placement

from .conftest import VOCABULARY, numbers, save_tokenizer

WIDTH, CONTEXT = 32, 256
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"), 2 * WIDTH),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 2 * WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), CONTEXT),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **{"vocab_size": VOCABULARY, "embedding_size": WIDTH, "rotary_dim": 4, "is_decoder": True},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_conv": 4},
    **{"tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1},
}
_HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"head_dim": ...},
    "deepseek_v3": {"head_dim": ...},
    "qwen3_next": _HALF_LINEAR,
}
NOT_BUILT: dict[str, str] = {}


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture."""

    writes: bool
    """Whether three records were written and recalled by a fresh store; otherwise it was refused at load."""
    modules: tuple[str, ...] = ()
    """That carried the adapter."""
    reason: str = ""
    """Of the refusal."""


def families() -> list[str]:
    """All model types of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config()
    sizes = {name: value for name, value in SIZES.items() if hasattr(text, name)}
    aliases = type(text).attribute_map
    sizes = {name: value for name, value in sizes.items() if aliases.get(name, name) == name or aliases[name] not in sizes}
    sizes = {name: value for name, value in {**sizes, **OVERRIDES.get(family, {})}.items() if value is not ...}
    if text is default:
        return kind(**sizes)
    part = next(name for name in default.to_dict() if vars(default).get(name) is text)
    return kind(**{part: {**sizes, "model_type": text.model_type}})


def build_tiny(family: str, folder: Path) -> Path:
    """A random model with a head whose logits spread well beyond ln(vocabulary), and the tests' tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    if (head := model.get_output_embeddings()) is not None:
        head.weight.data.normal_(std=(math.log(VOCABULARY) + 12) / WIDTH)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def outcome(base: Path, memory: Path) -> Outcome:
    """Write three records and recall them in a fresh store, or be refused when the model is loaded."""
    records = numbers(3, 2)
    try:
        load_base_model(str(base))
    except BaseModelError as error:
        return Outcome(False, reason=str(error))
    with MemoryStore(memory, str(base)) as store:
        store.write(records)
        modules = tuple(Placement.default(store.base.model).modules)
    with MemoryStore(memory, create=False) as store:
        assert {key: store.recall(key) for key in records} == records
    return Outcome(True, modules)
