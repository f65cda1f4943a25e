"""Files that no committed row needs: staged shards, adapters of a commit that did not come, retired adapters."""

import json
import logging
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from loramem._util.events import log_event
from loramem._util.files import remove_directory, size_bytes
from loramem._util.layout import ADAPTERS, RESULT, STAGING
from loramem.index.commits import commit_gc
from loramem.index.index import Index

log = logging.getLogger(__name__)

GRACE_S = 3600.0
"""Readers that began before an adapter was retired may go on reading it for so long."""


def clean(store: Path, index: Index) -> None:
    """`collect` after a commit, which a file that cannot be removed does not undo."""
    try:
        collect(store, index)
    except OSError as error:  # what was committed stays committed; the next write tries again
        log.warning("%s: files that are not needed could not be removed (%s)", store, error)
    log_event("cleaned")


def collect(store: Path, index: Index, grace_s: float = GRACE_S) -> tuple[int, int]:
    """Remove adapters that no live record needs, and what is staged for no journalled write.

    Returns how many adapters went, and their bytes.

    The caller holds the store's lock, so that no commit is under way.

    Args:
        grace_s: Keep those that were retired less than so many seconds ago; 0 keeps none, whatever a clock said.
    """
    latest = (datetime.now(UTC) - timedelta(seconds=grace_s)).isoformat(timespec="seconds")
    gone = [adapter for adapter, since in index.retired().items() if since <= latest or not grace_s]
    if gone:
        commit_gc(index, gone)  # first: a row without files would be damage, files without a row are not
    pending = index.pending_write()
    if pending is not None:
        take_back(store, index)  # what it had proved is no orphan
    known = index.adapter_ids()
    orphans = [folder for folder in (store / ADAPTERS).glob("*") if folder.name not in known and _ours(folder)]
    freed = sum(map(size_bytes, orphans))
    for folder in orphans:
        remove_directory(folder)
    if pending is None:
        remove_directory(store / STAGING)
    log_event("collected", adapters=len(orphans), bytes=freed)
    return len(orphans), freed


def _ours(path: Path) -> bool:
    """Whether a path looks like an adapter's folder; anything else in ``adapters`` is somebody's own."""
    return re.fullmatch("[0-9a-f]{32}", path.name) is not None and path.is_dir() and not path.is_symlink()


def take_back(store: Path, index: Index) -> None:
    """Give staged jobs back the adapters that were installed for a commit that did not come.

    Without it a write killed between the two would train again what it had proved.
    """
    for result in (store / STAGING).glob(f"*/{RESULT}"):
        with suppress(ValueError, KeyError, TypeError):
            for shard in json.loads(result.read_text())["shards"]:
                installed, staged = store / ADAPTERS / shard["adapter"], result.parent / shard["adapter"]
                if installed.exists() and not staged.exists() and not index.has_adapter(shard["adapter"]):
                    installed.rename(staged)
