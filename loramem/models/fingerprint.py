"""What a base model is known by: SHA-256 of all that decides its answers, wherever it lies and however it was saved.

Names are hints. A model that was moved, copied, saved anew or cut into other files has the same fingerprint.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramem._util.cache import JsonFile, cache_folder
from loramem.errors import BaseModelNotFound, OtherBaseModel, UnsupportedBaseModel

SUFFIX = ".gguf"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
HOW_SAVED = frozenset(
    {
        *("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local", "local_files_only"),
        *("transformers_version", "backend", "device_map", "processor_class", "_commit_hash"),
        *("dtype", "torch_dtype"),  # ours is given when the model is loaded
    }
)
"""Fields of configurations that say where and by what they were saved; answers do not depend on them."""
TOKENIZER_FILE = re.compile(
    r"tokenizer(\.\d[\d.]*)?\.json|(tokenizer_config|special_tokens_map|added_tokens|vocab|tekken|emoji)\.json"
    r"|(vocab|merges)\.txt|[^/]+\.(model|tiktoken)|(chat_template|additional_chat_templates/[^/]+)\.jinja"
)
"""Files of a model folder that transformers makes a tokenizer of. A `tokenizer.json.bak` is none."""
TOKENIZER_SETTINGS = frozenset({"tokenizer_config.json", "special_tokens_map.json"})
PARTS = {
    "tensors": "weights",
    "weights": "weights",
    "config": "configuration",
    "tokenizer": "tokenizer",
    "parameters": "parameters as loaded",
}
"""What messages call the parts of a fingerprint."""


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of what decides a base model's answers; equal ones, `weights` aside, give equal logits."""

    weights: str
    """Of the safetensors files, byte for byte: what calibrations and timings of a base model are kept under."""
    tensors: str
    """Of the tensors in these files, in whichever file each of them is."""
    config: str
    tokenizer: str
    parameters: str = ""
    """Of the model as it was loaded, in one dtype: see `loramem.models.parameters`. Empty where only files were
    read."""

    def differences(self, stored: Mapping[str, str], folder: Path, *, same_dtype: bool) -> dict[str, tuple[str, str]]:
        """Parts that are not as stored: what was found and what was expected, by the part's name.

        Args:
            stored: From a store's manifest, of this form or the former one.
            folder: What this is the fingerprint of.
            same_dtype: Whether the model was loaded in the dtype that ``stored`` is of; parameters of two dtypes are
                not compared.
        """
        if "tensors" in stored:
            found = {"tensors": self.tensors, "config": self.config, "tokenizer": self.tokenizer}
        else:
            found = {"weights": self.weights, **former_digests(folder)}
        if same_dtype and self.parameters and "parameters" in stored:
            found["parameters"] = self.parameters
        return {part: (sha256, stored[part]) for part, sha256 in found.items() if sha256 != stored[part]}

    def check(self, stored: Mapping[str, str], folder: Path, name: str, *, same_dtype: bool) -> None:
        """Compare with the fingerprint that a store was written with; arguments as of `differences`.

        Raises:
            OtherBaseModel: Names every part that differs.
        """
        wrong = self.differences(stored, folder, same_dtype=same_dtype)
        if not wrong:
            return
        said = ", ".join(
            f"{PARTS[part]} (sha256 {found[:12]}…, expected {expected[:12]}…)"
            for part, (found, expected) in wrong.items()
        )
        found, expected = next(iter(wrong.values()))
        if set(wrong) == {"parameters"}:
            remedy = (
                "Its files are the same, so they are read otherwise than then: use the versions of transformers and "
                "torch that the store was written with."
            )
        else:
            remedy = "Adapters only work on their own base: give the original model with --model, or write a new store."
        raise OtherBaseModel(
            f"Base model {name!r} is not what this store was written with. Different: {said}. {remedy}",
            expected=expected,
            got=found,
        )


def fingerprint(folder: Path, *, rehash: bool = False) -> Fingerprint:
    """Hash a model folder, or a GGUF file, which is all parts in one; weights are hashed once and then known by path,
    size, mtime and inode.

    Raises:
        UnsupportedBaseModel: A file of weights is no whole safetensors file.
        BaseModelNotFound: A file cannot be read, or there is no configuration.
    """
    try:
        if folder.is_file():
            whole = _weights_file(folder, rehash).sha256
            return Fingerprint(weights=whole, tensors=whole, config=whole, tokenizer=whole)
        return _fingerprint(folder, rehash)
    except OSError as error:
        raise BaseModelNotFound(f"{folder} is no folder of a base model: {error}.") from None


