"""What of a store is not as it was committed: structure and hashes, in words. No torch, no decoding.

The words name files, adapters and keys, never values.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loramem.errors import IntegrityError, StoreFormatError
from loramem.index import Index
from loramem.manifest import read_manifest
from loramem.staging import ADAPTERS
from loramem.tables import StoredAdapter


def problems(store: Path, index: Index) -> Iterator[str]:
    """Every row against its seal, all of them against the digest, every file against its sha256."""
    try:
        read_manifest(store, index)
    except (IntegrityError, StoreFormatError, OSError) as error:
        yield str(error)
    try:
        yield from index.damaged()
        live = "select id, namespace from adapters where id not in (select adapter from retired) order by rowid"
        adapters = {row["id"]: row["namespace"] for row in index.db.query(live)}
        index.pending_write()
        for record in index.db.query("select namespace, key, adapter from records order by adapter, rowid"):
            if record["adapter"] not in adapters:
                yield f"The record {record['key']!r} is in adapter {record['adapter']!r}, which the index does not have"
            elif adapters[record["adapter"]] != record["namespace"]:
                yield f"The record {record['key']!r} is in an adapter of another namespace"
    except IntegrityError as error:  # what cannot be read leaves nothing to compare with
        yield str(error)
        return
    except (sqlite3.DatabaseError, TypeError, ValueError) as error:
        yield f"index.db cannot be read ({error})"
        return
    for id in adapters:
        with suppress(IntegrityError):  # its row is among the damaged ones
            if (adapter := index.adapter(id)) is not None:
                yield from file_problems(store, adapter)


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
