"""A saved adapter without its values: its config, and name, dtype and shape of its tensors. No torch."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from loramem.errors import UnreadableAdapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAVED = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
"""How PEFT names the matrices of a linear module."""
PREFIX = "base_model.model."
PART = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_B\.bias"
    r"|lora_magnitude_vector|lora_diag|lora_velora_embed|lora_monteclora_sampler\.\w+|base_layer\.(weight|bias)"
    r"|token_adapter\.trainable_tokens_delta)"
)
"""How it names them and what its features put beside them."""
EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""As which integers a dtype is read, and the bits that are all set in NaN and Inf alone."""
NUMBERS_AT_ONCE = 1 << 22


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
    not_finite: tuple[str, ...] = ()
    """Names of the tensors that hold NaN or Inf."""

    @property
    def rank(self) -> int:
        return int(self.config.get("r", 0))

    @property
    def modules(self) -> frozenset[str]:
        """Names without path of the modules that have matrices."""
        return frozenset(module.rpartition(".")[2] for module in self.matrices())

    def parts(self) -> dict[str, dict[str, TensorHeader]]:
        """What PEFT saves of adapted modules, by module path, then by what it is: "lora_A.weight"…"""
        found: dict[str, dict[str, TensorHeader]] = {}
        for name, header in self.tensors.items():
            if match := PART.fullmatch(name):
                found.setdefault(match["module"], {})[match["part"]] = header
        return found

    def matrices(self) -> dict[str, dict[str, TensorHeader]]:
        """Headers of "A" and "B" by module path, of linear modules and embeddings."""
        letters = {"lora_A.weight": "A", "lora_embedding_A": "A", "lora_B.weight": "B", "lora_embedding_B": "B"}
        found = {
            module: {letters[part]: header for part, header in parts.items() if part in letters}
            for module, parts in self.parts().items()
        }
        return {module: pair for module, pair in found.items() if pair}


def read_header(folder: Path) -> AdapterHeader:
    """The header of a PEFT adapter's folder, written by loramem or not; values are looked through for NaN and Inf.

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
    if not isinstance(config, dict) or type(config.get("r", 0)) is not int:
        raise UnreadableAdapter(f"{folder} is no PEFT LoRA: {CONFIG} holds no rank.")
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            tensors = {
                name: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for name, part in sorted(slices.items())
            }
        not_finite = tuple(_not_finite(folder / WEIGHTS, tensors))
    except (OSError, SafetensorError) as error:
        raise UnreadableAdapter(
            f"{folder} has no {WEIGHTS} that can be read ({error}). Pickled weights are not looked at."
        ) from None
    return AdapterHeader(folder.resolve().name, config, tensors, not_finite)


def _not_finite(path: Path, tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    """Names of the tensors of a valid safetensors file that hold NaN or Inf; read as integers, bfloat16 too."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        described = json.loads(file.read(length))
        for name, header in tensors.items():
            if header.dtype not in EXPONENTS:
                continue
            integers, mask = EXPONENTS[header.dtype]
            start, end = described[name]["data_offsets"]
            file.seek(8 + length + start)
            left = (end - start) // np.dtype(integers).itemsize
            while left > 0:
                numbers = np.fromfile(file, integers, min(left, NUMBERS_AT_ONCE))
                if not len(numbers) or ((numbers & mask) == mask).any():
                    yield name
                    break
                left -= len(numbers)