def _fingerprint(folder: Path, rehash: bool) -> Fingerprint:
    files = {path.name: _weights_file(path, rehash) for path in sorted(folder.glob("*.safetensors"))}
    tensors = list[str]()
    for name in _read_by_transformers(folder, set(files)):
        if (held := files[name].tensors) is None:
            raise UnsupportedBaseModel(
                f"{folder / name} is no whole safetensors file: it was cut, or is a pointer to it. Copy or download it "
                "again."
            )
        tensors += (f"{tensor} {sha256}" for tensor, sha256 in held.items())
    return Fingerprint(
        weights=_digest(file.sha256 for file in files.values()),
        tensors=_digest(sorted(tensors)),
        config=_settings_sha256(folder / "config.json"),
        tokenizer=_digest(f"{name} {sha256}" for name, sha256 in sorted(_tokenizer_files(folder).items())),
    )


def former_digests(folder: Path) -> dict[str, str]:
    """Configuration and tokenizer as stores had them before `Fingerprint.tensors`: byte for byte, any tokenizer*."""
    patterns = ("tokenizer*", "*.jinja", "vocab*", "merges*")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {
        "config": _digest([sha256_of(folder / "config.json")]),
        "tokenizer": _digest(sha256_of(path) for path in paths),
    }


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _settings_sha256(path: Path) -> str:
    """Of a JSON file without the fields that say how it was saved, and without its order and blanks."""
    try:
        content = _without_how_saved(json.loads(path.read_bytes()))
    except (ValueError, RecursionError):  # whoever loads the model will say so
        return sha256_of(path)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_how_saved(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {name: _without_how_saved(value) for name, value in content.items() if name not in HOW_SAVED}


def _tokenizer_files(folder: Path) -> dict[str, str]:
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    named = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return {
        name: _settings_sha256(path) if name in TOKENIZER_SETTINGS else sha256_of(path)
        for name, path in named.items()
        if TOKENIZER_FILE.fullmatch(name)
    }


@dataclass(frozen=True)
class _WeightsFile:
    sha256: str
    tensors: Mapping[str, str] | None
    """SHA-256 of the values, by name, dtype and shape in one string; None if this is no whole safetensors file."""

    @classmethod
    def of(cls, known: Any) -> "_WeightsFile":
        tensors = known["tensors"]
        parts = None if tensors is None else {str(name): str(sha256) for name, sha256 in tensors.items()}
        return cls(str(known["sha256"]), parts)


def _read_by_transformers(folder: Path, files: set[str]) -> set[str]:
    """The files that are the model's: a folder may hold a second copy in another layout."""
    if WEIGHTS in files:
        return {WEIGHTS}
    try:
        return files & set(json.loads((folder / WEIGHTS_INDEX).read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return files


def _weights_file(path: Path, rehash: bool) -> _WeightsFile:
    """What a file of weights holds, from the cache if it is there.

    Each file has an entry of its own, renamed into place: processes neither wait for nor overwrite each other.
    """
    stat = path.stat()
    place = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    entry = JsonFile(cache_folder() / "fingerprints" / f"{_digest([place])[:32]}.json", _WeightsFile.of)
    if not rehash and (known := entry.known()) is not None:
        return known
    found = _WeightsFile(sha256_of(path), None) if path.suffix == SUFFIX else _hashed(path)
    now = path.stat()
    unchanged = (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if unchanged and (found.tensors is not None or path.suffix == SUFFIX):
        entry.remember(asdict(found))
    return found


def _hashed(path: Path) -> _WeightsFile:
    """One file of weights, as a whole and by tensor, side by side: hashlib lets other threads run."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            start = 8 + int.from_bytes(mapped[:8], "little")
            header: dict[str, Any] = json.loads(mapped[8:start])
            ends = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
            if max((end for _, end in ends.values()), default=0) != len(mapped) - start:
                return _WeightsFile(sha256_of(path), None)
            with memoryview(mapped) as content, ThreadPoolExecutor() as pool:
                whole = pool.submit(_sha256, content, 0, len(mapped))
                parts = {
                    f"{name} {header[name]['dtype']} {header[name]['shape']}": pool.submit(
                        _sha256, content, start + first, start + last
                    )
                    for name, (first, last) in ends.items()
                }
                return _WeightsFile(whole.result(), {name: part.result() for name, part in parts.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return _WeightsFile(sha256_of(path), None)


def _sha256(content: memoryview, first: int, last: int) -> str:
    with content[first:last] as part:
        return hashlib.sha256(part).hexdigest()
