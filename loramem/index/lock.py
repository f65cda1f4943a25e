"""One writer at a time: the lock on a store, and who holds it.

The lock is the operating system's (flock): it ends with the process that holds it, however that ends, so there are no
stale locks to break. ``store.holder`` beside it only says whom a second writer is waiting for.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loramem.errors import StoreLocked
from loramem.index.rows import now

LOCK, HOLDER = "store.lock", "store.holder"


@dataclass(frozen=True)
class Holder:
    """The process that writes."""

    pid: int
    host: str
    since: str
    """UTC, ISO 8601."""


@contextmanager
def write_lock(store: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the store's lock.

    Args:
        wait_s: Seconds to wait for another writer to end.

    Raises:
        StoreLocked: It did not end; says which process it is.
    """
    lock = FileLock(store / LOCK, timeout=wait_s, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise _locked(store, wait_s) from None
    try:
        holder = Holder(os.getpid(), socket.gethostname(), now())
        with suppress(OSError):  # nobody is kept from writing, or from making room, because this cannot be told
            (store / HOLDER).touch(mode=0o600)
            (store / HOLDER).write_text(json.dumps(asdict(holder)))
        yield
    finally:
        with suppress(OSError):
            (store / HOLDER).unlink(missing_ok=True)
        lock.release()


def read_holder(store: Path) -> Holder | None:
    """Who said last that it writes; None if nobody does, or it had no time to say so."""
    with suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads((store / HOLDER).read_bytes()))
    return None


def _locked(store: Path, wait_s: float) -> StoreLocked:
    holder = read_holder(store)
    who = f"process {holder.pid} on {holder.host}, since {holder.since}" if holder else "another process"
    waited = f", and was not done in {wait_s:g} s" if wait_s else ""
    return StoreLocked(
        f"{store} is being written by {who}{waited}. Wait for it to end (--wait SECONDS).",
        pid=holder.pid if holder else None,
        host=holder.host if holder else None,
        since=holder.since if holder else None,
    )
