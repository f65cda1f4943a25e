"""Which tensors a LoRA's config implies, and what of a saved adapter is otherwise, in words. No torch, no base model.

Every feature of PEFT's LoRA that saves something has its rule here: pairs of matrices, and what stands beside them.
Configs come through `loramem.models.adapter_config.accepted`, so that every field is of its type.
Read in PEFT 0.21 (``peft/tuners/lora``, ``peft/tuners/tuners_utils.py``, ``peft/utils/save_and_load.py``), where
loading passes in silence over what is missing or too much; compared with what it does in
``tests/test_peft_adapters.py``.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loramem.models.adapter_config import matches
from loramem.models.adapter_header import PREFIX, AdapterHeader, TensorHeader

EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"})
"""Last names of the modules that turn tokens into vectors and back."""
LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
BESIDE = {
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "use_dora",
    "lora_diag": "kasa_config",
    "lora_velora_embed": "velora_config",
    "lora_monteclora_sampler": "monteclora_config",
}
"""What stands beside a pair, and the field that puts it there."""
CLASSIFIERS = frozenset({"classifier", "score"})
"""PEFT adds both to modules_to_save of a classifier, of which a model has one."""

Parts = Mapping[str, TensorHeader]


def disagreements(adapter: AdapterHeader) -> Iterator[str]:
    """What of an adapter's tensors is not as its config says: too much, half there, or of a wrong shape."""
    config, modules = adapter.config, adapter.parts()
    known = {f"{PREFIX}{module}.{part}" for module, parts in modules.items() for part in parts}
    strange = [name for name in adapter.tensors if name not in known and not _is_saved_whole(config, name)]
    for module, parts in modules.items():
        strange += [f"{PREFIX}{module}.{part}" for part in parts if not _is_implied(config, module, part, parts)]
    yield from _first(f"tensor {name} is no LoRA matrix, and no field of the config implies it" for name in strange)
    pairs = {module: pair for module, parts in modules.items() if (pair := pair_of(parts))}
    if not pairs:
        yield "there are no LoRA matrices"
    for check in (_halves, _shapes, _ranks, _beside):
        yield from _first(what for module in pairs for what in check(config, module, modules[module]))
    yield from _first(f"{module} is not in target_modules" for module in pairs if not _is_adapted(config, module))
    yield from _first(_tokens(config, modules))
    yield from _first(_whole(config, adapter.tensors))


def absences(adapter: AdapterHeader) -> Iterator[str]:
    """What a config names and no tensor is of: lost, or nothing that the base model has; only that model can tell."""
    config, pairs = adapter.config, [module for module, parts in adapter.parts().items() if pair_of(parts)]
    asked, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if isinstance(asked, list):
        for name in asked:
            if any(_is_named(module, name) for module in pairs) or _is_within_whole(adapter, name):
                continue
            if isinstance(excluded, str) or any(_is_named(name, one) or _is_named(one, name) for one in excluded):
                continue
            yield f"target module {name} has no matrices"
    bare = [_without_nesting(module) for module in pairs]
    for name in config.get("target_parameters") or []:
        if not any(_is_named(module, str(name).rpartition(".")[0]) for module in bare):
            yield f"target parameter {name} has no matrices"
    wanted = config.get("layers_to_transform")
    if wanted not in (None, []) and not excluded:
        layers = {number for module in pairs if (number := _layer(config, module)) is not None}
        if set(map(str, layers)) != set(map(str, wanted if isinstance(wanted, list) else [wanted])):
            yield f"layers {sorted(layers)} have matrices, layers_to_transform is {wanted}"


def pair_of(parts: Iterable[str]) -> tuple[str, str] | None:
    """Names of the two matrices of a module that has at least one of them."""
    return next((pair for pair in (LINEAR, EMBEDDING) if not set(pair).isdisjoint(parts)), None)


# What a config implies


def _is_implied(config: Mapping[str, Any], module: str, part: str, parts: Parts) -> bool:
    """Whether a config puts this part there."""
    pair = pair_of(parts)
    if part == "token_adapter.trainable_tokens_delta":
        tokens = config.get("trainable_token_indices")
        return any(map(module.endswith, tokens)) if isinstance(tokens, dict) else tokens is not None
    if pair is None:  # the base model's own biases under bias="all", and what modules_to_save holds
        return _is_saved_whole(config, f"{PREFIX}{module}.{part}")
    if part == "base_layer.bias":
        return str(config.get("bias")) == "all" or str(config.get("bias")).endswith("_only")
    if part == "base_layer.weight":  # PEFT saves an adapted embedding's own weight with it
        return module.rpartition(".")[2] in EMBEDDINGS
    return part in pair or bool(config.get(BESIDE.get(part.partition(".")[0], BESIDE.get(part, "")), False))


