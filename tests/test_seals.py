"""Seals say what they cover: tables may change, and rows of before are still told from damaged ones."""

import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from loramem import MemoryStore, Record
from loramem.errors import IntegrityError, StoreError, StoreFormatError
from loramem.index.commits import commit_deletion, commit_publication, commit_repair, commit_write, end_write
from loramem.index.index import Index
from loramem.index.migrations import MIGRATIONS, reseal
from loramem.index.rows import DISCARDED, stored_record
from loramem.index.seals import SEALED, TOGETHER, Sealed, is_sealed
from loramem.records.prompts import prompt_digest

from .conftest import ROOT
from .damage import damage_row, reported

PENDING = [{"key": f"key {n}", "value": f"{n}", "namespace": "", "metadata": {"n": n}} for n in range(3)]


# As the version before seals had versions made them; nothing here may change.


def old_seal(row: dict[str, Any]) -> dict[str, Any]:
    sealed = {name: value for name, value in row.items() if value is not None or name != "prompt"}
    content = json.dumps(sealed, sort_keys=True, ensure_ascii=True)
    return {**row, "row_sha256": hashlib.sha256(content.encode()).hexdigest()}


def old_digest(db: Database) -> str:
    digest = hashlib.sha256()
    for table, order in (
        ("adapters", "id"),
        ("records", "namespace, key"),
        ("versions", "id"),
        ("retired", "adapter"),
        ("writes", "id"),
        ("publications", "repo"),
    ):
        rows = db.conn.execute(f"select row_sha256 from {table} where row_sha256 is not null order by {order}")
        for (row_sha256,) in rows:
            digest.update(f"{table}:{row_sha256}\n".encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed store of format 1 with a row in every table, sealed as they were before seals had versions."""
    path = shutil.copytree(ROOT / "tests" / "store-format-1", tmp_path_factory.mktemp("before") / "memory")
    with closing(sqlite3.connect(path / "index.db")) as connection:
        db = Database(connection)
        MIGRATIONS.apply(db, stop_before="format_1_seals")
        kept = next(iter(db.table("adapters").rows))
        record = next(iter(db.table("records").rows))
        rows = {
            "adapters": {**kept, "id": "0" * 32},
            "retired": {"adapter": "0" * 32, "retired_at": "2026-11-21T18:54:40+00:00"},
            "records": {**record, "prompt": json.dumps({"chat": True})},
            "versions": {
                **{name: record[name] for name in ("namespace", "written_at", "adapter", "answer_tokens", "min_prob")},
                **{"id": 1, "key": "old", "ended_at": record["written_at"], "ended_by": "renamed", "successor": "new"},
            },
            "publications": {"repo": "me/facts", "commit": "c0ffee", "sent": None},
            "writes": {
                **{"id": 3, "state": "pending", "started_at": record["written_at"], "ended_at": None, "count": 3},
                **{"records": json.dumps(PENDING), "request": json.dumps({"goal": "fast", "rank": None})},
            },
        }
        for table, row in rows.items():
            row.pop("row_sha256", None)
            db.table(table).upsert(old_seal(row), pk=SEALED[table].key)
        db.table("meta").upsert({"name": "rows_sha256", "value": old_digest(db)}, pk="name")
    return path


@pytest.fixture
def old(before: Path, tmp_path: Path) -> Path:
    return shutil.copytree(before, tmp_path / "memory")


@pytest.fixture
def one_more_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of this package, whose records have a column ``note``, of which old rows say "none"."""
    monkeypatch.setattr(MIGRATIONS, "_migrations", list(MIGRATIONS._migrations))
    records = SEALED["records"]
    later = Sealed(records.key, (*records.versions, (*records.versions[-1], "note")))
    monkeypatch.setitem(SEALED, "records", later)

    @MIGRATIONS()
    def format_1_note(db: Database) -> None:
        db.table("records").add_column("note", str)
        db.execute("update records set note = 'none'")
        reseal(db, "records", len(later.versions))


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path / "index.db")) as connection, connection:
        connection.execute(statement)


def test_every_column_that_there_is_is_sealed(tmp_path: Path) -> None:
    with closing(Index(tmp_path / "index.db")) as index:
        index.migrate()
        for table, kind in SEALED.items():
            assert {*kind.versions[-1], "row_sha256"} == set(index.db.table(table).columns_dict), table
            assert list(kind.key) == index.db.table(table).pks
        unsealed = set(index.db.table_names()) - set(SEALED)
        assert unsealed == {"meta", "outcomes", "_sqlite_migrations"}


