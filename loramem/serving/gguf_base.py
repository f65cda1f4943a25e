"""A base model's folder as one GGUF file, for a server of llama.cpp: the embedded one, which nobody else publishes so.

Rows of q and k move as in `loramem.serving.gguf_adapter`. The tokenizer goes along with the name of the rule by which
llama.cpp splits text, where that is one that gives the same ids (`loramem.models.gguf_file`).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

from loramem.errors import UnsupportedBaseModel
from loramem.models.gguf_file import SPLITS, gguf_name
from loramem.models.model_files import CONFIG, INDEX, WEIGHTS
from loramem.serving.gguf_adapter import Heads
from loramem.serving.targets import BASE_TYPES, BaseType

if TYPE_CHECKING:
    from gguf import GGUFWriter


def write_base(folder: Path, path: Path, kind: BaseType) -> None:
    """Write a new GGUF file of a base model of Llama's, Qwen2's or Qwen3's architecture.

    Raises:
        NotServable: Another architecture.
        UnsupportedBaseModel: Its tokenizer splits text by a rule of which llama.cpp's name is not known here.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    config = json.loads((folder / CONFIG).read_bytes())
    base = Heads.of(config)
    writer = GGUFWriter(path, base.architecture)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedBaseModel(f"{folder.name!r} scales its rotary embedding ({rope}), which is not written here.")
    writer.add_name(folder.name)
    writer.add_file_type(
        {"F32": LlamaFileType.ALL_F32, **{k: LlamaFileType[f"MOSTLY_{k}"] for k in BASE_TYPES[1:]}}[kind]
    )
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(base.kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, folder, config)
    matrix = GGMLQuantizationType[kind]
    tied = config.get("tie_word_embeddings", False)
    for key, values in _tensors(folder):
        if key == "lm_head.weight" and tied:
            continue
        if (name := gguf_name(base.architecture, key)) is None:
            raise UnsupportedBaseModel(f"{folder.name!r} holds {key}, for which llama.cpp has no name.")
        module = key.split(".")[-2]
        values = base.reordered(module, values)
        is_end = module in ("embed_tokens", "lm_head") and kind == "Q4_1"  # llama-quantize keeps more of the ends too
        raw = GGMLQuantizationType.F32 if values.ndim == 1 else GGMLQuantizationType.Q8_0 if is_end else matrix
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(values), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and values in float32 of every tensor."""
    files = {WEIGHTS}
    if not (folder / WEIGHTS).is_file():
        files = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                yield key, tensors.get_tensor(key).float().numpy()


def _add_tokenizer(writer: "GGUFWriter", folder: Path, config: Mapping[str, Any]) -> None:
    from gguf import TokenType

    described = json.loads((folder / "tokenizer.json").read_bytes())
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    merges = described["model"].get("merges")
    tokens = [f"[PAD{number}]" for number in range(config["vocab_size"])]
    types = [TokenType.UNUSED] * len(tokens)
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in described["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(described, folder.name))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    for field, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if isinstance(token_id := config.get(field), int):
            add(token_id)
    if (template := folder / "chat_template.jinja").is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _pre(described: Mapping[str, Any], name: str) -> str:
    """llama.cpp's name for the rule by which a tokenizer splits text before its merges apply."""
    found = described.get("pre_tokenizer"), described.get("normalizer"), described["model"]["type"]
    for pre, split in SPLITS.items():
        tokenizer = Tokenizer.from_str(json.dumps({**described, "pre_tokenizer": None}))
        tokenizer.pre_tokenizer = split
        if (json.loads(tokenizer.to_str())["pre_tokenizer"], None, "BPE") == found:
            return pre
    raise UnsupportedBaseModel(
        f"The tokenizer of {name!r} splits text by a rule of which llama.cpp's name is not known here. Convert it with "
        "llama.cpp's convert_hf_to_gguf.py."
    )
