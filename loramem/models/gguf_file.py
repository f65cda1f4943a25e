"""A GGUF file as base model: what it holds, and what is refused because it would be read as something else.

transformers reads the configuration, the tokenizer and the weights of such a file, the weights dequantised. It leaves
out in silence what it has no place for: head sizes that are not the class's default, scaled or partial rotary
embeddings, biases, and the rule by which text is split before its merges apply. So all of that is looked at here.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from loramem.errors import BaseModelNotFound, LoramemError, UnsupportedBaseModel, reason

MISSING = "gguf, which is not installed: pip install 'loramem[llama-cpp]'"
ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Those whose tensors and adapters were compared with llama.cpp's, and what transformers calls them."""
MOST_LAYERS = 512
"""Of any model; names are made for so many."""
OTHERWISE_COMPUTED = ("rope.scaling.type", "expert_count", "attention.sliding_window", "attention.scale", "logit_scale")
"""Fields of an architecture of which transformers reads nothing, though the logits depend on them."""


def _bytes_of_words() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


SPLITS: Mapping[str, PreTokenizer] = {
    "gpt-2": _bytes_of_words(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes_of_words()]),
}
"""How text is split, by ``tokenizer.ggml.pre``, beside the names that transformers knows itself; of others it takes
GPT-2's, whatever they are (`llm_tokenizer_bpe` in llama.cpp's ``src/llama-vocab.cpp``)."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file without its values."""

    path: Path
    fields: Mapping[str, Any]
    """Values by key; of arrays their lengths."""
    tensors: Mapping[str, int]
    """Number of values by name."""
    is_quantised: bool
    """Whether any is kept in fewer than sixteen bits."""

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def of_architecture(self, name: str) -> Any:
        """A field of its architecture, such as "context_length"; None where it is not said."""
        return self.fields.get(f"{self.architecture}.{name}")

    @property
    def pre(self) -> str:
        """By which rule text is split before merges apply."""
        return str(self.fields.get("tokenizer.ggml.pre", "default"))

    @property
    def head_size(self) -> int:
        width, heads = int(self.of_architecture("embedding_length")), int(self.of_architecture("attention.head_count"))
        return int(self.of_architecture("attention.key_length") or width // heads)


def require_gguf(what: str) -> None:
    """
    Raises:
        LoramemError: The package `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise LoramemError(f"{what} needs {MISSING}")


def read_gguf(path: Path, name: str) -> GgufFile:
    """Fields and names of tensors of a GGUF file.

    Raises:
        BaseModelNotFound: It cannot be read as one.
    """
    try:
        fields, _ = read_gguf_metadata(str(path))
        header = GgufHeader.from_file(str(path))
        tensors = {info.name: math.prod(info.shape) for info in header.tensors}
        return GgufFile(path, fields, tensors, header.has_quantized_weights)
    except Exception as error:  # the parser raises whatever it meets
        raise BaseModelNotFound(
            f"{name!r} cannot be read as GGUF ({reason(error)}). Download or copy it again."
        ) from error


def check_gguf(path: Path, name: str) -> int:
    """Refuse a file that is no whole base model, or that transformers would read as another; returns its values.

    Raises:
        BaseModelNotFound: It is no GGUF file, or one of several parts.
        UnsupportedBaseModel: An adapter, or a model that llama.cpp computes otherwise than transformers would.
        LoramemError: The package `gguf` is not installed.
    """
    require_gguf(f"Reading {path.name}")
    file = read_gguf(path, name)
    if file.fields.get("general.type", "model") != "model":
        raise UnsupportedBaseModel(
            f"{name!r} is no base model but general.type {file.fields['general.type']!r}. Give the file of the model."
        )
    if int(file.fields.get("split.count", 1)) > 1:
        raise BaseModelNotFound(f"{name!r} is one of several parts. Join them with llama-gguf-split --merge.")
    if file.architecture not in ARCHITECTURES:
        raise _refused(
            name, f"is of architecture {file.architecture!r}", f"{', '.join(ARCHITECTURES)} were tried with llama.cpp"
        )
    if (tokenizer := file.fields.get("tokenizer.ggml.model")) != "gpt2":
        raise _refused(name, f"has a tokenizer {tokenizer!r}", "byte-level BPE ('gpt2') was compared with llama.cpp")
    if file.pre not in SPLITS and file.pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise _refused(
            name, f"splits text by tokenizer.ggml.pre {file.pre!r}", "transformers would split it by another rule"
        )
    for field in OTHERWISE_COMPUTED:
        if file.of_architecture(field) not in (None, 0, "none"):
            what = f"has {file.architecture}.{field} {file.of_architecture(field)!r}"
            raise _refused(name, what, "transformers does not read it from such a file")
    if "rope_freqs.weight" in file.tensors:
        raise _refused(name, "has rope_freqs.weight", "transformers does not scale rotary embeddings by such a file")
    sizes = {"attention.value_length", "rope.dimension_count"}
    for field in sorted(sizes):
        if file.of_architecture(field) not in (None, file.head_size):
            what = f"has heads of size {file.head_size} and {file.architecture}.{field} {file.of_architecture(field)}"
            raise _refused(name, what, "transformers has one size for all of these")
    return sum(file.tensors.values())


def check_tensors(path: Path, model: PreTrainedModel, name: str) -> None:
    """Refuse a file with tensors that the model has no place for: transformers would leave them out in silence.

    Args:
        model: As the file describes it, without weights.

    Raises:
        UnsupportedBaseModel: Names them.
    """
    file = read_gguf(path, name)
    known = {gguf_name(file.architecture, parameter) for parameter, _ in model.named_parameters()}
    if left := sorted(set(file.tensors) - known):
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise _refused(name, f"holds {left[0]}{more}", f"{type(model).__name__} has no place for it")


def complete(config: PreTrainedConfig, path: Path, name: str) -> PreTrainedConfig:
    """The configuration that transformers reads of a file, with the head size that the file says."""
    file = read_gguf(path, name)
    config.head_dim = file.head_size
    config.architectures = [ARCHITECTURES[file.architecture]]
    return config


def split_as_said(tokenizer: PreTrainedTokenizerBase, path: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers reads of a file, splitting text as the file says."""
    if (split := SPLITS.get(read_gguf(path, name).pre)) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


def gguf_name(architecture: str, parameter: str) -> str | None:
    """What llama.cpp calls a parameter, as transformers names it; None where it knows none.

    Example:
        >>> gguf_name("llama", "model.layers.5.mlp.down_proj.weight")
        'blk.5.ffn_down.weight'
    """
    found: str | None = _names(architecture).get_name(parameter, try_suffixes=(".weight", ".bias"))
    return found


@lru_cache(maxsize=len(ARCHITECTURES))
def _names(architecture: str) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == architecture)
    return get_tensor_name_map(arch, MOST_LAYERS)


def _refused(name: str, what: str, why: str) -> UnsupportedBaseModel:
    return UnsupportedBaseModel(
        f"{name!r} {what}; {why}. Use the model's safetensors, and serve the adapters on the file."
    )
