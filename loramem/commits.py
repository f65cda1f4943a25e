"""Every change to the records of an index: one function, one transaction, the digest over all rows renewed in it.

An adapter whose last live record goes is retired in the same transaction: its row and files stay until `gc`, for
readers that began before.
"""

from collections.abc import Iterable, Mapping, Sequence

from loramem.boundary import Outcome
from loramem.index import VACUUM_DUE, Index
from loramem.tables import (
    COMMITTED,
    DELETED,
    PENDING,
    REPLACED,
    SEALED,
    StoredAdapter,
    StoredRecord,
    adapter_row,
    is_sealed,
    now,
    record_row,
    seal,
    version_row,
)

Identity = tuple[str, str]
"""Namespace and key."""


def seal_index(index: Index, manifest_sha256: str) -> None:
    """Finish a new, empty index, or one that was given a new manifest: bind it to it."""
    with index.change():
        index.set_meta("manifest_sha256", manifest_sha256)
        index.seal_rows()


def end_write(index: Index, write_id: int, state: str, learnt: Iterable[Outcome] = ()) -> None:
    """Close a journalled write and forget its values, but not what it taught."""
    with index.change():
        _end_write(index, write_id, state)
        _note_outcomes(index, learnt)
        index.seal_rows()


def commit_write(
    index: Index,
    write_id: int,
    adapters: Iterable[StoredAdapter],
    records: Sequence[StoredRecord],
    learnt: Iterable[Outcome] = (),
    ended: Mapping[Identity, tuple[str, str | None]] | None = None,
) -> None:
    """Make adapters and records visible, all or nothing; records they take the place of end.

    Args:
        ended: Other records that end with this write: identity -> how (such as "renamed"), and the new key if any.
    """
    with index.change():
        _add_adapters(index, adapters)
        _end(index, {**{(r.namespace, r.key): (REPLACED, None) for r in records}, **(ended or {})})
        index.db.table("records").insert_all(record_row(record) for record in records)
        _end_write(index, write_id, COMMITTED)
        _note_outcomes(index, learnt)
        _retire(index)
        index.seal_rows()


def commit_deletion(index: Index, records: Iterable[Identity]) -> None:
    """End records."""
    with index.change():
        _end(index, dict.fromkeys(records, (DELETED, None)))
        _retire(index)
        index.seal_rows()


def commit_records(index: Index, records: Iterable[StoredRecord], adapters: Iterable[StoredAdapter] = ()) -> None:
    """Put rows of records in the place of those with the same identity, which do not count as ended.

    For new metadata, and for the same values in new adapters.
    """
    with index.change():
        _add_adapters(index, adapters)
        for record in records:
            index.db.table("records").upsert(record_row(record), pk=("namespace", "key"))
        _retire(index)
        index.seal_rows()


def commit_repair(
    index: Index, records: Iterable[StoredRecord], adapters: Sequence[StoredAdapter], lost: Iterable[Identity]
) -> None:
    """Put records that were written anew in the place of their rows, and remove rows that nothing can mend.

    Args:
        lost: Records to delete.
    """
    with index.change():
        for table, name in SEALED:
            if table == "records":  # those are written anew below, or lost
                continue
            for row in list(index.db.table(table).rows_where("row_sha256 is not null")):
                if not is_sealed(row):
                    index.db.execute(f"delete from {table} where {name} = ?", [row[name]])
        for namespace, key in lost:
            index.db.execute("delete from records where namespace = ? and key = ?", [namespace, key])
        _add_adapters(index, adapters)
        for record in records:
            index.db.table("records").upsert(record_row(record), pk=("namespace", "key"))
        _retire(index)
        index.seal_rows()


def commit_gc(index: Index, adapters: Iterable[str]) -> None:
    """Forget retired adapters, whose files go next."""
    with index.change():
        for adapter in adapters:
            index.db.execute("delete from adapters where id = ?", [adapter])
            index.db.execute("delete from retired where adapter = ?", [adapter])
        index.seal_rows()


def commit_oblivion(index: Index, records: Iterable[Identity]) -> None:
    """Forget the history of records, and of earlier writes all that could hint at their values."""
    with index.change():
        for namespace, key in records:
            for number in index.versions(namespace, key):
                index.db.execute("delete from versions where id = ?", [number])
        index.db.execute("delete from writes where state != ?", [PENDING])
        # The cost of a single value, to the last bit of a float, would nearly tell which it was.
        index.db.execute("update outcomes set cost_bits = round(cost_bits)")
        index.set_meta(VACUUM_DUE, "yes")
        index.seal_rows()


def commit_export(index: Index, manifest_sha256: str) -> None:
    """In a copy: forget the journal, and bind the index to another manifest."""
    with index.change():
        index.db.execute("delete from writes")
        index.set_meta("manifest_sha256", manifest_sha256)
        index.seal_rows()


def commit_publication(index: Index, repo: str, commit: str | None, sent: str | None = None) -> None:
    """Keep what this store knows of a repository that it is published in; see `Index.published`."""
    with index.change():
        row = seal({"repo": repo, "commit": commit, "sent": sent})
        index.db.table("publications").upsert(row, pk="repo")
        index.seal_rows()


def _add_adapters(index: Index, adapters: Iterable[StoredAdapter]) -> None:
    for adapter in adapters:
        index.db.table("adapters").upsert(adapter_row(adapter), pk="id")
        index.db.execute("delete from retired where adapter = ?", [adapter.id])


def _end(index: Index, records: Mapping[Identity, tuple[str, str | None]]) -> None:
    number = index.next_id("versions")
    for (namespace, key), (how, successor) in records.items():
        record = index.find(namespace, key)
        if record is not None:
            index.db.table("versions").insert(version_row(number, record, how, successor))
            index.db.execute("delete from records where namespace = ? and key = ?", [namespace, key])
            number += 1


def _retire(index: Index) -> None:
    query = "id not in (select adapter from records) and id not in (select adapter from retired)"
    for row in list(index.db.table("adapters").rows_where(query, select="id")):
        index.db.table("retired").insert(seal({"adapter": row["id"], "retired_at": now()}))


def _end_write(index: Index, write_id: int, state: str) -> None:
    row = index.db.table("writes").get(write_id)
    ended = {**row, "state": state, "ended_at": now(), "records": None}
    del ended["row_sha256"]
    index.db.table("writes").update(write_id, {**seal(ended)})


def _note_outcomes(index: Index, learnt: Iterable[Outcome]) -> None:
    index.db.table("outcomes").insert_all({**vars(outcome), "noted_at": now()} for outcome in learnt)