def test_a_store_sealed_before_seals_had_versions_opens_verifies_and_recalls(old: Path) -> None:
    with MemoryStore(old, create=False) as store:
        assert store.verify().ok
        assert store.recall("Schlüssel 🔑") == "  two  spaces\n"
        assert all(is_sealed(table, row) for table in SEALED for row in store._index.db.table(table).rows)
        assert [record.chat for record in store.records()].count(True) == 1
        pending = store.pending()
        assert pending is not None
        assert pending.records == [Record(**fields) for fields in PENDING]


@pytest.mark.usefixtures("one_more_column")
def test_a_store_sealed_before_gets_a_column_and_500_of_500_flips_are_reported(old: Path) -> None:
    with MemoryStore(old, create=False) as store:
        assert store.verify(quick=True).ok
        assert {row["note"] for row in store._index.db.table("records").rows} == {"none"}
        assert store.recall("Jerry Becerra:") == "9100672710"
    index, rng = old / "index.db", random.Random(18)
    whole, flipped, unseen = index.read_bytes(), set[str](), list[str]()
    for _ in range(500):
        what = damage_row(index, rng)
        flipped.add(what.split(" of ")[0])
        if not reported(old):
            unseen.append(what)
        for beside in old.glob("index.db-*"):
            beside.unlink()
        index.write_bytes(whole)
    assert unseen == []
    assert {"records.note", "records.row_sha256", "journal.record", "meta.value"} <= flipped
    assert not reported(old)


@pytest.mark.usefixtures("one_more_column")
def test_a_row_that_was_damaged_before_a_column_came_stays_damaged(old: Path) -> None:
    Index.open(old / "index.db").close()
    change(old, "update records set min_prob = 0.99, note = 'mine' where key = 'Jerry Becerra:' and namespace = ''")
    with closing(Index.open(old / "index.db")) as index:
        assert list(index.damaged()) == ["index row of records '', 'Jerry Becerra:'"]


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("update records set min_prob = 0.99 where namespace = ''", "index row of records"),
        ("update records set digest = cast(x'ff61' as text) where namespace = ''", "could not be read|damaged"),
        ("update writes set records = replace(records, 'key 1', 'key 7')", "index row of writes"),
        ("delete from records where namespace = ''", "rows were lost"),
        ("delete from versions", "rows were lost"),
        ("update meta set value = replace(value, 'a', 'b') where name = 'rows_sha256'", "rows were lost"),
    ],
)
def test_what_was_damaged_before_its_seal_was_renewed_is_reported_afterwards(
    old: Path, statement: str, found: str
) -> None:
    change(old, statement)
    with MemoryStore(old, create=False) as store:
        report = store.verify(quick=True)
    assert not report.ok
    if "x'ff61'" not in statement:
        assert any(found in problem for problem in report.damaged)


def test_a_lost_row_is_reported_until_it_is_repaired(old: Path) -> None:
    with closing(Index.open(old / "index.db")) as index:
        end_write(index, 3, DISCARDED)
    change(old, "delete from versions")
    with MemoryStore(old, create=False) as store:
        commit_publication(store._index, "me/facts", "0ff1ce")  # a change of other rows hides nothing
        assert store.verify(quick=True).damaged == ("index.db: rows were lost, added or replaced",)
        store.repair()
        assert store.verify(quick=True).ok


@pytest.mark.parametrize("value", ["none", "", "0x"])
def test_a_sum_that_is_none_is_not_built_upon(old: Path, value: str) -> None:
    Index.open(old / "index.db").close()
    change(old, f"update meta set value = '{value}' where name = 'rows_sum'")
    with MemoryStore(old, create=False) as store:
        with pytest.raises(IntegrityError, match="loramem repair"):
            commit_deletion(store._index, [("", "Jerry Becerra:")])
        assert "Jerry Becerra:" in store
        store.repair()
        assert store.verify(quick=True).ok


def test_rows_put_back_from_another_time_are_reported(old: Path) -> None:
    with closing(Index.open(old / "index.db")) as index:
        kept = index.db.conn.execute("select * from retired").fetchall()
        with index.change() as rows:
            rows.remove("retired")
        assert not list(index.damaged())
        index.db.conn.executemany("insert into retired values (?, ?, ?)", kept)
        assert list(index.damaged()) == ["index.db: rows were lost, added or replaced"]


