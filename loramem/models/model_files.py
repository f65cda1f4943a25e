"""The files of a base model's folder, looked at before a library interprets them: what is lacking, cut or not a model.

Only headers and small JSON files are read, which takes milliseconds.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from loramem.errors import BaseModelNotFound, UnsupportedBaseModel, reason

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
"""What is read of a folder beside the weights."""
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
LFS_POINTER = b"version https://git-lfs"
AGAIN = "Download or copy it again."


def check_files(folder: Path, name: str, lacking: str) -> int:
    """Refuse a folder that is no whole base model; returns the number of values that its weights hold.

    Args:
        name: Of the model, for messages.
        lacking: What to do where a file is not there.

    Raises:
        BaseModelNotFound: A file is lacking, cut, empty, a git-lfs pointer, or not what its name says.
        UnsupportedBaseModel: It is, or also holds, a PEFT adapter.
    """
    if (folder / "adapter_config.json").exists():
        # transformers would attach that adapter silently: the certificate would be of another model than its name.
        raise UnsupportedBaseModel(
            f"{name!r} holds a PEFT adapter (adapter_config.json). Give the base model it was trained on, or merge the "
            "adapter into it and save the result."
        )
    for pattern in SMALL:
        for path in sorted(folder.glob(pattern)):
            _check_pointer(path, name)
    if not (folder / CONFIG).is_file():
        raise BaseModelNotFound(f"{name!r} has no {CONFIG}. {lacking}")
    config = _read_object(folder / CONFIG, name)
    if (kernel := next(_kernels(config), None)) is not None:
        raise UnsupportedBaseModel(
            f"{CONFIG} of {name!r} names compiled code on the Hub ({kernel}). loramem never runs code of a model: "
            "remove that field."
        )
    if (folder / "tokenizer_config.json").is_file():
        _read_object(folder / "tokenizer_config.json", name)
    return sum(_count(path, name) for path in _weights(folder, config, name, lacking))


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a file that a tokenizer's vocabulary is usually read from."""
    return any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern))


def _kernels(config: Any, names_code: bool = False) -> Iterator[str]:
    """Repositories that a configuration names kernels in; transformers would fetch and run them, given `kernels`.

    Args:
        names_code: Whether ``config`` is the value of a field that may name one.
    """
    if isinstance(config, dict):
        for field, value in config.items():
            yield from _kernels(value, names_code or field.endswith("_implementation"))
    elif names_code and isinstance(config, str) and "/" in config:
        yield config


def _weights(folder: Path, config: dict[str, Any], name: str, lacking: str) -> list[Path]:
    """The safetensors files that transformers will read, by its own order of preference."""
    chosen = config.get("transformers_weights")
    if isinstance(chosen, str) and chosen.endswith(".safetensors"):
        names = [chosen]
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        names = sorted(_shards(folder / INDEX, name))
    elif found := sorted(path.name for path in folder.glob("*.safetensors")):
        raise BaseModelNotFound(
            f"{name!r} has neither {WEIGHTS} nor {INDEX}, only {_listed(found)}. {lacking}",
        )
    else:
        raise BaseModelNotFound(f"{name!r} has no *.safetensors weights. {lacking}")
    if absent := [each for each in names if not (folder / each).is_file()]:
        raise BaseModelNotFound(
            f"{name!r} lacks {len(absent)} of {len(names)} weight files: {_listed(absent)}. {lacking}"
        )
    return [folder / each for each in names]


def _shards(index: Path, name: str) -> set[str]:
    shards = _read_object(index, name).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and all(map(_is_text, shards.values())) else set()
    # A name with folders in it could lead to another model's weights.
    if not names or any(PurePath(each).name != each for each in names):
        raise BaseModelNotFound(f"{index.name} of {name!r} does not name the files of its tensors. {AGAIN}")
    return names


def _count(path: Path, name: str) -> int:
    """Values in a safetensors file; the library compares its header with its length."""
    _check_pointer(path, name)
    try:
        with safe_open(path, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        what = "is empty" if path.stat().st_size == 0 else f"cannot be read as safetensors: {reason(error)}"
        raise BaseModelNotFound(f"{path.name} of {name!r} {what}. {AGAIN}") from error


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelNotFound(f"{path.name} of {name!r} is not JSON ({reason(error)}). {AGAIN}") from error
    if not isinstance(content, dict):
        raise BaseModelNotFound(f"{path.name} of {name!r} is a JSON {type(content).__name__}, not an object. {AGAIN}")
    return content


def _check_pointer(path: Path, name: str) -> None:
    with suppress(OSError), path.open("rb") as file:  # a folder, or not readable: whoever needs it says so
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BaseModelNotFound(
                f"{path.name} of {name!r} is a git-lfs pointer, not the file itself. Run git lfs pull there, or "
                "download it again."
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
