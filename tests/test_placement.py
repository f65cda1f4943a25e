"""Which modules carry the adapter: projections of known role, the same ones in PEFT as in our own counting."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramem.errors import UnsupportedBaseModel
from loramem.models.adapters import AdaptedModel, serialize
from loramem.models.base_model import load_base_model
from loramem.models.module_names import adapted_paths
from loramem.models.placement import Placement, tensor_shapes

from .architectures import build_tiny, tiny_config

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
GATED = ("down_proj", "gate_proj", "up_proj")


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family))
    return model


@pytest.mark.parametrize(
    "family, modules, layers",
    [
        # Dense: names without path, as stores of earlier versions have them.
        ("llama", tuple(sorted(ATTENTION + GATED)), (0, 1)),
        ("gpt2", ("c_attn", "c_fc", "c_proj"), (0, 1)),
        ("opt", ("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"), (0, 1)),
        # Its linear modules are a subclass.
        ("falcon", ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"), (0, 1)),
        # PEFT reads the names of the MLP as the experts'.
        ("qwen3_moe", ATTENTION, (0, 1)),
        ("deepseek_v3", ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"), (0, 1)),
        # The shared expert, and not the router, which is a linear module that returns a tuple.
        ("llama4", tuple(sorted(ATTENTION + GATED)), (0, 1)),
        # Attention in every other layer alone; the recurrence has modules of the same names in olmo_hybrid.
        ("qwen3_next", ATTENTION, (1,)),
        ("olmo_hybrid", (*GATED[:2], *(f"self_attn.{name}" for name in ATTENTION), GATED[2]), (0, 1)),
        # Attention to an encoder has modules of the same names; PEFT loses the shared experts' when it loads.
        ("bart", ("fc1", "fc2", *(f"self_attn.{name}" for name in ("k_proj", "out_proj", "q_proj", "v_proj"))), (0, 1)),
        ("laguna", ("g_proj", "k_proj", *(f"mlp.{name}" for name in GATED), "o_proj", "q_proj", "v_proj"), (0, 1)),
    ],
)
def test_the_default_placement(family: str, modules: tuple[str, ...], layers: tuple[int, ...]) -> None:
    assert Placement.default(tiny(family)) == Placement(modules, layers)


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4", "laguna", "qwen3_next", "bailing_hybrid"])
def test_plain_peft_attaches_to_the_same_modules_and_loads_every_tensor(family: str, tmp_path: Path) -> None:
    folder = build_tiny(family, tmp_path / f"tiny-{family}")
    base = load_base_model(str(folder))
    placement = Placement.default(base.model)
    shapes = tensor_shapes(base.model, placement, 2)
    adapted = AdaptedModel(base)
    adapted.create("new", 2, placement, seed=0)
    assert adapted_paths(base.model, "new") == set(placement.paths(base.model))
    weights = adapted.weights("new")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert not any(part in name for name in weights for part in ("router", ".gate.", "experts.0"))
    for tensor in weights.values():
        nn.init.normal_(tensor.data)
    (tmp_path / "adapter").mkdir()
    for name, content in serialize(weights, base, placement).items():
        (tmp_path / "adapter" / name).write_bytes(content)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that it did not find
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    loaded = get_peft_model_state_dict(plain, save_embedding_layers=False)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_named_modules_that_peft_would_take_for_experts_are_refused() -> None:
    model = tiny("deepseek_v3")
    assert Placement.named(model, ["o_proj"], [1]) == Placement(("o_proj",), (1,))
    with pytest.raises(ValueError, match="PEFT cannot attach to model"):
        Placement.named(model, ["down_proj"], [1])
    with pytest.raises(ValueError, match="The linear modules are"):
        Placement.named(model, ["gate"], [1])


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_a_stored_placement_that_peft_attaches_elsewhere_is_refused_before_training(tmp_path: Path) -> None:
    base = load_base_model(str(build_tiny("qwen3_moe", tmp_path / "tiny")))
    adapted = AdaptedModel(base)
    with pytest.raises(UnsupportedBaseModel, match="PEFT attaches to"):
        adapted.create("new", 2, Placement((*ATTENTION, *GATED), (0, 1)), seed=0)


def test_a_rank_above_the_width_of_a_module_is_saved_as_it_is(tmp_path: Path) -> None:
    base = load_base_model(str(build_tiny("qwen2_moe", tmp_path / "tiny")))  # its shared expert is 16 wide
    adapted, placement = AdaptedModel(base), Placement.default(base.model)
    adapted.create("new", 24, placement, seed=0)
    assert json.loads(serialize(adapted.weights("new"), base, placement)["adapter_config.json"])["r"] == 24


def test_an_adapter_loads_after_the_only_one_was_removed(tmp_path: Path) -> None:
    # PEFT looks the active adapter up while it loads another, in architectures whose tensors it renames.
    base = load_base_model(str(build_tiny("qwen3_moe", tmp_path / "tiny")))
    adapted, placement = AdaptedModel(base), Placement.default(base.model)
    adapted.create("first", 3, placement, seed=0)
    adapted.create("first", 2, placement, seed=0)  # in the place of the one of this name
    (tmp_path / "adapter").mkdir()
    for name, content in serialize(adapted.weights("first"), base, placement).items():
        (tmp_path / "adapter" / name).write_bytes(content)
    adapted.remove("first")
    assert not any("lora" in name for name, _ in base.model.named_modules())
    adapted.load("second", tmp_path / "adapter")
    assert adapted.is_loaded("second")