def test_an_index_of_a_newer_version_is_refused_and_not_taken_for_damaged(old: Path) -> None:
    with pytest.MonkeyPatch.context() as later:
        later.setattr(MIGRATIONS, "_migrations", list(MIGRATIONS._migrations))
        MIGRATIONS(name="format_1_later")(lambda db: None)
        Index.open(old / "index.db").close()
    with pytest.raises(StoreFormatError, match="Upgrade"):
        MemoryStore(old, create=False)


def test_the_journal_of_a_write_may_be_larger_than_a_value_of_sqlite(tmp_path: Path) -> None:
    records = [Record(f"key {n}", "0123456789" * 100) for n in range(20)]
    with closing(Index(tmp_path / "index.db")) as index:
        index.migrate()
        index.db.conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        index.begin_write(records, {})
        pending = index.pending_write()
        assert pending is not None and pending.records == records
        assert index.pending_count() == 20
        assert not list(index.damaged())


def test_a_row_of_the_journal_has_many_records_and_one_that_is_lost_is_missed(tmp_path: Path) -> None:
    records = [Record(f"key {n}", f"{n}", metadata={"n": n}) for n in range(500)]
    with closing(Index(tmp_path / "index.db")) as index:
        index.migrate()
        index.begin_write(records, {})
        pending, rows = index.pending_write(), index.db.table("journal").count
        assert pending is not None and pending.records == records
        assert 2 < rows < 20
        index.db.execute("delete from journal where number = 1")
        with pytest.raises(IntegrityError, match="journal of write 1 is damaged"):
            index.pending_write()
        commit_repair(index, [], [], [])
        assert index.pending_write() is None and index.db.table("journal").count == 0
        assert not list(index.damaged())


def test_many_rows_are_put_found_and_replaced_together(tmp_path: Path) -> None:
    records = [Record(f"key {n}", "1", "ab"[n % 2]) for n in range(2 * TOGETHER + 1)]
    rows = [
        stored_record(record, prompt_digest([n]), 1, "adapter", 0.9, keep_value=True)
        for n, record in enumerate(records)
    ]
    with closing(Index(tmp_path / "index.db")) as index:
        index.migrate()
        for some in (rows, rows[::3]):  # the second time in the place of others
            commit_write(index, index.begin_write([], {}), [], some)
        known = {(row.namespace, row.key): row for row in rows}
        assert index.find_many([*known, ("a", "no such key"), ("c", "key 0")]) == known
        prompts = {(row.namespace, row.prompt_sha256): row.key for row in rows}
        assert index.find_prompts([*prompts, ("a", "0" * 64)]) == prompts
        assert index.next_id("versions") == len(rows[::3]) + 1
        assert not list(index.damaged())


def test_a_row_larger_than_sqlite_takes_is_not_called_damage(old: Path) -> None:
    with MemoryStore(old, create=False) as store:
        store._index.db.conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        with pytest.raises(StoreError, match="that large"), store._turn():
            store._index.begin_write([Record("key", "0" * 20_000)], {})
        assert store.verify(quick=True).ok


@pytest.mark.parametrize(
    "statement",
    [
        "delete from journal where number = 2",
        "update journal set record = replace(record, 'key 1', 'key 7')",
        "update writes set count = 2 where state = 'pending'",
    ],
)
def test_a_damaged_journal_is_not_resumed_and_repair_forgets_it(old: Path, statement: str) -> None:
    Index.open(old / "index.db").close()
    change(old, statement)
    with MemoryStore(old, create=False) as store:
        with pytest.raises(IntegrityError, match="journal of write 3 is damaged"):
            store.resume()
        store.repair()
        assert store.pending() is None
        assert store.verify(quick=True).ok
        assert store._index.db.table("journal").count == 0


@pytest.mark.parametrize("end", [lambda store: store.discard(), lambda store: store.resume()])
def test_the_journal_of_an_older_version_is_finished(old: Path, end: Callable[[MemoryStore], object]) -> None:
    request = {"goal": "fast", "rank": 1, "partial": False, "settings": {"max_rank": 8}}
    with closing(Index.open(old / "index.db")) as index, index.change() as rows:
        (row,) = index.db.table("writes").rows_where("id = 3")
        rows.put("writes", {**row, "request": json.dumps(request)})
    with MemoryStore(old, create=False) as store:
        end(store)
        assert store.pending() is None
        assert store._index.db.table("journal").count == 0
        assert store.verify(quick=True).ok