def _is_saved_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether modules_to_save or bias="all" puts a tensor of the base model there."""
    if config.get("bias") == "all" and name.endswith(".bias"):
        return True
    names = [name for name in config.get("modules_to_save") or [] if isinstance(name, str)]
    if config.get("ensure_weight_tying") and any(name.rpartition(".")[2] in EMBEDDINGS for name in names):
        names += EMBEDDINGS
    path = name.removeprefix(PREFIX).split(".")
    return any(".".join(path[:end]).endswith(tuple(names)) for end in range(1, len(path))) if names else False


def _is_adapted(config: Mapping[str, Any], module: str) -> bool:
    """Whether target_modules or target_parameters name a module, and nothing takes it out again."""
    bare, last = _without_nesting(module), module.rpartition(".")[2]
    if any(_is_named(bare, str(name).rpartition(".")[0]) for name in config.get("target_parameters") or []):
        return True
    asked, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if isinstance(excluded, str) and matches(excluded, module):
        return False
    if not isinstance(excluded, str) and any(_is_named(module, name) for name in excluded):
        return False
    if not isinstance(asked, list | str):
        return asked is None and not config.get("target_parameters")  # by the base model's kind, which PEFT knows
    if config.get("ensure_weight_tying") and last in EMBEDDINGS:
        return True
    if isinstance(asked, str):
        return last not in EMBEDDINGS if asked.lower() == "all-linear" else matches(asked, module)
    wanted = config.get("layers_to_transform")
    if not any(_is_named(module, name) for name in asked):
        return False
    if wanted in (None, []):
        return True
    return _layer(config, module) in (wanted if isinstance(wanted, list) else [wanted])


def _rank(config: Mapping[str, Any], path: str) -> int:
    """The rank that a config gives a module, or a parameter by its path."""
    patterns = config.get("rank_pattern")
    for pattern, rank in patterns.items() if isinstance(patterns, dict) else ():
        if matches(rf"(.*\.)?({pattern})$", path) and isinstance(rank, int):
            return rank
    return int(config.get("r", 8))


def _layer(config: Mapping[str, Any], module: str) -> int | None:
    """The layer that a module is of: the first number in its path, or the one after layers_pattern."""
    named = config.get("layers_pattern") or []
    for pattern in [named] if isinstance(named, str) else named:
        if found := re.match(rf"(?:^|.*?\.){re.escape(str(pattern))}\.(\d+)\.", module):
            return int(found[1])
    found = None if named else re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return int(found[1]) if found else None


# What is wrong with a module


def _halves(config: Mapping[str, Any], module: str, parts: Parts) -> Iterator[str]:
    pair = pair_of(parts) or LINEAR
    if len(there := [part for part in pair if part in parts]) == 1:
        yield f"{module} has {there[0].removesuffix('.weight')} alone"


def _shapes(config: Mapping[str, Any], module: str, parts: Parts) -> Iterator[str]:
    if (shapes := _whole_pair(parts)) and not _is_pair(*shapes):
        yield f"{module} has matrices of shapes {shapes[0]} and {shapes[1]}"


def _ranks(config: Mapping[str, Any], module: str, parts: Parts) -> Iterator[str]:
    if not (shapes := _whole_pair(parts)) or not _is_pair(*shapes):
        return
    found = (shapes[0][0], shapes[1][1])
    bare = _without_nesting(module)
    experts = [name for name in config.get("target_parameters") or [] if _is_named(bare, str(name).rpartition(".")[0])]
    if experts:  # one LoRA for each expert, side by side
        ranks = [_rank(config, f"{bare}.{str(name).rpartition('.')[2]}") for name in experts]
        if found[0] != found[1] or not any(rank > 0 and found[0] % rank == 0 for rank in ranks):
            yield f"{module} has rank {found[0]} and {found[1]}, no multiple of the config's {ranks[0]}"
        return
    rank = _rank(config, module)
    if found != (rank, _of_blocks(config, module, rank)):
        yield f"{module} has rank {found[0]} and {found[1]}, the config says {rank}"


def _beside(config: Mapping[str, Any], module: str, parts: Parts) -> Iterator[str]:
    """What a feature puts beside every pair: there, and as long as the pair says."""
    if not (shapes := _whole_pair(parts)) or not _is_pair(*shapes):
        return
    (rank, inputs), (outputs, _) = shapes[0][:2], shapes[1][:2]
    is_linear = pair_of(parts) == LINEAR
    for part, field in BESIDE.items():
        is_there = any(name == part or name.startswith(f"{part}.") for name in parts)
        if config.get(field) and not is_there and (is_linear or field == "use_dora"):
            yield f"{module} has no {part}, which {field} implies"
    lengths = {"lora_B.bias": outputs, "lora_magnitude_vector": outputs, "lora_diag": rank, "base_layer.bias": outputs}
    for part, length in lengths.items():
        if part in parts and math.prod(parts[part].shape) != length:
            yield f"{module} has {part} of shape {parts[part].shape}, its matrices imply {length:,} numbers"
    weight = parts.get("base_layer.weight")
    if weight is not None and weight.shape != (expected := (outputs, inputs) if is_linear else (inputs, outputs)):
        yield f"{module} has base_layer.weight of shape {weight.shape}, its matrices imply {expected}"


def _tokens(config: Mapping[str, Any], modules: Mapping[str, Parts]) -> Iterator[str]:
    """A row for each trainable token; tied embeddings share the rows of one of them."""
    tokens, part = config.get("trainable_token_indices"), "token_adapter.trainable_tokens_delta"
    found = {module: parts[part] for module, parts in modules.items() if part in parts}
    if tokens and not found:
        yield f"there is no {part}, which trainable_token_indices implies"
    if isinstance(tokens, list) and len(found) > 1:
        yield f"{len(found)} modules have {part}, trainable_token_indices is of one"
    for module, header in found.items():
        names = [name for name in tokens if module.endswith(name)] if isinstance(tokens, dict) else []
        wanted: Any = tokens[names[0]] if isinstance(tokens, dict) and names else tokens
        if isinstance(wanted, list) and (len(header.shape) != 2 or header.shape[0] != len(wanted)):
            yield f"{module} has {part} of shape {header.shape}, trainable_token_indices is of {len(wanted)} tokens"
    for name in tokens if isinstance(tokens, dict) and found else ():
        is_tied = name.rpartition(".")[2] in EMBEDDINGS and any(m.rpartition(".")[2] in EMBEDDINGS for m in found)
        if not is_tied and not any(module.endswith(name) for module in found):
            yield f"{name} has no {part}, which trainable_token_indices implies"


def _whole(config: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[str]:
    """Something of every module to save."""
    paths = [name.removeprefix(PREFIX).split(".") for name in tensors]
    prefixes = {".".join(path[:end]) for path in paths for end in range(1, len(path))}
    names = [name for name in config.get("modules_to_save") or [] if isinstance(name, str)]
    found = {name for name in names if any(prefix.endswith(name) for prefix in prefixes)}
    for name in names:
        if name not in found and not (name in CLASSIFIERS and found & CLASSIFIERS):
            yield f"module {name} is not there, which modules_to_save implies"


def _is_within_whole(adapter: AdapterHeader, name: str) -> bool:
    """Whether a target module lies within one that is saved whole, where PEFT adapts nothing."""
    paths = (path for path in adapter.tensors if _is_saved_whole(adapter.config, path))
    return any(f".{name}." in path for path in paths)


# Shapes and names


def _whole_pair(parts: Parts) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shapes of both matrices, if both are there."""
    pair = pair_of(parts)
    return (parts[pair[0]].shape, parts[pair[1]].shape) if pair and set(pair) <= set(parts) else None


def _is_pair(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether A and B are matrices, or convolutions of which B's is of size 1."""
    return len(first) == len(second) >= 2 and all(size == 1 for size in second[2:])


def _of_blocks(config: Mapping[str, Any], module: str, rank: int) -> int:
    """Columns of B, which has a block of them on its diagonal if use_bdlora says so."""
    blocks = config.get("use_bdlora")
    if isinstance(blocks, dict) and any(str(name) in module for name in blocks.get("target_modules_bd_b") or []):
        return rank // max(1, int(blocks.get("nblocks", 1)))
    return rank


def _is_named(module: str, name: object) -> bool:
    return module == name or module.endswith(f".{name}")


def _without_nesting(module: str) -> str:
    """The module whose parameters have several LoRAs, one around the other."""
    return module.replace(".base_layer", "")


def _first(found: Iterable[str]) -> Iterator[str]:
    """The first of many alike, and how many there are."""
    several = list(found)
    if several:
        yield several[0] if len(several) == 1 else f"{several[0]} ({len(several) - 1} more like this)"
