"""Every change to the records of an index: one function, one transaction, in which the sum over all rows moves along.

None costs more in a large store than in a small one, but for `commit_repair`.

An adapter whose last live record goes is retired in the same transaction: its row and files stay until `gc`, for
readers that began before.
"""

from collections.abc import Iterable, Mapping, Sequence

from loramem.errors import IntegrityError
from loramem.index.index import Index
from loramem.index.rows import (
    COMMITTED,
    DELETED,
    PENDING,
    REPLACED,
    Ended,
    StoredAdapter,
    StoredRecord,
    adapter_row,
    now,
    record_row,
    version_row,
)
from loramem.index.sealed_database import VACUUM_DUE
from loramem.index.seals import SEALED, Change
from loramem.records.outcome import Outcome

Identity = tuple[str, str]
"""Namespace and key."""


def seal_index(index: Index, manifest_sha256: str) -> None:
    """Finish a new, empty index, or one that was given a new manifest: bind it to it."""
    with index.change() as change:
        change.set_meta("manifest_sha256", manifest_sha256)


def end_write(index: Index, write_id: int, state: str, learnt: Iterable[Outcome] = ()) -> None:
    """Close a journalled write and forget its values, but not what it taught."""
    with index.change() as change:
        _end_write(index, change, write_id, state)
        _note_outcomes(index, learnt)


def commit_write(
    index: Index,
    write_id: int,
    adapters: Iterable[StoredAdapter],
    records: Sequence[StoredRecord],
    learnt: Iterable[Outcome] = (),
    ended: Iterable[Ended] = (),
) -> None:
    """Make adapters and records visible, all or nothing; records they take the place of end.

    Args:
        ended: Other records that end with this write.
    """
    replaced = {(record.namespace, record.key): (REPLACED, None) for record in records}
    others = {(namespace, key): (how, successor) for namespace, key, how, successor in ended}
    with index.change() as change:
        added = _add_adapters(change, adapters)
        left = _end(index, change, {**replaced, **others})
        change.add_all("records", map(record_row, records))  # those with the same keys have just ended
        _end_write(index, change, write_id, COMMITTED)
        _note_outcomes(index, learnt)
        _retire(change, added | left)


def commit_deletion(index: Index, records: Iterable[Identity]) -> None:
    """End records."""
    with index.change() as change:
        _retire(change, _end(index, change, dict.fromkeys(records, (DELETED, None))))


def commit_records(index: Index, records: Iterable[StoredRecord], adapters: Iterable[StoredAdapter] = ()) -> None:
    """Put rows of records in the place of those with the same identity, which do not count as ended.

    For new metadata, and for the same values in new adapters.
    """
    with index.change() as change:
        added = _add_adapters(change, adapters)
        _retire(change, added | _put_records(change, records))


def commit_repair(
    index: Index, records: Iterable[StoredRecord], adapters: Sequence[StoredAdapter], lost: Iterable[Identity]
) -> None:
    """Put records that were written anew in the place of their rows, and remove rows that nothing can mend.

    The rows are then taken for all that there are: what was lost stays lost.

    Args:
        lost: Records to delete.
    """
    with index.change() as change:
        change.count_anew()
        for table, kind in SEALED.items():
            if table != "records":  # those are written anew below, or lost
                for row in [row for row, whole in index.every_row(table) if not whole]:
                    change.remove_key(table, *(row[name] for name in kind.key))
        _forget_torn_write(index, change)
        for identity in lost:
            change.remove_key("records", *identity)
        _add_adapters(change, adapters)
        _put_records(change, records)
        _retire(change, index.live())


def commit_gc(index: Index, adapters: Iterable[str]) -> None:
    """Forget retired adapters, whose files go next."""
    with index.change() as change:
        for adapter in adapters:
            change.remove_key("adapters", adapter)
            change.remove_key("retired", adapter)


def commit_erasure(index: Index, records: Iterable[Identity]) -> None:
    """Forget the history of records, and of earlier writes all that could hint at their values."""
    with index.change() as change:
        for namespace, key in records:
            for number in index.versions(namespace, key):
                change.remove_key("versions", number)
        change.remove("writes", "state != ?", [PENDING])
        # Cost and variety of a single value, to the last bit of a float, would nearly tell which it was.
        index.db.execute("update outcomes set cost_bits = round(cost_bits), vocabulary = round(vocabulary)")
        change.set_meta(VACUUM_DUE, "yes")


def commit_export(index: Index, manifest_sha256: str) -> None:
    """In a copy: forget the journal, and bind the index to another manifest."""
    with index.change() as change:
        change.remove("writes")
        change.remove("journal")
        change.set_meta("manifest_sha256", manifest_sha256)


def commit_publication(index: Index, repo: str, commit: str | None, sent: str | None = None) -> None:
    """Keep what this store knows of a repository that it is published in; see `Index.publication`."""
    with index.change() as change:
        change.put("publications", {"repo": repo, "commit": commit, "sent": sent})


def _add_adapters(change: Change, adapters: Iterable[StoredAdapter]) -> set[str]:
    """Returns their ids."""
    added = set[str]()
    for adapter in adapters:
        change.put("adapters", adapter_row(adapter))
        change.remove_key("retired", adapter.id)
        added.add(adapter.id)
    return added


def _put_records(change: Change, records: Iterable[StoredRecord]) -> set[str]:
    """Returns the adapters that they were in before."""
    left = set[str]()
    for record in records:
        identity = [record.namespace, record.key]
        before = change.db.conn.execute("select adapter from records where namespace = ? and key = ?", identity)
        left.update(adapter for (adapter,) in before)
        change.put("records", record_row(record))
    return left


def _end(index: Index, change: Change, records: Mapping[Identity, tuple[str, str | None]]) -> set[str]:
    """Returns the adapters that they were in. The questions of a record end with it, unless it is said how they do."""
    number, left, every = index.next_id("versions"), set[str](), dict(records)
    for (namespace, _), questions in index.questions_of(records).items():
        for question in questions:
            every.setdefault((namespace, question), (DELETED, None))
    there = index.find_many(every)
    for identity in [identity for identity in every if identity in there]:
        record, (how, successor) = there[identity], every[identity]
        change.put("versions", version_row(number, record, how, successor))
        change.remove_key("records", *identity)
        left.add(record.adapter)
        number += 1
    return left


def _retire(change: Change, adapters: Iterable[str]) -> None:
    """Those of them, no others are looked at, that no record is in now."""
    idle = (
        "select id from adapters where id = ? and not exists (select 1 from records where adapter = id) "
        "and not exists (select 1 from retired where adapter = id)"
    )
    for adapter in sorted(adapters):
        for (id,) in change.db.conn.execute(idle, [adapter]).fetchall():
            change.put("retired", {"adapter": id, "retired_at": now()})


def _end_write(index: Index, change: Change, write_id: int, state: str) -> None:
    row = index.db.table("writes").get(write_id)
    change.put("writes", {**row, "state": state, "ended_at": now()})
    change.remove("journal", "write = ?", [write_id])


def _forget_torn_write(index: Index, change: Change) -> None:
    """A journal that lost records cannot be resumed, and records of no write are nobody's."""
    try:
        index.pending_write()
    except IntegrityError:
        change.remove("writes", "state = ?", [PENDING])
    change.remove("journal", "write not in (select id from writes where state = ?)", [PENDING])


def _note_outcomes(index: Index, learnt: Iterable[Outcome]) -> None:
    index.db.table("outcomes").insert_all({**vars(outcome), "noted_at": now()} for outcome in learnt)
