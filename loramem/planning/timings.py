"""What training costs on this machine, as measured by the writes made on it: kept in the user's cache. No torch."""

import json
import logging
from pathlib import Path
from statistics import median

import platformdirs
from filelock import FileLock

log = logging.getLogger(__name__)

KEPT = 20
"""Measurements of a base model and device; the median of these is believed."""


def default_file() -> Path:
    return platformdirs.user_cache_path("loramem") / "timings.json"


def note_time(base_weights: str, device: str, training_s: float, tokens_visited: float) -> None:
    """Keep what a write took per answer token and visit. A cache that cannot be written is left alone."""
    path = default_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            known = _read(path)
            name = f"{base_weights}:{device}"
            known[name] = [*known.get(name, []), training_s / tokens_visited][-KEPT:]
            beside = path.with_suffix(".partial")
            beside.write_text(json.dumps(known))
            beside.replace(path)
    except OSError:
        log.debug("the cache of timings, %s, is not writable", path)


def seconds_per_visit(base_weights: str, device: str | None = None) -> float | None:
    """Seconds that training takes per answer token and visit here; None if nothing was written here yet.

    Args:
        device: Its type, such as "cpu"; any unless given.
    """
    wanted = f"{base_weights}:{device or ''}"
    found = [second for name, seconds in _read(default_file()).items() if name.startswith(wanted) for second in seconds]
    return median(found) if found else None


def _read(path: Path) -> dict[str, list[float]]:
    try:
        known = {name: [float(second) for second in seconds] for name, seconds in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # absent or damaged: it is only a cache
        return {}
    return known
