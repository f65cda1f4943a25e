"""Adapters that PEFT itself saves, with every feature of its LoRA: what it loads is taken, the rest is not."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loramem.models.adapter_config import RANGES, TASKS, refusals

from .peft_adapters import CASES, IDS, QV, Saved, adapted, base_model, save_config, saved_adapter, words


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_what_peft_loads_with_equal_logits_is_taken(name: str, tmp_path: Path) -> None:
    logits = adapted(name, tmp_path / "adapter")
    with torch.no_grad():
        again = PeftModel.from_pretrained(base_model(CASES[name][0]), tmp_path / "adapter").eval()(IDS).logits
        bare = base_model(CASES[name][0])(IDS).logits
    assert torch.allclose(again, logits, atol=1e-5) and not torch.allclose(bare, logits, atol=1e-4)

    one = Saved(tmp_path / "adapter", save_config(CASES[name][0], tmp_path / "base"))
    assert words(one.findings()) == []
    assert words(one.findings(model=one.base)) == []


@pytest.mark.filterwarnings("ignore")
def test_what_vllm_and_sglang_do_not_serve_stays_refused(tmp_path: Path) -> None:
    for name, (vllm, sglang) in {
        "the head saved": ("modules_to_save", "modules_to_save"),
        "the embeddings adapted": ("modules", "modules"),
        "DoRA": ("use_dora", "use_dora"),
        "new tokens": ("trainable_token_indices", "trainable_token_indices"),
        "all biases": ("bias", "bias"),
        "blocks": ("use_bdlora", "use_bdlora"),
        "pooled inputs": ("use_qalora", "use_qalora"),
        "KaSA": ("kasa_config", "kasa_config"),
        "experts": ("target_parameters", "target_parameters"),
        "begun with pissa": ("init_lora_weights", "init_lora_weights"),
    }.items():
        one = saved_adapter(name, tmp_path)
        config = json.loads((one.folder / "adapter_config.json").read_text())
        (one.folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
        for target, rule in {"vllm": vllm, "sglang": sglang}.items():
            assert rule in {finding.rule for finding in one.findings(target) if finding.refused}, (name, target)
            assert "tensors" not in {finding.rule for finding in one.findings(target)}, (name, target)
        shutil.rmtree(one.folder)


Tensors = dict[str, torch.Tensor]


def dropped(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(next(name for name in tensors if part in name))


def added(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(16)})


def cut(part: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if part in name)
        tensors[name] = tensors[name][:-1].clone()

    return change


def poisoned(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        name = max(tensors)
        tensors[name] = tensors[name].clone().to(dtype)
        tensors[name].view(-1)[-1] = value

    return change


LAYER = "model.layers.0.self_attn"
DAMAGE: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("plain", dropped("lora_B"), "lora_A alone"),
    ("plain", cut("lora_A"), "rank 3 and 4"),
    ("plain", added("lm_head.weight"), "no field of the config implies"),
    ("plain", added(f"{LAYER}.q_proj.lora_magnitude_vector"), "no field of the config implies"),
    ("plain", added(f"{LAYER}.q_proj.lora_B.bias"), "no field of the config implies"),
    ("plain", added(f"{LAYER}.q_proj.base_layer.weight"), "no field of the config implies"),
    ("plain", added(f"{LAYER}.q_proj.base_layer.bias"), "no field of the config implies"),
    ("plain", added("model.embed_tokens.token_adapter.trainable_tokens_delta"), "no field of the config implies"),
    ("plain", poisoned(float("nan")), "NaN or Inf"),
    ("plain", poisoned(float("-inf"), torch.bfloat16), "NaN or Inf"),
    ("plain", poisoned(float("inf"), torch.float16), "NaN or Inf"),
    ("the head saved", dropped("lm_head"), "module lm_head is not there"),
    ("both ends saved", dropped("embed_tokens"), "module embed_tokens is not there"),
    ("the head saved", added("model.norm.weight"), "no field of the config implies"),
    ("the embeddings adapted", dropped("lora_embedding_A"), "lora_embedding_B alone"),
    ("the embeddings adapted", cut("lora_embedding_A"), "rank 3 and 4"),
    ("the embeddings adapted", cut("base_layer.weight"), "base_layer.weight of shape"),
    ("DoRA", dropped("lora_magnitude_vector"), "no lora_magnitude_vector, which use_dora implies"),
    ("DoRA", cut("lora_magnitude_vector"), "lora_magnitude_vector of shape"),
    ("new tokens", dropped("trainable_tokens"), "which trainable_token_indices implies"),
    ("new tokens", cut("trainable_tokens"), "trainable_token_indices is of 3 tokens"),
    ("a bias of the LoRA", dropped("lora_B.bias"), "no lora_B.bias, which lora_bias implies"),
    ("a bias of the LoRA", cut("lora_B.bias"), "lora_B.bias of shape"),
    ("the biases of adapted modules", added(f"{LAYER}.k_proj.bias"), "no field of the config implies"),
    ("the biases of adapted modules", cut("base_layer.bias"), "base_layer.bias of shape"),
    ("ranks by pattern", cut("q_proj.lora_A"), "rank 1 and 2, the config says 2"),
    ("experts alone", cut("lora_A"), "rank 15 and 16"),
    ("KaSA", dropped("lora_diag"), "no lora_diag, which kasa_config implies"),
    ("some layers", added("model.layers.1.self_attn.q_proj.lora_A.weight"), "lora_A alone"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "change", "said"), DAMAGE, ids=[f"{name}: {said}" for name, _, said in DAMAGE])
def test_tensors_that_the_config_does_not_imply_and_gaps_are_refused(
    name: str, change: Callable[[Tensors], object], said: str, tmp_path: Path
) -> None:
    one = saved_adapter(name, tmp_path)
    tensors = load_file(one.folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, one.folder / "adapter_model.safetensors")
    for target in ("peft", "vllm", "sglang"):
        assert any(said in what for what in words(one.findings(target))), words(one.findings(target))


def test_a_module_that_is_named_and_not_there_needs_the_base_model(tmp_path: Path) -> None:
    one = saved_adapter("plain", tmp_path)
    config = json.loads((one.folder / "adapter_config.json").read_text())
    for absent, said in (("c_attn", None), ("k_proj", "on base model")):  # Llama has no c_attn, and has k_proj
        changed = {**config, "target_modules": [*QV, absent]}
        (one.folder / "adapter_config.json").write_text(json.dumps(changed))
        assert words(one.findings()) == [f"target module {absent} has no matrices"]
        found = words(one.findings(model=one.base))
        assert found == [] if said is None else len(found) == 1 and said in found[0]


CONFIGS: list[dict[str, Any]] = [
    *({"bias": value} for value in ("some", None, "none", "all")),
    *({"init_lora_weights": value} for value in ("nonsense", "Gaussian", "EVA", "eva", "OLoRA", "pissa_niter_x")),
    *({"init_lora_weights": value} for value in ("pissa_foo", "PISSA", "corda", "loftq", "lora_ga", "LORA_GA", "MiCA")),
    *({"init_lora_weights": value} for value in ("Orthogonal", "orthogonal", None, 1, "true", False, "mica")),
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    {"lora_bias": True, "init_lora_weights": "gaussian"},
    {"lora_bias": True, "use_dora": True},
    {"use_dora": True, "megatron_config": {"a": 1}},
    {"megatron_config": {"a": 1}},
    {"target_modules": ".*[qv]_proj", "layers_to_transform": [0]},
    {"target_modules": ".*[qv]_proj", "layers_pattern": "layers"},
    {"layers_pattern": "layers"},
    {"layers_pattern": []},
    {"target_parameters": "q_proj.weight"},
    *({"task_type": value} for value in ("NONSENSE", None, "CAUSAL_LM")),
    *({field: 3} for field in ("kasa_config", "velora_config", "eva_config", "corda_config", "lora_ga_config")),
    *({field: 3} for field in ("arrow_config", "use_bdlora", "monteclora_config")),
    {"use_bdlora": False},
    {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["q_proj"]}},
    {"arrow_config": {}},
    *({field: {name: -1}} for field, name in RANGES),
    *({"lora_alpha": value} for value in ("8", None, 0)),
    *({"lora_dropout": value} for value in (2, "x", None, 0.5)),
    {"use_dora": True, "alora_invocation_tokens": [1]},
    {"use_dora": True, "kasa_config": {"beta": 1.0}},
    *({"target_modules": value} for value in ("(", [], 5, None)),
    *({"exclude_modules": value} for value in ("(", 3, [], None)),
    *({"rank_pattern": value} for value in ({"(": 4}, {"q_proj": 0}, None, [], {"q_proj": 4})),
    *({"alpha_pattern": value} for value in ({"(": 4}, {"q_proj": "x"}, None, {"q_proj": 0.5})),
    *({"modules_to_save": value} for value in ([1], [], None)),
    *({"trainable_token_indices": value} for value in ("1", {}, None)),
    *({"layer_replication": value} for value in ([[0, 2, 3]], "x", [], None)),
    *({"layers_to_transform": value} for value in ("0", [], None, [0, 1, 2])),
    *({"alora_invocation_tokens": value} for value in ("abc", [])),
    {"qalora_group_size": 0},
    {"use_rslora": None},
    {"of_the_future": True},
    {"target_parameters": []},
    {"fan_in_fan_out": True},
]


@pytest.mark.filterwarnings("ignore")
def test_configs_are_refused_as_peft_refuses_them(tmp_path: Path) -> None:
    one = saved_adapter("plain", tmp_path)
    config = json.loads((one.folder / "adapter_config.json").read_text())
    base = base_model("llama")
    differing = []
    for change in CONFIGS:
        (one.folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        try:
            PeftModel.from_pretrained(copy.deepcopy(base), one.folder).eval()(IDS)
        except Exception:  # whatever PEFT's code runs into
            loads = False
        else:
            loads = True
        refused = [finding for finding in one.findings() if finding.refused and finding.rule in change]
        if loads != (refused == []):
            differing.append((change, loads))
    assert differing == []


def test_tasks_are_those_of_peft() -> None:
    from peft import TaskType

    assert {task.value for task in TaskType} == TASKS


def test_a_refusal_names_the_value_in_one_line(tmp_path: Path) -> None:
    assert next(refusals({"bias": "x" * 1000}))[1] == f"bias '{'x' * 79}…"
    assert list(refusals({})) == []
