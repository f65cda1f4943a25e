"""What of a store is not as it was committed: structure and hashes, in words. No torch, no decoding.

The words name files, adapters and keys, never values.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loramem._util.layout import ADAPTERS
from loramem.errors import IntegrityError, StoreFormatError
from loramem.index.index import Index
from loramem.index.rows import StoredAdapter
from loramem.store.manifest import read_manifest


def problems(store: Path, index: Index) -> Iterator[str]:
    """Every row against its seal, all of them against their sum, every file against its sha256.

    Called outside a snapshot, it takes no file for lost that another process removed in the meantime.
    """
    try:
        read_manifest(store, index)
    except (IntegrityError, StoreFormatError, OSError) as error:
        yield str(error)
    found, adapters = list[str](), list[StoredAdapter]()
    try:
        with index.snapshot():
            found += index.damaged()
            index.pending_write()
            found += index.misplaced()
            for id in index.live():
                with suppress(IntegrityError):  # its row is among the damaged ones
                    if (adapter := index.adapter(id)) is not None:
                        adapters.append(adapter)
    except IntegrityError as error:  # what cannot be read leaves nothing to compare with
        found.append(str(error))
    except (sqlite3.DatabaseError, TypeError, ValueError) as error:
        found.append(f"index.db cannot be read ({error})")
    yield from found
    for adapter in adapters:
        if (missed := file_problems(store, adapter)) and adapter.id in index.live():  # not removed by a change since
            yield from missed


def file_problems(store: Path, adapter: StoredAdapter) -> list[str]:
    """What of an adapter's files is not as committed."""
    found = []
    for name, expected in adapter.files.items():
        path = store / ADAPTERS / adapter.id / name
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            found.append(f"Adapter {adapter.id}: {name} cannot be read ({error.strerror})")
            continue
        if sha256 != expected:
            found.append(f"Adapter {adapter.id}: {name} is not what was committed (sha256 differs)")
    return found
