"""A saved adapter without its values: its config, and name, dtype and shape of its tensors. No torch."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loramem.errors import UnreadableAdapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAVED = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
"""How PEFT names the matrices of a linear module."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor without its values."""

    dtype: str
    """As safetensors writes it: "F32", "BF16"…"""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterHeader:
    """A saved adapter without its values."""

    name: str
    """The folder's last name: what servers call it."""
    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, TensorHeader]

    @property
    def rank(self) -> int:
        return int(self.config.get("r", 0))

    @property
    def modules(self) -> frozenset[str]:
        """Names without path of the modules that have matrices."""
        return frozenset(module.rpartition(".")[2] for module in self.matrices())

    def matrices(self) -> dict[str, dict[str, TensorHeader]]:
        """Headers of "A" and "B" by module path."""
        found: dict[str, dict[str, TensorHeader]] = {}
        for name, header in self.tensors.items():
            if match := SAVED.fullmatch(name):
                found.setdefault(match["module"], {})[match["matrix"]] = header
        return found


def read_header(folder: Path) -> AdapterHeader:
    """The header of a PEFT adapter's folder, written by loramem or not.

    Raises:
        UnreadableAdapter: No config or no safetensors weights there, or one that cannot be parsed.
    """
    try:
        if (folder / CONFIG).stat().st_size > MAX_CONFIG_BYTES:
            raise UnreadableAdapter(
                f"{folder / CONFIG} is larger than {MAX_CONFIG_BYTES:,} bytes: no adapter's config."
            )
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableAdapter(f"{folder} is no PEFT adapter: {CONFIG} cannot be read ({error}).") from None
    if not isinstance(config, dict) or not isinstance(config.get("r", 0), int):
        raise UnreadableAdapter(f"{folder} is no PEFT LoRA: {CONFIG} holds no rank.")
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            tensors = {
                name: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for name, part in sorted(slices.items())
            }
    except (OSError, SafetensorError) as error:
        raise UnreadableAdapter(
            f"{folder} has no {WEIGHTS} that can be read ({error}). Pickled weights are not looked at."
        ) from None
    return AdapterHeader(folder.resolve().name, config, tensors)


def disagreements(adapter: AdapterHeader) -> Iterator[str]:
    """What of an adapter's tensors is not as its config says, in words."""
    config, matrices = adapter.config, adapter.matrices()
    if strange := sorted(name for name in adapter.tensors if not SAVED.fullmatch(name)):
        yield f"tensor {strange[0]} is no LoRA matrix"
    if not matrices:
        yield "there are no LoRA matrices"
        return
    for module, pair in sorted(matrices.items()):
        if set(pair) != {"A", "B"}:
            yield f"{module} has lora_{next(iter(pair))} alone"
        elif any(len(header.shape) != 2 for header in pair.values()):
            yield f"{module} has matrices of shapes {pair['A'].shape} and {pair['B'].shape}"
        elif not config.get("rank_pattern") and (pair["A"].shape[0], pair["B"].shape[1]) != (adapter.rank,) * 2:
            yield f"{module} has rank {pair['A'].shape[0]} and {pair['B'].shape[1]}, the config says {adapter.rank}"
    asked = config.get("target_modules")
    if isinstance(asked, list):
        if extra := sorted(m for m in matrices if not any(m == name or m.endswith(f".{name}") for name in asked)):
            yield f"{extra[0]} is not in target_modules"
        if absent := sorted(name for name in asked if not any(m == name or m.endswith(f".{name}") for m in matrices)):
            yield f"target module {absent[0]} has no matrices"
    wanted = config.get("layers_to_transform")
    if wanted is not None:
        layers = {int(number) for m in matrices for number in re.findall(r"\.(\d+)\.", f".{m}.")[:1]}
        if set(map(str, layers)) != set(map(str, wanted if isinstance(wanted, list) else [wanted])):
            yield f"layers {sorted(layers)} have matrices, layers_to_transform is {wanted}"
