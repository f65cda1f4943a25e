"""Temporary folders of jobs, which go with the job; what a process was killed in goes with the next on that host.

A folder is locked as long as its process lives, so that one without a lock was abandoned. Where the system has no such
locks (Windows) those stay until somebody removes them.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

PREFIX, UNLOCKED = "loramem-job-", "loramem-new-"


@contextmanager
def job_folder() -> Iterator[Path]:
    """A private folder below `tempfile.gettempdir` (TMPDIR) for one job; abandoned ones are removed first."""
    remove_abandoned()
    made = Path(tempfile.mkdtemp(prefix=UNLOCKED))
    descriptor = _lock(made)
    # Under this name only once it is locked, or it would look abandoned.
    folder = made.rename(made.with_name(PREFIX + made.name.removeprefix(UNLOCKED)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_abandoned() -> None:
    """Remove what killed processes left of their jobs."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        with suppress(OSError):  # in use, somebody else's, or gone
            descriptor = _lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """An open descriptor that locks a folder until it is closed, or the process ends; None where there is no such.

    Raises:
        OSError: Somebody has it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
