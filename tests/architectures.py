"""Tiny base models of all causal language models that transformers has, and what becomes of them.

One table of sizes serves them all: a configuration takes the names it knows. `OVERRIDES` holds what a family needs
besides, `NOT_BUILT` the families that cannot be made tiny, with the reason.

``python -m tests.architectures`` tries all of them and writes the table of docs/architectures.md; with names, only
their rows are written anew.
"""

import json
import math
import re
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loramem import MemoryStore
from loramem.errors import BaseModelError
from loramem.models.base_model import load_base_model

from .conftest import ROOT, VOCABULARY, numbers, save_tokenizer

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
LATENT = {"head_dim": ..., "num_key_value_heads": 4}  # keys and values come from one low-rank projection
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
HALF_LINEAR_LATENT = {**HALF_LINEAR, "num_key_value_heads": 4}
HALF_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
HALF_LINEAR_INDEXED = {
    **HALF_LINEAR,
    **INDEXER,
    "indexer_compress_ratio": 2,
    "hidden_size": 2 * WIDTH,
    "initializer_range": 0.1,
}
GLOBAL_HEADS = {"global_head_dim": 8}
LOGITS = {"logit_scale": 1.0}  # the default makes p = 0.9 impossible at this width
# A value of ... takes a name out of SIZES.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), HALF_LINEAR),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), HALF_LINEAR_INDEXED),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), GLOBAL_HEADS),
    "bailing_hybrid": HALF_LINEAR_LATENT,
    "kimi_linear": {**HALF_LINEAR_LATENT, "initializer_range": 0.2},
    **dict.fromkeys(("lfm2", "lfm3"), HALF_CONVOLUTION),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), LOGITS),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        **LOGITS,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "cpmant": {"dim_model": WIDTH, "dim_head": 8, "dim_ff": 2 * WIDTH},
    "ctrl": {"dff": 2 * WIDTH},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 2 * WIDTH},
    },
    "deepseek_v4": {"hc_mult": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon": {"head_dim": ...},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_hidden_layers": ...},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {**HALF_CONVOLUTION, "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attention_head_size": 8},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 64},
    "xlnet": {"max_position_embeddings": ..., "d_inner": 2 * WIDTH},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlstm": {"v_head_dim": ..., "embedding_dim": WIDTH},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "head_dim": ..., "initializer_range": 0.2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "head_dim": ..., "initializer_range": 0.2, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}
NOT_IN_BFLOAT16 = frozenset({"xglm"})  # its random weights are not certified in both dtypes; stores are for one
OTHER_SENSES = "a text model with encoders of images or sound, which cannot be made tiny by one table"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("dots3_note", "emu3", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git"), OTHER_SENSES),
    **dict.fromkeys(("got_ocr2", "mllama", "moss_transcribe_diarize", "phi4_multimodal"), OTHER_SENSES),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "its tokens are sound"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it drafts for another model, whose states it reads"
    ),
    "blt": "it reads bytes in patches that a second model cuts",
}


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
    aliases = type(text).attribute_map
    known = {field.name for field in fields(type(text))} | set(aliases)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    sizes = {
        name: value for name, value in sizes.items() if aliases.get(name, name) == name or aliases[name] not in sizes
    }
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
    embeddings = model.get_input_embeddings().weight.data
    embeddings[0] = embeddings[1]  # transformers draws the row of the padding token as zeros, trained models have none
    model.save_pretrained(folder)
    save_tokenizer(folder)
    described = folder / "tokenizer_config.json"  # some configurations do not say how long the context is
    described.write_text(json.dumps({**json.loads(described.read_text()), "model_max_length": CONTEXT}))
    return folder


def outcome(base: Path, memory: Path) -> Outcome:
    """Write three records and recall them in a fresh store, or be refused when the model is loaded."""
    records = numbers(3, 2)
    serve = [] if base.name.removeprefix("tiny-") in NOT_IN_BFLOAT16 else None
    try:
        load_base_model(str(base))
    except BaseModelError as error:
        return Outcome(False, reason=str(error))
    with MemoryStore(memory, str(base), serve=serve) as store:
        store.write(records)
        modules = tuple(sorted({name for adapter in store.adapters() for name in adapter.placement["modules"]}))
    with MemoryStore(memory, create=False) as store:
        assert {key: store.recall(key) for key in records} == records
    return Outcome(True, modules)


TABLE = ROOT / "docs" / "architectures.md"
HEAD = ("| architecture | outcome | adapted modules, or the reason |", "| --- | --- | --- |")
WRITES, REFUSED, UNTRIED = "writes and recalls", "refused at load", "not tried"


def row(family: str, found: Outcome) -> str:
    """The line of the table; reasons without what differs from run to run."""
    if found.writes:
        return f"| {family} | {WRITES} | {' '.join(f'`{name}`' for name in found.modules)} |"
    reason = re.sub(r": its logits differ.*?rounding\.", ".", found.reason.replace("|", "/"))
    return f"| {family} | {REFUSED} | {reason} |"


def table() -> dict[str, str]:
    """The lines of the table in the docs, by architecture."""
    lines = TABLE.read_text().splitlines()
    return {line.split("|")[1].strip(): line for line in lines[lines.index(HEAD[1]) + 1 :] if line.startswith("| ")}


def write_table(rows: dict[str, str]) -> None:
    """The table in place of the one that is there."""
    untried = {family: f"| {family} | {UNTRIED} | {reason} |" for family, reason in NOT_BUILT.items()}
    lines = TABLE.read_text().splitlines()
    before = lines[: lines.index(HEAD[0])]
    TABLE.write_text("\n".join([*before, *HEAD, *(line for _, line in sorted({**rows, **untried}.items()))]) + "\n")


def main(chosen: list[str]) -> None:
    rows = table() if chosen else {}
    for family in chosen or [family for family in families() if family not in NOT_BUILT]:
        with tempfile.TemporaryDirectory() as folder:
            base = build_tiny(family, Path(folder) / f"tiny-{family}")
            rows[family] = row(family, outcome(base, Path(folder) / "memory"))
        print(rows[family], flush=True)
        write_table(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
