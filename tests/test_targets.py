"""What servers take of a LoRA adapter: every rule broken once, and what loramem writes passes all of them."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramem.errors import ArgumentError, UnreadableAdapter
from loramem.models.adapter_header import AdapterHeader, TensorHeader, read_header
from loramem.models.adapter_tensors import disagreements
from loramem.models.adapters import portable_config
from loramem.models.placement import Placement
from loramem.serving.guide import COMMANDS
from loramem.serving.rules import RULES_TOGETHER, VLLM_RANKS, Server, findings, findings_together, max_rank_option
from loramem.serving.targets import NAMES, TARGETS

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LAYERS = (4, 5)


def header(modules: tuple[str, ...] = (*ATTENTION, *MLP), rank: int = 8, **config: Any) -> AdapterHeader:
    """What `portable_config` gives for these modules, with some fields of the config changed."""
    tensors = {}
    for layer in LAYERS:
        for name in modules:
            path = f"base_model.model.model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            tensors[f"{path}.lora_A.weight"] = TensorHeader("F32", (rank, 64))
            tensors[f"{path}.lora_B.weight"] = TensorHeader("F32", (32, rank))
    written = portable_config(rank, Placement(modules, LAYERS), "someone/model", None)
    return AdapterHeader("a" * 32, {**written, **config}, tensors)


def refused(adapter: AdapterHeader, **server: Any) -> dict[str, list[str]]:
    """Rules that refuse an adapter, by target."""
    return {
        target: [finding.rule for finding in findings(adapter, Server(target, **server)) if finding.refused]
        for target in TARGETS
    }


def test_what_loramem_writes_is_taken_by_every_target() -> None:
    assert refused(header()) == {"peft": [], "vllm": [], "sglang": [], "llama.cpp": []}
    assert [findings_together([header()], Server(target)) for target in TARGETS] == [[], [], [], []]


@pytest.mark.parametrize(
    ("change", "targets"),
    [
        ({"bias": "lora_only"}, {"vllm", "sglang", "llama.cpp"}),
        ({"bias": "all"}, {"vllm", "sglang", "llama.cpp"}),
        (
            {"lora_bias": True},
            {"peft", "vllm", "sglang", "llama.cpp"},
        ),  # and no tensors of it are there, here and below
        ({"use_dora": True}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"use_rslora": True}, {"sglang", "llama.cpp"}),
        ({"modules_to_save": ["lm_head"]}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"trainable_token_indices": [1, 2]}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"rank_pattern": {"q_proj": 4}}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"rank_pattern": {"q_proj": 8}}, {"vllm", "sglang", "llama.cpp"}),
        ({"use_bdlora": {"nblocks": 2}}, {"vllm", "sglang", "llama.cpp"}),
        ({"use_qalora": True}, {"vllm", "sglang", "llama.cpp"}),
        ({"alpha_pattern": {"q_proj": 4}}, {"vllm", "sglang", "llama.cpp"}),
        ({"layer_replication": [[0, 2]]}, {"vllm", "sglang", "llama.cpp"}),
        ({"alora_invocation_tokens": [7]}, {"vllm", "sglang", "llama.cpp"}),
        ({"init_lora_weights": "pissa"}, {"vllm", "sglang", "llama.cpp"}),
        ({"init_lora_weights": "gaussian"}, set()),
        ({"init_lora_weights": "mica"}, set()),
        ({"init_lora_weights": "lora_ga"}, set()),
        ({"init_lora_weights": "nonsense"}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"fan_in_fan_out": True}, {"vllm", "sglang", "llama.cpp"}),
        ({"peft_type": "LOHA"}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"r": 0}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"r": 16}, {"peft", "vllm", "sglang", "llama.cpp"}),  # the tensors say 8
        ({"target_modules": "all-linear", "layers_to_transform": None}, set()),
        (
            {"target_modules": "all-linear"},
            {"peft", "vllm", "sglang", "llama.cpp"},
        ),  # layers_to_transform goes with a list alone
        ({"target_modules": r".*_proj", "layers_to_transform": None}, {"sglang"}),
        ({"target_modules": r".*\.[qv]_proj", "layers_to_transform": None}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"exclude_modules": ["q_proj"]}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"target_modules": ["q_proj"]}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"layers_to_transform": [4]}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"layers_to_transform": [[4, 5]]}, {"peft", "vllm", "sglang", "llama.cpp"}),
        ({"base_model_name_or_path": None}, {"vllm"}),
        ({"base_model_name_or_path": "loramem-tiny"}, {"vllm"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_each_field_is_refused_by_those_that_break_it(change: dict[str, Any], targets: set[str]) -> None:
    assert {target for target, rules in refused(header(**change)).items() if rules} == targets


ODD: tuple[Any, ...] = (None, True, -1, 1.5, "", "(", "x" * 9, [], [[]], [None], [{}], {}, {"(": None}, {"x": [1, "y"]})
FIELDS = """peft_type bias lora_alpha lora_dropout target_modules exclude_modules target_parameters layers_to_transform
    layers_pattern layer_replication rank_pattern alpha_pattern init_lora_weights loftq_config lora_bias use_dora
    use_rslora modules_to_save trainable_token_indices alora_invocation_tokens use_qalora use_bdlora arrow_config
    kasa_config velora_config monteclora_config eva_config megatron_config fan_in_fan_out ensure_weight_tying
    base_model_name_or_path revision task_type""".split()


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_that_holds_anything_ends_in_findings(field: str) -> None:
    for value in ODD:
        one = header(**{field: value, "ensure_weight_tying": True})
        for target in TARGETS:
            for finding in [*findings(one, Server(target)), *findings_together([one], Server(target))]:
                assert str(finding).isprintable()


def test_a_refusal_says_the_value_the_reason_and_the_remedy() -> None:
    (finding,) = findings(header(use_rslora=True), Server("sglang"))
    assert str(finding) == (
        "use_rslora True: SGLang scales by alpha/r whatever this says, and silently serves another function. Set it to "
        "false and lora_alpha to alpha·√r, which is the same function."
    )


def test_ranks_are_measured_against_what_the_server_may_be_started_with() -> None:
    assert [max_rank_option(rank) for rank in (1, 2, 16, 17, 300, 512, 513)] == [1, 8, 16, 32, 320, 512, None]
    assert refused(header(rank=513)) == {"peft": [], "vllm": ["rank"], "sglang": [], "llama.cpp": []}
    assert refused(header(rank=24), max_rank=16) == {"peft": [], "vllm": ["rank"], "sglang": ["rank"], "llama.cpp": []}
    (vllm,) = findings(header(rank=24), Server("vllm", max_rank=16))
    (sglang,) = findings(header(rank=24), Server("sglang", max_rank=16))
    assert vllm.remedy == "Start it with --max-lora-rank 32."
    assert sglang.remedy == "Start it with --max-lora-rank 24."
    assert refused(header(rank=24), max_rank=32) == {"peft": [], "vllm": [], "sglang": [], "llama.cpp": []}


def test_a_rank_above_vllms_default_is_a_note_that_names_the_option() -> None:
    (note,) = findings_together([header(rank=24)], Server("vllm"))
    assert (note.refused, note.remedy) == (False, "Start it with --max-lora-rank 32.")
    (wrong,) = findings_together([header(rank=24)], Server("vllm", max_rank=24))
    assert wrong.refused and wrong.remedy == "Use 32."
    assert 24 not in VLLM_RANKS


@pytest.mark.parametrize(
    ("modules", "targets"),
    [
        (("q_proj", "v_proj"), set()),
        (("down_proj",), set()),
        (("gate_proj",), set()),
        (("up_proj", "down_proj"), {"sglang"}),
        (("k_proj", "v_proj"), {"sglang"}),
        (("q_proj",), {"sglang"}),
        (("query_key_value",), {"sglang", "llama.cpp"}),
        (("embed_tokens", "q_proj", "v_proj"), {"vllm", "sglang", "llama.cpp"}),
        (("lm_head",), {"vllm", "sglang", "llama.cpp"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_modules_are_those_that_the_servers_layers_know(modules: tuple[str, ...], targets: set[str]) -> None:
    assert {target for target, rules in refused(header(modules)).items() if rules} == targets


def test_an_architecture_without_lora_layers_is_refused() -> None:
    assert refused(header(), architecture="GPT2LMHeadModel") == {
        "peft": [],
        "vllm": ["architecture"],
        "sglang": ["architecture"],
        "llama.cpp": ["architecture"],
    }
    assert refused(header(), architecture="GPTNeoXForCausalLM")["vllm"] == ["architecture"]
    assert refused(header(), architecture="Qwen3ForCausalLM") == {"peft": [], "vllm": [], "sglang": [], "llama.cpp": []}


def test_vllm_wants_the_name_it_is_started_with() -> None:
    assert refused(header(), base_is_local=True) == {"peft": [], "vllm": ["base"], "sglang": [], "llama.cpp": []}
    assert refused(header(), base_is_local=True, base_name="someone/model")["vllm"] == []
    assert refused(header(), base_name="/models/model")["vllm"] == ["base"]


def test_tensors_that_contradict_the_config_are_refused_by_all() -> None:
    good = header(("q_proj", "v_proj"))
    first = next(iter(good.tensors))
    changes: list[tuple[dict[str, TensorHeader], str]] = [
        ({name: one for name, one in good.tensors.items() if name != first}, "alone"),
        ({**good.tensors, first: TensorHeader("F32", (4, 64))}, "rank 4"),
        ({**good.tensors, first: TensorHeader("F32", (8, 64, 1))}, "shapes"),
        ({**good.tensors, "base_model.model.lm_head.weight": TensorHeader("F32", (9, 9))}, "no LoRA matrix"),
        ({}, "no LoRA matrices"),
    ]
    for tensors, words in changes:
        bad = replace(good, tensors=tensors)
        assert any(words in problem for problem in disagreements(bad)), words
        assert all("tensors" in rules for rules in refused(bad).values())
    odd = replace(good, tensors={**good.tensors, first: TensorHeader("I8", (8, 64))})
    assert all(rules == ["dtype"] for rules in refused(odd).values())


def test_several_adapters_together_say_how_the_server_must_be_started() -> None:
    adapters = [header(("q_proj", "v_proj"), rank=4), header(("down_proj",), rank=24, revision="abc")]
    vllm = {note.rule: note.remedy for note in findings_together(adapters, Server("vllm"))}
    sglang = {note.rule: note.remedy for note in findings_together(adapters * 5, Server("sglang"))}
    assert vllm == {
        "rank": "Start it with --max-lora-rank 32.",
        "count": "Start it with --max-loras as memory allows.",
        "revision": "Start it with --revision abc.",
    }
    assert sglang == {
        "modules": "Start it with --lora-target-modules down_proj q_proj v_proj --max-lora-rank 24.",
        "count": "Start it with --max-loras-per-batch as memory allows.",
        "revision": "Start it with --revision abc.",
    }


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ArgumentError, match="peft, vllm, sglang"):
        Server("ollama")


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        (None, b"", "cannot be read"),
        (b"not json", b"", "cannot be read"),
        (b"[]", b"", "no rank"),
        (b'{"r": "8"}', b"", "no rank"),
        (b" " * (1 << 20) + b"{}", b"", "1,048,576 bytes"),
        (b"[" * 100_000, b"", "cannot be read"),
        (b'{"r": 8}', None, "Pickled"),
        (b'{"r": 8}', b"", "can be read"),
        (b'{"r": 8}', struct.pack("<Q", 1 << 40) + b"{}", "can be read"),
        (b'{"r": 8}', struct.pack("<Q", 2) + b"[]", "can be read"),
    ],
    ids=range(10),
)
def test_a_folder_that_is_no_adapter_is_one_typed_error(
    config: bytes | None, weights: bytes | None, words: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_bytes(config)
    if weights is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(UnreadableAdapter, match=words):
        read_header(tmp_path)


def test_a_header_is_read_without_the_values(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.4.self_attn.q_proj.lora_A.weight"
    index = json.dumps({name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(index)) + index + bytes(12))
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    read = read_header(tmp_path)
    assert (read.name, read.rank, read.modules) == (tmp_path.name, 2, frozenset({"q_proj"}))
    assert dict(read.tensors) == {name: TensorHeader("BF16", (2, 3))}


def test_every_target_has_a_name_rules_and_a_guide_of_its_own() -> None:
    assert set(TARGETS) == set(NAMES) == set(RULES_TOGETHER) == set(COMMANDS)
