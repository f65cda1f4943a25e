"""The tables of an index as they came to be: every change of them, one transaction each."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from sqlite_utils import Database, Migrations

from loramem.errors import IntegrityError
from loramem.index.seals import ROWS_SUM, SEAL, Change, count_rows, seal_number, seal_of, sum_text, was_sealed

MIGRATIONS = Migrations("loramem")
AT_ONCE = 1000
"""Rows that are sealed anew before the next are read."""


@MIGRATIONS()
def format_1(db: Database) -> None:
    db.table("records").create(
        {
            "namespace": str,
            "key": str,
            "value": str,
            "salt": str,
            "digest": str,
            "metadata": str,
            "prompt_sha256": str,
            "answer_tokens": int,
            "adapter": str,
            "min_prob": float,
            "written_at": str,
            "row_sha256": str,
        },
        pk=("namespace", "key"),
        not_null={"salt", "digest", "adapter", "answer_tokens", "row_sha256"},
    )
    db.table("records").create_index(["adapter"])
    db.table("records").create_index(["namespace", "prompt_sha256"], unique=True)
    db.table("adapters").create(
        {
            "id": str,
            "namespace": str,
            "rank": int,
            "parameters": int,
            "size_bytes": int,
            "files": str,
            "placement": str,
            "training": str,
            "proof": str,
            "created_at": str,
            "row_sha256": str,
        },
        pk="id",
    )
    db.table("writes").create(
        {"id": int, "state": str, "started_at": str, "ended_at": str, "count": int, "records": str, "request": str},
        pk="id",
    )
    db.table("meta").create({"name": str, "value": str}, pk="name")


@MIGRATIONS()
def format_1_outcomes(db: Database) -> None:
    """What writes came to, for the success boundary: knowledge, not content, so no digest covers it."""
    db.table("outcomes").create(
        {
            "id": int,
            "kind": str,
            "rank": int,
            "length": int,
            "parameters": int,
            "cost_bits": float,
            "certified": int,
            "visits": float,
            "noted_at": str,
        },
        pk="id",
    )


@MIGRATIONS()
def format_1_changes(db: Database) -> None:
    """Records that ended, adapters that no record needs, a sealed journal; no digest of an older index changes."""
    db.table("versions").create(
        {
            "id": int,
            "namespace": str,
            "key": str,
            "written_at": str,
            "ended_at": str,
            "ended_by": str,
            "successor": str,
            "adapter": str,
            "answer_tokens": int,
            "min_prob": float,
            "row_sha256": str,
        },
        pk="id",
        not_null={"namespace", "key", "ended_by", "adapter", "row_sha256"},
    )
    db.table("versions").create_index(["namespace", "key"])
    db.table("versions").create_index(["adapter"])
    db.table("retired").create({"adapter": str, "retired_at": str, "row_sha256": str}, pk="adapter")
    db.table("writes").add_column("row_sha256", str)


@MIGRATIONS()
def format_1_publications(db: Database) -> None:
    """What the store knows of the Hub repositories that it is published in."""
    db.table("publications").create({"repo": str, "commit": str, "sent": str, "row_sha256": str}, pk="repo")


@MIGRATIONS()
def format_1_prompts(db: Database) -> None:
    """Prompts that are not prefix, key and suffix, and which keys may be asked by chat; unknown of older records."""
    db.table("records").add_column("prompt", str)


@MIGRATIONS()
def format_1_seals(db: Database) -> None:
    """Seals that say which columns they cover, and a sum over them in the place of a digest made anew by every commit.

    A row that was damaged, and rows that were lost, are reported afterwards as before.
    """
    tables = [table for table, _ in _SEALED_0]
    with _any_text(db):
        kept = db.conn.execute("select value from meta where name = 'rows_sha256'").fetchone()
        whole = _digest_0(db) == (kept[0] if kept else hashlib.sha256().hexdigest())  # a new index has none yet
        for table in tables:
            reseal(db, table, 1, held=_was_sealed_0)
        total = count_rows(db, tables)
    db.execute("delete from meta where name = 'rows_sha256'")
    Change(db).set_meta(ROWS_SUM, sum_text(total if whole else total + 1))


@MIGRATIONS()
def format_1_journal(db: Database) -> None:
    """The records of a journalled write as rows: one value of SQLite holds no more than 1e9 bytes."""
    db.table("journal").create({"write": int, "number": int, "record": str, SEAL: str}, pk=("write", "number"))
    change = Change(db)
    for row in list(db.table("writes").rows_where("state = 'pending'")):
        if was_sealed("writes", row):
            with suppress(ValueError, TypeError):  # no seal covered the very oldest; what is missing will show
                for number, record in enumerate(json.loads(row["records"])):
                    change.put("journal", {"write": row["id"], "number": number, "record": json.dumps(record)}, 1)
    _finish(change)
    reseal(db, "writes", 2)
    db.table("writes").transform(drop={"records"})
    db.execute("create index idx_writes_pending on writes (id) where state = 'pending'")


@MIGRATIONS()
def format_1_loads(db: Database) -> None:
    """What adapters hold is added up from an index of a tenth of the table's size, the rows left alone."""
    db.execute("drop index if exists idx_records_adapter")
    db.execute("create index idx_records_adapter on records (adapter, answer_tokens, min_prob)")


