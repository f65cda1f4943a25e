"""What training costs on this machine, as measured by the writes made on it: kept in the user's cache. No torch."""

import logging
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock

from loramem._util.cache import JsonFile, cache_folder

log = logging.getLogger(__name__)

KEPT = 20
"""Measurements of a base model and device; the median of these is believed."""


def default_file() -> Path:
    return cache_folder() / "timings.json"


def note_time(base_weights: str, device: str, training_s: float, tokens_visited: float) -> None:
    """Keep what a write took per answer token and visit. A cache that cannot be written is left alone."""
    path, name = default_file(), f"{base_weights}:{device}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            known = _known()
            _file().save({**known, name: [*known.get(name, []), training_s / tokens_visited][-KEPT:]})
    except OSError:
        log.debug("the cache of timings, %s, is not writable", path)


def seconds_per_visit(base_weights: str, device: str | None = None) -> float | None:
    """Seconds that training takes per answer token and visit here; None if nothing was written here yet.

    Args:
        device: Its type, such as "cpu"; any unless given.
    """
    wanted = f"{base_weights}:{device or ''}"
    found = [second for name, seconds in _known().items() if name.startswith(wanted) for second in seconds]
    return median(found) if found else None


def _file() -> JsonFile[dict[str, list[float]]]:
    return JsonFile(default_file(), _parsed)


def _known() -> dict[str, list[float]]:
    return _file().known() or {}


def _parsed(content: Any) -> dict[str, list[float]]:
    return {name: [float(second) for second in seconds] for name, seconds in content.items()}
