"""A write that is killed, interrupted or refused leaves every committed record as it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loramem import MemoryStore, Record, WriterSettings
from loramem._util import files
from loramem.errors import StoreFormatError, StoreLocked, UnfinishedWrite, WriteError
from loramem.records.record import as_records

from .conftest import numbers

BEFORE, LATER = {"old": "1234"}, numbers(5, digits=9)  # longer than what stands in the files by chance

WRITER = """
import json, os, signal, sys
from loramem import MemoryStore

def progress(told):
    if told.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

store = MemoryStore(sys.argv[1], create=False)
store.write(json.loads(sys.argv[2]), progress=progress)
"""

HOLDER = """
import sys
from filelock import FileLock

with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def killed_once(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crash") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(BEFORE)
    done = subprocess.run([sys.executable, "-c", WRITER, str(path), json.dumps(LATER)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    return path


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A store with one committed record, whose second write was killed with SIGKILL while training."""
    return shutil.copytree(killed_once, tmp_path / "memory")


def test_a_killed_write_leaves_earlier_records_readable_and_is_visible(killed: Path) -> None:
    with MemoryStore(killed, create=False) as store:
        assert store.recall("old") == "1234"
        assert len(store) == 1
        assert store.stats().unfinished_records == 5
        assert store.verify().ok
        with pytest.raises(UnfinishedWrite, match="--resume") as caught:
            store.write({"other": "1"})
        assert caught.value.records == 5


def test_a_killed_write_can_be_resumed(killed: Path) -> None:
    with MemoryStore(killed, create=False) as store:
        report = store.resume()
        assert report.written == 5
        assert {key: store.recall(key) for key in LATER} == LATER
        assert store.pending() is None


def test_a_killed_write_can_be_discarded_and_its_values_are_forgotten(killed: Path) -> None:
    with MemoryStore(killed, create=False) as store:
        assert store.discard() == 5
        assert store.pending() is None
        store.write({"other": "42"})
        assert store.recall("other") == "42"
    for path in killed.rglob("*"):
        if path.is_file():
            assert LATER["key 0"].encode() not in path.read_bytes()


def test_a_resumed_write_keeps_its_plan_and_gc_what_it_had_proved(base: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def again(*_: object, **__: object) -> None:
        raise AssertionError("done before")

    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("loramem.store.write.commit_write", interrupt)
            store.write([Record(key, value, space) for space in "xy" for key, value in LATER.items()])
        assert len(list((store.path / "adapters").iterdir())) == 2
        store.gc(grace_s=0)
        with monkeypatch.context() as patched:
            patched.setattr("loramem.store.planner.Planner.plan", again)  # it may come to something else by now
            patched.setattr("loramem.training.shards.train_shard", again)
            assert store.resume().written == 10
        assert store.verify().ok


def test_files_then_their_folder_then_its_name_then_the_row(base: Path, tmp_path: Path, monkeypatch) -> None:
    order: list[tuple[str, Path | str]] = []
    fsync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        order.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        rename(source, target)
        order.append(("rename", Path(target)))

    with MemoryStore(tmp_path / "memory", str(base)) as store:
        assert list(store._index.db.query("pragma synchronous")) == [{"synchronous": 2}]  # FULL: COMMIT syncs
        store._index.db.conn.set_trace_callback(
            lambda statement: order.append(("sql", statement.split("(")[0].strip().lower()))
        )
        monkeypatch.setattr(os, "fsync", note_sync)
        monkeypatch.setattr(os, "rename", note_rename)
        (adapter,) = store.write(LATER).adapters
        store._index.db.conn.set_trace_callback(None)
    published = store.path / "adapters" / adapter
    renamed = order.index(("rename", published))
    staged = next(path for what, path in order if what == "sync" and Path(path).name == adapter)
    assert isinstance(staged, Path) and "staging" in staged.parts
    synced = [path for what, path in order[:renamed] if what == "sync"]
    for file in published.iterdir():
        assert synced.index(staged / file.name) < synced.index(staged)
    staging = staged.parent.parent  # which has the job's own name
    assert synced.index(staged) < synced.index(staged.parent) < synced.index(staging)
    row = next(
        place for place, (what, text) in enumerate(order) if what == "sql" and str(text) == 'insert into "records"'
    )
    commit = order.index(("sql", "commit"), row)
    assert renamed < order.index(("sync", published.parent), renamed) < row < commit
    assert order.index(("sql", "commit")) < order.index(("sync", staged))  # the journal comes before all


def test_a_name_that_was_given_before_is_synced_all_the_same(tmp_path: Path, monkeypatch) -> None:
    synced: list[Path] = []
    for folder in ("staged", "adapters/one"):
        files.write_directory(tmp_path / folder, {"file": b"content"})
    monkeypatch.setattr(files, "sync_directory", synced.append)
    files.rename_directories({tmp_path / "staged": tmp_path / "adapters" / "one"})
    assert synced == [tmp_path / "adapters"]


def test_there_is_nothing_to_resume_after_a_finished_write(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(BEFORE)
        with pytest.raises(WriteError, match="no interrupted write"):
            store.resume()


def test_an_interrupt_leaves_the_write_to_be_resumed(base: Path, tmp_path: Path) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with pytest.raises(KeyboardInterrupt):
            store.write(LATER, progress=interrupt)
        assert len(store) == 0
        assert store.resume().written == 5


def test_a_journal_that_names_retired_settings_is_resumed(base: Path, tmp_path: Path) -> None:
    old = json.loads(
        """{"batch_records": 25, "batch_tokens": 8192, "certify_threshold": 0.6, "curriculum": false,
        "learning_rate": 0.06, "long_tokens": 200, "max_grad_norm": 1.0, "max_rank": 64, "objective": "memft-sw",
        "optimizer": "muon", "patience_passes": 40, "precision": "auto", "restarts": 2, "seed": 0, "start": "random",
        "train_threshold": 0.9}"""
    )
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        request = {"goal": "fast", "rank": None, "partial": False, "settings": old}
        store._index.begin_write(as_records(LATER), request)
        assert store.resume().written == 5
        assert next(store._index.adapters()).training["settings"] == WriterSettings(max_rank=64).to_json()
    with pytest.raises(StoreFormatError, match="unknown"):
        WriterSettings.saved({**old, "unknown": 1})


def test_a_second_writer_is_refused_while_readers_go_on(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(BEFORE)
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path / "store.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(StoreLocked):
                store.write(LATER)
            assert store.recall("old") == "1234"
            holder.communicate()
        assert store.write({"k": "7"}, settings=WriterSettings(seed=1)).written == 1
