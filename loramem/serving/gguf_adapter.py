"""A LoRA adapter as llama.cpp loads it: one GGUF file, each matrix under llama.cpp's name for the module.

llama.cpp keeps the rows of q and k of Llama in another order, as its rotary embedding pairs neighbours where
transformers pairs halves; so the rows of B for these modules move with them (`LlamaModel.permute` in its
``convert_hf_to_gguf.py``). An adapter whose rows did not loads without complaint and answers nonsense.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loramem.errors import NotServable
from loramem.models.adapter_header import SAVED
from loramem.models.gguf_file import gguf_name
from loramem.serving.targets import LLAMA_CPP

ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What llama.cpp calls architectures of transformers, by ``model_type``: those that are converted and tested."""
PERMUTED = frozenset({"llama"})
"""llama.cpp's architectures whose rotary embedding pairs neighbours."""


@dataclass(frozen=True)
class Heads:
    """What of a base model's configuration an adapter's conversion depends on."""

    architecture: str
    """llama.cpp's name."""
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Heads":
        """Of a configuration as config.json has it.

        Raises:
            NotServable: llama.cpp's adapters of this architecture were never tried.
        """
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            line = f"base model of type {kind!r}; converted are {', '.join(ARCHITECTURES)}. Serve it with PEFT or vLLM."
            raise NotServable(f"Not deployed: {line}", target=LLAMA_CPP, findings=[line])
        heads = int(config["num_attention_heads"])
        return cls(ARCHITECTURES[kind], heads, int(config.get("num_key_value_heads") or heads))

    def reordered(self, module: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows (out, …) of a module's weight in llama.cpp's order: of each head's, the first half and the second half
        alternate.

        Args:
            module: Its name without path, such as "q_proj".
        """
        if self.architecture not in PERMUTED or module not in ("q_proj", "k_proj"):
            return rows
        heads = self.heads if module == "q_proj" else self.kv_heads
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)


def write_adapter(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Heads, base_name: str, dtype: str
) -> None:
    """Write a new GGUF file of a plain LoRA.

    Args:
        config: adapter_config.json.
        tensors: A of shape (r, inputs) and B of shape (outputs, r), by PEFT name.
        base_name: A note for whoever looks at the file; llama.cpp does not compare it.
        dtype: "float32" or "float16".
    """
    from gguf import GGUFType, GGUFWriter, Keys

    writer = GGUFWriter(path, base.architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    writer.add_string("general.base_model.0.name", base_name)
    for name, values in _named(tensors, base):
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(tensors: Mapping[str, Tensor], base: Heads) -> Iterator[tuple[str, NDArray[Any]]]:
    """Matrices by llama.cpp's names."""
    for key, tensor in sorted(tensors.items()):
        match = SAVED.fullmatch(key)
        name = match and gguf_name(base.architecture, f"{match['module']}.weight")
        if not match or not name:
            line = f"tensor {key}: llama.cpp has no name for it. Serve it with PEFT."
            raise NotServable(f"Not deployed: {line}", target=LLAMA_CPP, findings=[line])
        values = tensor.float().numpy()
        if match["matrix"] == "B":
            values = base.reordered(match["module"].rpartition(".")[2], values)
        yield f"{name}.lora_{match['matrix'].lower()}", values
