"""Backups, exports and imports; repair; the lock; read-only media."""

import errno
import gzip
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from loramem import MemoryStore, Record
from loramem.errors import BundleError, IntegrityError, RecallError, StoreError, StoreLocked, StoreReadOnly

from .conftest import numbers
from .test_integrity import execute, flip_bit

FIRST, SECOND = numbers(3), {"a": "12", "b": "345"}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("copies") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(FIRST)
        store.write([Record(key, value, "team", {"of": "Ann"}) for key, value in SECOND.items()])
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "memory")


@pytest.fixture
def store(path: Path) -> MemoryStore:
    return MemoryStore(path, create=False)


def values(store: MemoryStore) -> dict[str, str]:
    return {recall.key: recall.value for name in store.namespaces() for recall in store.recall_many(namespace=name)}


def private(folder: Path) -> bool:
    return all(path.stat().st_mode & 0o077 == 0 for path in [folder, *folder.rglob("*")])


def test_a_backup_of_a_live_store_is_a_store(store: MemoryStore, tmp_path: Path) -> None:
    store.delete("key 0")
    store.compact()
    size = store.backup(tmp_path / "copy")
    assert size > 0
    store.delete("key 1")
    with MemoryStore(tmp_path / "copy", create=False) as copy:
        assert values(copy) == {key: value for key, value in {**FIRST, **SECOND}.items() if key != "key 0"}
        assert copy.verify(quick=True).ok
        assert len(list((copy.path / "adapters").iterdir())) == len(copy.adapters())
    assert private(tmp_path / "copy")
    with pytest.raises(StoreError, match="exists already"):
        store.backup(tmp_path / "copy")


def test_damage_is_not_backed_up(store: MemoryStore, tmp_path: Path) -> None:
    flip_bit(next((store.path / "adapters").glob("*/*.safetensors")), 4000)
    with pytest.raises(IntegrityError):
        store.backup(tmp_path / "copy")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["memory"]


@pytest.mark.parametrize("name", ["bundle", "bundle.tar"])
def test_an_export_is_imported_whole_and_names_no_folder_of_this_machine(
    store: MemoryStore, base: Path, tmp_path: Path, name: str
) -> None:
    store.export(tmp_path / name)
    files = [tmp_path / name] if name.endswith(".tar") else [p for p in (tmp_path / name).rglob("*") if p.is_file()]
    assert not any(str(base).encode() in file.read_bytes() for file in files)
    MemoryStore.import_bundle(tmp_path / name, tmp_path / "imported").close()
    assert private(tmp_path / "imported")
    with MemoryStore(tmp_path / "imported", str(base), create=False) as imported:
        assert values(imported) == {**FIRST, **SECOND}
        assert [record.metadata for record in imported.records("team")] == [{"of": "Ann"}] * 2
        assert imported.verify().ok
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["memory", name, "imported"])


