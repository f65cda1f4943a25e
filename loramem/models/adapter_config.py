"""What PEFT refuses of an adapter_config.json, before any tensor is looked at; rules without torch.

Read in PEFT 0.21 (``peft/tuners/lora/config.py``, ``layer.py``, ``peft/tuners/tuners_utils.py``) and compared with what
it does: ``tests/test_peft_adapters.py``. A field that PEFT does not know is none of its refusals: it leaves it out.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
INITS = frozenset({"eva", "orthogonal", "lora_ga"})
"""Ways of initialising that PEFT knows in these letters alone."""
INITS_OF_ANY_CASE = frozenset({"gaussian", "olora", "mica"})
TASKS = frozenset({"SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})
VARIANTS = tuple(
    "use_dora arrow_config use_bdlora alora_invocation_tokens velora_config monteclora_config kasa_config".split()
)
"""Fields that each replace how a LoRA layer computes, so that PEFT takes one of them."""
PARTS = tuple(
    "velora_config kasa_config eva_config corda_config lora_ga_config arrow_config use_bdlora monteclora_config".split()
)
"""Fields that hold a configuration of their own."""
RANGES: Mapping[tuple[str, str], tuple[Callable[[Any], bool], str]] = {
    ("velora_config", "num_groups"): (lambda value: value > 0, "above 0"),
    ("velora_config", "scale"): (lambda value: value > 0, "above 0"),
    ("kasa_config", "beta"): (lambda value: value >= 0, "0 or more"),
    ("kasa_config", "gamma"): (lambda value: value >= 0, "0 or more"),
    ("eva_config", "rho"): (lambda value: value >= 1, "1 or more"),
    ("eva_config", "tau"): (lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("monteclora_config", "num_samples"): (lambda value: value > 0, "above 0"),
    ("monteclora_config", "dirichlet_prior"): (lambda value: value > 0, "above 0"),
    ("monteclora_config", "buffer_size"): (lambda value: value > 0, "above 0"),
}
PLACING = frozenset(
    "target_modules exclude_modules target_parameters layers_to_transform layers_pattern layer_replication rank_pattern"
    " modules_to_save trainable_token_indices".split()
)
"""Fields that say where which tensors are, to every loader."""
SHOWN_CHARACTERS = 80
"""Of a refused value: a config may hold anything."""


def refusals(config: Config) -> Iterator[tuple[str, str, str]]:
    """The fields that PEFT refuses: name, name and value in words, reason."""
    for field, why in _refused(config):
        value = repr(config.get(field))
        yield field, f"{field} {value[:SHOWN_CHARACTERS]}{'…' if len(value) > SHOWN_CHARACTERS else ''}", why


def accepted(config: Config) -> dict[str, Any]:
    """The config without the fields that PEFT refuses, so that each that is left is of its type."""
    refused = {field for field, _ in _refused(config)}
    return {field: value for field, value in config.items() if field not in refused}


def matches(pattern: str, text: str) -> bool:
    """Whether a regular expression of a config matches a whole module path; one that is none does, and is refused."""
    try:
        return re.fullmatch(pattern, text) is not None
    except (re.error, RecursionError):
        return True


def _refused(config: Config) -> Iterator[tuple[str, str]]:
    bias, task = config.get("bias", "none"), config.get("task_type")
    if bias not in ("none", "all") and not (isinstance(bias, str) and bias.endswith("_only")):
        yield "bias", "it is none, all or lora_only"
    if task is not None and not (isinstance(task, str) and task in TASKS):
        yield "task_type", f"tasks are {', '.join(sorted(TASKS))}"
    if not _is_number(config.get("lora_alpha", 8)):
        yield "lora_alpha", "it is a number"
    dropout = config.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout <= 1:
        yield "lora_dropout", "it is a share from 0 to 1"
    yield from _modules(config)
    yield from _patterns(config)
    yield from _initialization(config)
    yield from _extra(config)
    yield from _variants(config)


def _modules(config: Config) -> Iterator[tuple[str, str]]:
    targets, parameters = config.get("target_modules"), config.get("target_parameters")
    for field in ("target_modules", "exclude_modules"):
        value = config.get(field)
        if isinstance(value, str) and not _is_pattern(value):
            yield field, "it is no regular expression"
        elif not (value is None or isinstance(value, str) or _is_list(value, str)):
            yield field, "it is a list of names, or a regular expression"
    if targets == [] and not parameters:
        yield "target_modules", "there is nothing to adapt"
    if not (parameters is None or _is_list(parameters, str)):
        yield "target_parameters", "it is a list of names"
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if not (layers is None or _is_whole(layers) or _is_list(layers, int)):
        yield "layers_to_transform", "it is a layer or a list of layers"
    elif isinstance(targets, str) and layers is not None:
        yield "layers_to_transform", "a pattern as target_modules names the layers itself"
    if isinstance(targets, str) and pattern is not None:
        yield "layers_pattern", "a pattern as target_modules names the layers itself"
    elif not (pattern is None or isinstance(pattern, str) or _is_list(pattern, str)):
        yield "layers_pattern", "it is a name or a list of names"
    elif pattern and layers is None:
        yield "layers_pattern", "it needs layers_to_transform"
    copies = config.get("layer_replication")
    if copies and not (isinstance(copies, list) and all(_is_list(one, int) and len(one) == 2 for one in copies)):
        yield "layer_replication", "it is a list of pairs of layers"


def _patterns(config: Config) -> Iterator[tuple[str, str]]:
    for field, takes in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        value = config.get(field, {})
        if not isinstance(value, dict):
            yield field, "it gives a number for each pattern, and is {} without any"
        elif not all(map(_is_pattern, value)):
            yield field, "one of its patterns is no regular expression"
        elif not all(map(takes, value.values())):
            yield field, "one of its values is none"


def _initialization(config: Config) -> Iterator[tuple[str, str]]:
    init = config.get("init_lora_weights", True)
    if config.get("lora_bias"):
        if init not in (True, False):
            yield "init_lora_weights", "lora_bias goes with true or false"
        if config.get("use_dora"):
            yield "lora_bias", "it does not go with DoRA"
    if not init or init is True:
        return
    if not isinstance(init, str):
        yield "init_lora_weights", "there is no such way"
    elif init.startswith("corda"):
        yield "init_lora_weights", "CorDA starts from statistics that no saved adapter holds"
    elif init == "loftq":
        if not isinstance(given := config.get("loftq_config"), dict) or not {"loftq_bits", "loftq_iter"} <= set(given):
            yield "init_lora_weights", "it needs loftq_config with loftq_bits and loftq_iter"
    elif init not in INITS and init.lower() not in INITS_OF_ANY_CASE and not re.fullmatch(r"pissa(_niter_\d+)?", init):
        yield "init_lora_weights", "there is no such way"


def _extra(config: Config) -> Iterator[tuple[str, str]]:
    if not ((whole := config.get("modules_to_save")) is None or _is_list(whole, str)):
        yield "modules_to_save", "it is a list of names"
    tokens = config.get("trainable_token_indices")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
    if not all(_is_list(one, int) for one in lists):
        yield "trainable_token_indices", "it is a list of token ids, or one for each module"


def _variants(config: Config) -> Iterator[tuple[str, str]]:
    for field in PARTS:
        if not ((value := config.get(field)) is None or isinstance(value, dict)):
            yield field, "it is an object, or null"
    for (field, name), (within, words) in RANGES.items():
        part = config.get(field)
        if isinstance(part, dict) and name in part and not (_is_number(part[name]) and within(part[name])):
            yield field, f"{name} is {words}"
    if isinstance(blocks := config.get("use_bdlora"), dict):
        if not _is_rank(blocks.get("nblocks", 1)):
            yield "use_bdlora", "nblocks is a whole number above 0"
        names = [blocks.get(f"target_modules_bd_{side}") or [] for side in "ab"]
        if not all(_is_list(one, str) for one in names) or set(names[0]) & set(names[1]):
            yield "use_bdlora", "it names the modules of A and of B in two lists, none in both"
    if config.get("arrow_config") is not None:
        yield "arrow_config", "a router among adapters is put together in memory, and no folder gives it back"
    if config.get("megatron_config"):
        yield "megatron_config", "it needs Megatron's layers, which models of transformers do not have"
    if not ((tokens := config.get("alora_invocation_tokens")) is None or _is_list(tokens, int)):
        yield "alora_invocation_tokens", "it is a list of token ids"
    used = [field for field in VARIANTS if config.get(field)]
    used += ["init_lora_weights"] if config.get("init_lora_weights") == "mica" else []
    if len(used) > 1:
        yield used[1], f"it does not go with {used[0]}"
    if config.get("target_parameters") and not config.get("target_modules"):
        for field in ("lora_dropout", "lora_bias", "fan_in_fan_out", *VARIANTS):
            if config.get(field):
                yield field, "it does not go with target_parameters"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError):
        return False
    return True