@MIGRATIONS()
def format_1_vocabulary(db: Database) -> None:
    """Outcomes say how many different tokens were asked for, which ranks are chosen by; unknown of older ones."""
    db.table("outcomes").add_column("vocabulary", float)


@MIGRATIONS()
def format_1_questions(db: Database) -> None:
    """Questions: rows that name the record whose value they have."""
    for table in ("records", "versions"):
        db.table(table).add_column("question_of", str)
        db.execute(f"create index idx_{table}_questions on {table} (namespace, question_of) where question_of not null")
        reseal(db, table, 2)


@MIGRATIONS()
def format_1_successors(db: Database) -> None:
    """What a key was called before is found without looking through the whole history, which `erase` asks for each."""
    db.execute("create index idx_versions_successor on versions (namespace, successor) where successor is not null")


def reseal(db: Database, table: str, version: int, held: Callable[[str, Mapping[str, Any]], bool] = was_sealed) -> None:
    """Seal the rows of a table by a later list of columns, in the transaction of the migration that it is for.

    Rows whose old seal does not hold keep it: they are reported as before.

    Args:
        version: Of the list in `loramem.index.seals.SEALED`. Columns of the older one must still be there.
        held: Whether the old seal of a row holds.
    """
    change = Change(db)
    with _any_text(db):
        for rowid, row in _in_chunks(db, table):
            if held(table, row):
                seal = seal_of(table, row, version)
                db.conn.execute(f'update "{table}" set {SEAL} = ? where rowid = ?', [seal, rowid])
                change.moved += seal_number(table, seal) - seal_number(table, row[SEAL])
    _finish(change)


def _finish(change: Change) -> None:
    with suppress(IntegrityError):  # a damaged sum stays as it is, to be reported: the store must open
        change.finish()


@contextmanager
def _any_text(db: Database) -> Iterator[None]:
    """Text that damage left no UTF-8 is read as other text: no seal holds for it, and none stops a migration."""
    usual = db.conn.text_factory
    db.conn.text_factory = lambda content: content.decode(errors="replace")
    try:
        yield
    finally:
        db.conn.text_factory = usual


def _in_chunks(db: Database, table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers, none of a chunk changed before all of it is read."""
    last = -(1 << 63)
    while True:
        cursor = db.conn.execute(
            f'select rowid as "#", * from "{table}" where rowid > ? order by rowid limit ?', [last, AT_ONCE]
        )
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        for row in rows:
            last = row.pop("#")
            yield last, row
        if not rows:
            return


# Seals as they were before they said what they cover; nothing here changes any more.

_SEALED_0 = (
    ("adapters", "id"),
    ("records", "namespace, key"),
    ("versions", "id"),
    ("retired", "adapter"),
    ("writes", "id"),
    ("publications", "repo"),
)


def _was_sealed_0(table: str, row: Mapping[str, Any]) -> bool:
    """Whether a row is as the sha256 over all of its columns says; a prompt that was not kept was not among them."""
    if table == "writes" and row[SEAL] is None:  # of before writes were sealed
        return True
    content = {name: value for name, value in row.items() if name != SEAL and (value is not None or name != "prompt")}
    try:
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    except TypeError:  # bytes where text was
        return False
    return bool(hashlib.sha256(text.encode()).hexdigest() == row[SEAL])


def _digest_0(db: Database) -> str:
    digest = hashlib.sha256()
    for table, order in _SEALED_0:
        for (seal,) in db.conn.execute(f"select {SEAL} from {table} where {SEAL} is not null order by {order}"):
            digest.update(f"{table}:{seal}\n".encode())
    return digest.hexdigest()
