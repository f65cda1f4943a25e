"""Connections to index.db, and what SQLite says of it as errors of ours."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlite_utils import Database

from loramem.errors import IntegrityError, StoreError, StoreReadOnly
from loramem.index.migrations import MIGRATIONS

BUSY_S = 30.0  # a commit takes milliseconds; longer means that something else holds the database
_PASSING = frozenset(
    {
        *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL),
        *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM),
    }
)
"""Result codes of SQLite that say nothing about what is in the file."""


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """What SQLite says of a database, as errors of ours.

    Raises:
        StoreError: It could not be read or written now: locked, or the disk failed or is full; or a row is too large.
        IntegrityError: It is damaged.
    """
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.IntegrityError):  # of this package, not of the file
        raise
    except sqlite3.DatabaseError as error:
        code = vars(error).get("sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # Python's own errors about rows have none
        if code == sqlite3.SQLITE_TOOBIG:
            raise StoreError(
                f"{path} cannot hold a row that large ({error}): 1e9 bytes at most. Leave the value or the metadata "
                "out that has so many. Nothing was changed."
            ) from None
        if code & 0xFF in _PASSING:
            raise StoreError(
                f"{path} could not be read or written now ({error}). What was committed before is whole. End what else "
                "uses it, look after the disk, and call again."
            ) from None
        raise IntegrityError(
            f"{path} is damaged ({error}). Run loramem verify --quick, or restore it from a backup.", what=path.name
        ) from None


def connect(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)  # SQLite gives its side files the mode of the database
    connection = sqlite3.connect(path, check_same_thread=False, timeout=BUSY_S)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA secure_delete=ON")
    return connection


def connect_read_only(path: Path) -> sqlite3.Connection:
    """The database as it lies there. SQLite cannot read a write-ahead log without writing beside it."""
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size:
        raise StoreReadOnly(
            f"{path.parent} cannot be written, and {log.name} holds commits that {path.name} does not. Open the store "
            "once where it can be written, then copy it again."
        )
    source = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    if not MIGRATIONS.pending(Database(source)):
        return source
    memory = sqlite3.connect(":memory:", check_same_thread=False)  # an older format is brought up to date beside it
    source.backup(memory)
    source.close()
    return memory
