"""Adapters that PEFT saves on tiny base models, one for each feature of its LoRA."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3MoeConfig
from transformers.models.auto import AutoModelForCausalLM

from loramem.results import Finding
from loramem.serving.check import check_folders

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": None,
}
BASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),  # its q, k and v have a bias
    "gpt2": lambda: GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1
    ),
    "deeper": lambda: LlamaConfig(**{**SHAPE, "num_hidden_layers": 4}),
    "shallower": lambda: LlamaConfig(**{**SHAPE, "num_hidden_layers": 2}),
    "wider": lambda: LlamaConfig(**{**SHAPE, "hidden_size": 32}),
}
QV, IDS = ["q_proj", "v_proj"], torch.arange(1, 9)[None]

Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {
    "plain": ("llama", {"target_modules": QV}),
    "all linear modules": ("llama", {"target_modules": "all-linear"}),
    "a pattern": ("llama", {"target_modules": r".*layers\.[01]\..*\.(q_proj|up_proj)"}),
    "no targets named": ("llama", {}),
    "full paths": ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]}),
    "some layers": ("llama", {"target_modules": QV, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "one layer": ("llama", {"target_modules": QV, "layers_to_transform": 1}),
    "excluded names": ("llama", {"target_modules": QV, "exclude_modules": ["v_proj"]}),
    "an excluded pattern": ("llama", {"target_modules": QV, "exclude_modules": r".*layers\.0\..*"}),
    "transposed weights": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "the head saved": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "both ends saved": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "an MLP saved": ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp", "input_layernorm"]}),
    "tied ends saved": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "the head adapted": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "the embeddings adapted": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "both ends adapted": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "the embeddings by a pattern": ("llama", {"target_modules": r"model\.embed_tokens|.*q_proj"}),
    "the embeddings of GPT-2": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "tied ends adapted": ("tied", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "tied ends adapted alike": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "DoRA": ("llama", {"target_modules": QV, "use_dora": True}),
    "DoRA of both ends": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}),
    "new tokens": ("llama", {"target_modules": QV, "trainable_token_indices": [1, 2, 3]}),
    "new tokens of both ends": (
        "llama",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}},
    ),
    "new tokens of tied ends": (
        "tied",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
    ),
    "a bias of the LoRA": ("qwen2", {"target_modules": QV, "lora_bias": True}),
    "all biases": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "all biases of GPT-2": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "the biases of adapted modules": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "ranks by pattern": ("llama", {"target_modules": QV, "rank_pattern": {"q_proj": 2, r"layers\.[01]\..*v_proj": 3}}),
    "alphas by pattern": ("llama", {"target_modules": QV, "alpha_pattern": {"q_proj": 2}}),
    "rank-stabilised": ("llama", {"target_modules": QV, "use_rslora": True}),
    "copied layers": ("llama", {"target_modules": QV, "layer_replication": [[0, 2], [1, 3]]}),
    **{
        f"begun with {init}": ("llama", {"target_modules": QV, "init_lora_weights": init})
        for init in ("pissa", "pissa_niter_2", "olora", "gaussian", "orthogonal", "mica", "eva", "lora_ga", False)
    },
    "experts": ("moe", {"target_modules": QV, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "experts alone": ("moe", {"target_parameters": ["mlp.experts.down_proj"]}),
    "blocks": (
        "llama",
        {
            "target_modules": [*QV, "o_proj"],
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=QV, nblocks=2),
        },
    ),
    "pooled inputs": ("llama", {"target_modules": QV, "use_qalora": True, "qalora_group_size": 4}),
    "from some tokens on": ("llama", {"target_modules": QV, "alora_invocation_tokens": [5, 6]}),
    "VeLoRA": ("llama", {"target_modules": QV, "velora_config": VeloraConfig()}),
    "KaSA": ("llama", {"target_modules": QV, "kasa_config": KasaConfig()}),
    "MonteCLoRA": ("llama", {"target_modules": QV, "monteclora_config": MontecloraConfig()}),
    "many at once": (
        "qwen2",
        {
            "target_modules": QV,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "bias": "lora_only",
            "modules_to_save": ["lm_head"],
        },
    ),
}


@dataclass(frozen=True)
class Saved:
    """An adapter that PEFT saved, and the folder of its base model, which has no weights."""

    folder: Path
    base: Path

    def findings(self, target: str = "peft", model: Path | None = None) -> tuple[Finding, ...]:
        return check_folders([self.folder], [target], model=None if model is None else str(model)).findings


def base_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(BASES[name]()).eval()
    return model


def adapted(name: str, folder: Path) -> torch.Tensor:
    """Save an adapter of a case with random numbers in all that it trains; returns its logits."""
    base, fields = CASES[name]
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **copy.deepcopy(fields))
    model = get_peft_model(base_model(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) / 10
        logits: torch.Tensor = model.eval()(IDS).logits
    model.save_pretrained(folder)
    return logits


def words(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.what for finding in findings if finding.refused]


def save_config(name: str, folder: Path) -> Path:
    """A base model's folder with its config.json alone."""
    config = BASES[name]()
    config.architectures = [type(base_model(name)).__name__]
    config.save_pretrained(folder)
    return folder


def saved_adapter(name: str, folder: Path) -> Saved:
    """An adapter of a case, beside its base model's config, in a folder."""
    adapted(name, folder / "adapter")
    return Saved(folder / "adapter", save_config(CASES[name][0], folder / "base"))