def test_damaged_and_strange_bundles_are_refused(store: MemoryStore, tmp_path: Path) -> None:
    store.export(tmp_path / "good")
    manifest = json.loads((tmp_path / "good" / "bundle.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(BundleError, match=match):
            MemoryStore.import_bundle(tmp_path / "bad", tmp_path / "imported")
        assert not (tmp_path / "imported").exists()
        shutil.rmtree(tmp_path / "bad")

    def copy(**changed: object) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        (tmp_path / "bad" / "bundle.json").write_text(json.dumps({**manifest, **changed}))
        return tmp_path / "bad"

    flip_bit(next(copy().rglob("*.safetensors")), 999)
    refused("not what was exported")
    copy(files={**manifest["files"], "../../evil": "0" * 64})
    refused("evil")
    copy(format=9)
    refused("format 9")
    shutil.copytree(store.path, tmp_path / "bad")
    refused("no readable bundle.json")
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        member = tarfile.TarInfo("bundle.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(BundleError):
        MemoryStore.import_bundle(tmp_path / "link.tar", tmp_path / "imported")


def test_a_copy_is_synced_before_it_has_its_name(store: MemoryStore, tmp_path: Path, monkeypatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    for name in ("backup", "bundle", "bundle.tar"):
        target = tmp_path / name
        synced.clear()
        store.backup(target) if name == "backup" else store.export(target)
        made = target.with_name(f"{name}.partial") / ("packed" if target.is_file() else "store")
        last = len(synced) - 1 - synced[::-1].index(str(tmp_path))  # the directory of the new name
        for path in [target, *target.rglob("*")]:
            assert str(made / path.relative_to(target)) in synced[:last], path


def test_what_a_killed_export_left_is_removed(store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "bundle.tar.partial").write_text("cut")
    store.export(tmp_path / "bundle.tar")
    (tmp_path / "bundle.partial" / "store").mkdir(parents=True)
    (tmp_path / "bundle.partial" / "store" / "index.db").write_text("cut")
    store.export(tmp_path / "bundle")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "bundle.tar", "memory"]


def test_what_is_erased_during_a_backup_is_not_in_it(store: MemoryStore, tmp_path: Path, monkeypatch) -> None:
    from loramem.store import copies

    copied, before = [], {adapter.id for adapter in store.adapters()}

    def copy(source: Path, target: Path) -> None:
        copy_synced(source, target)
        copied.append(source.parent.name)
        if len(copied) == 3:  # all files of the first adapter
            with MemoryStore(store.path, create=False) as other:
                other.erase(list(FIRST))
                other.erase(list(SECOND), "team")
                other.write({"new": "1"})

    copy_synced = copies.copy_synced
    monkeypatch.setattr(copies, "copy_synced", copy)
    store.backup(tmp_path / "copy")
    with MemoryStore(tmp_path / "copy", create=False) as backup:
        assert values(backup) == {"new": "1"}
        assert not before & {path.name for path in (backup.path / "adapters").iterdir()}


def test_a_cut_export_and_a_full_disk_are_told_apart(store: MemoryStore, tmp_path: Path, monkeypatch) -> None:
    store.export(tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    for name, content in (("cut.tar", whole[:40_000]), ("cut.tar.gz", gzip.compress(whole)[:3000])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BundleError):
            MemoryStore.import_bundle(tmp_path / name, tmp_path / "imported")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loramem.store.copies.write_synced", full)
    with pytest.raises(OSError, match="No space"):
        MemoryStore.import_bundle(tmp_path / "whole.tar", tmp_path / "imported")
    assert not [entry for entry in tmp_path.iterdir() if "imported" in entry.name]


def test_damaged_adapters_are_repaired_from_the_values_that_are_kept(store: MemoryStore) -> None:
    before = [adapter.id for adapter in store.adapters()]
    for weights in (store.path / "adapters").glob("*/*.safetensors"):
        flip_bit(weights, 12_000)
    report = store.repair()
    assert (report.repaired, report.adapters, report.lost, report.missing) == (5, 2, (), 0)
    assert [adapter.id for adapter in store.adapters()] == before  # the same bytes again
    assert values(store) == {**FIRST, **SECOND}
    assert [record.metadata for record in store.records("team")] == [{"of": "Ann"}] * 2
    assert store.verify().ok


def test_nothing_is_repaired_where_nothing_is_damaged(store: MemoryStore) -> None:
    assert store.repair().repaired == 0
    assert store.verify().ok


@pytest.mark.parametrize(
    "statement",
    [
        "update records set digest = 'x' where key = 'key 1'",
        "update records set value = 'wrong' where key = 'key 1'",
        "update records set metadata = '{' where key = 'key 1'",
        "update records set min_prob = 0.99 where key = 'key 1'",
        "update adapters set rank = rank + 1",
        "delete from adapters",
        "delete from retired",
        "update versions set key = 'other'",
    ],
)
def test_damaged_rows_are_repaired(path: Path, statement: str) -> None:
    with MemoryStore(path, create=False) as store:
        store.delete("key 2")
    execute(path, statement)
    with MemoryStore(path, create=False) as store:
        store.repair()
        assert values(store) == {**{key: FIRST[key] for key in ("key 0", "key 1")}, **SECOND}
        assert store.verify().ok


@pytest.mark.parametrize(
    "damaged", ["min_prob = 0.99", "answer_tokens = 1", "answer_tokens = 'abc'", "digest = x'ff00'"]
)
@pytest.mark.parametrize("keep_values", [True, False])
def test_a_repaired_row_says_what_was_trained_and_holds_a_value_only_where_values_are_kept(
    base: Path, tmp_path: Path, keep_values: bool, damaged: str
) -> None:
    path = tmp_path / "memory"
    with MemoryStore(path, str(base), keep_values=keep_values) as store:
        store.write({"secret": "4815162342", "other": "7"})
        before = {record.key: record for record in store.records()}
    execute(path, f"update records set {damaged} where key = 'secret'")
    with MemoryStore(path, create=False) as store:
        if damaged.startswith("digest") and not keep_values:
            assert store.repair().lost == ("secret",)
            return
        assert store.repair().repaired == 2
        assert {record.key: record for record in store.records()} == before
        assert values(store) == {"secret": "4815162342", "other": "7"}
        assert store.verify().ok
    held = [file.name for file in path.iterdir() if file.is_file() and b"4815162342" in file.read_bytes()]
    assert bool(held) == keep_values


def test_lost_records_are_named_and_only_dropped_on_request(path: Path) -> None:
    execute(path, "update records set digest = 'x', value = 'wrong' where key = 'key 1'")
    execute(path, "delete from records where key = 'key 2'")
    with MemoryStore(path, create=False) as store:
        report = store.repair()
        assert (report.lost, report.missing) == (("key 1",), 1)
        with pytest.raises((RecallError, IntegrityError)):
            store.recall("key 1")
        assert store.recall("key 0") == FIRST["key 0"]
        assert store.repair(drop_lost=True).lost == ("key 1",)
        assert values(store) == {"key 0": FIRST["key 0"], **SECOND}
        assert store.verify().ok


HOLDER = """
import sys
from pathlib import Path
from loramem.index.lock import write_lock

with write_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_the_error_says_who_is_writing_and_a_killed_writer_leaves_no_lock(path: Path) -> None:
    with MemoryStore(path, create=False, wait_s=0.2) as store, holder(path) as process:
        with pytest.raises(StoreLocked, match=str(process.pid)) as caught:
            store.delete("key 0")
        assert (caught.value.pid, caught.value.host) == (process.pid, os.uname().nodename)
        assert caught.value.since
        assert store.recall("key 0") == FIRST["key 0"]
        process.kill()
        process.wait()
        assert store.delete("key 0") == 1
    assert not (path / "store.holder").exists()


def test_a_writer_that_cannot_say_who_it_is_writes_all_the_same(path: Path) -> None:
    (path / "store.holder").mkdir()  # what cannot be written stands for a full disk, on which deleting makes room
    with MemoryStore(path, create=False) as store:
        assert store.delete("key 0") == 1


def test_a_writer_waits_for_another(path: Path) -> None:
    import threading

    with MemoryStore(path, create=False, wait_s=30) as store, holder(path) as process:
        timer = threading.Timer(0.3, process.communicate)
        timer.start()
        assert store.delete("key 0") == 1
        timer.join()


def test_a_store_that_cannot_be_written_is_read(path: Path, monkeypatch) -> None:
    before = sorted(path.rglob("*"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not stop root
    with MemoryStore(path, create=False) as store:
        assert values(store) == {**FIRST, **SECOND}
        assert store.verify(quick=True).ok
        with pytest.raises(StoreReadOnly):
            store.delete("key 0")
    assert sorted(path.rglob("*")) == before
    (path / "index.db-wal").write_bytes(b"commits that index.db does not hold")
    with pytest.raises(StoreReadOnly, match="commits"):
        MemoryStore(path, create=False)


@pytest.mark.parametrize(
    ("code", "kind"), [("BUSY", StoreError), ("IOERR_READ", StoreError), ("CORRUPT", IntegrityError)]
)
def test_a_database_that_cannot_be_read_now_is_not_called_damaged(path: Path, monkeypatch, code: str, kind) -> None:
    def fail(_: object) -> None:
        error = sqlite3.OperationalError("said by SQLite")
        error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")
        raise error

    monkeypatch.setattr("loramem.index.sealed_database.connect", fail)
    with pytest.raises(kind, match="said by SQLite"):
        MemoryStore(path, create=False)


def test_an_older_format_is_brought_up_to_date_by_one_process_alone(tmp_path: Path, monkeypatch) -> None:
    from .test_changes import copy_of_format_1

    path = copy_of_format_1(tmp_path / "memory")
    monkeypatch.setattr("loramem.index.sealed_database.BUSY_S", 0.1)
    with holder(path) as process:
        with pytest.raises(StoreLocked):
            MemoryStore(path, create=False)
        process.communicate()
    with MemoryStore(path, create=False) as store:
        assert store.recall("Jerry Becerra:") == "9100672710"


def test_a_store_of_an_older_format_is_read_where_it_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    from .test_changes import copy_of_format_1

    path = copy_of_format_1(tmp_path / "memory")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with MemoryStore(path, create=False) as store:
        assert store.recall("Jerry Becerra:") == "9100672710"
        assert len(store.history("Jerry Becerra:")) == 1
