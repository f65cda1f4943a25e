"""What a base model is known by: SHA-256 of its files."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from loramem.errors import OtherBaseModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of what decides a base model's answers; equal fingerprints give equal logits."""

    weights: str
    config: str
    tokenizer: str

    def check(self, stored: Mapping[str, str], name: str) -> None:
        """Compare with the fingerprint a store was written with.

        Raises:
            OtherBaseModel: Names the first part that differs.
        """
        for part, found in asdict(self).items():
            if stored[part] != found:
                raise OtherBaseModel(
                    f"The {part} of base model {name!r} is not what this store was written with "
                    f"(sha256 {found[:12]}…, expected {stored[part][:12]}…). Adapters only work on their own base: "
                    "give the original model with --model, or write a new store.",
                    expected=stored[part],
                    got=found,
                )


def fingerprint(folder: Path, *, rehash: bool = False) -> Fingerprint:
    """Hash a model folder; weights are hashed once and then known by path, size, mtime and inode."""
    tokenizer = [*folder.glob("tokenizer*"), *folder.glob("*.jinja"), *folder.glob("vocab*"), *folder.glob("merges*")]
    return Fingerprint(
        weights=_digest([_cached_sha256(path, rehash) for path in sorted(folder.glob("*.safetensors"))]),
        config=_digest([sha256_of(folder / "config.json")]),
        tokenizer=_digest([sha256_of(path) for path in sorted(tokenizer)]),
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cached_sha256(path: Path, rehash: bool) -> str:
    stat = path.stat()
    place = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    cache = platformdirs.user_cache_path("loramem") / "fingerprints.json"
    try:
        known: dict[str, str] = json.loads(cache.read_text())
    except (OSError, ValueError):  # absent, unreadable or damaged: it is only a cache
        known = {}
    if place in known and not rehash:
        return known[place]
    found = sha256_of(path)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.with_suffix(".lock")):
            temporary = cache.with_suffix(".partial")
            temporary.write_text(json.dumps({**known, place: found}))
            temporary.replace(cache)
    except OSError:
        log.debug("fingerprint cache %s is not writable", cache)
    return found
