"""Worker processes: how many cores they have to share, and that they end with the process that started them."""

import math
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where a container's CPU quota allows less time.

    A part of a core counts as one, as in other runtimes.
    """
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        bound = os.cpu_count() or 1
    return max(1, min([bound, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """CPU quotas, in cores, of the control groups that this process is in and those around them (Linux)."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / "cpu" if controllers else CGROUPS  # version 2 has one tree for all, and names none
        folder = root / path.lstrip("/")
        # In a container the path may be the host's, and lead nowhere here: what is mounted is the container's own.
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            yield from _quota(group)


def _quota(group: Path) -> Iterator[float]:
    """What one control group says, of version 2 or 1; nothing where it sets no limit."""
    try:
        try:
            quota, period = (group / "cpu.max").read_text().split()
        except OSError:
            quota, period = ((group / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return


def end_with_parent() -> None:
    """In a worker: leave at once when the parent is gone, however it went; nobody would collect the result."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
