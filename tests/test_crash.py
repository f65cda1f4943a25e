"""A write that is killed, interrupted or refused leaves every committed record as it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loramem import MemoryStore, WriterSettings
from loramem.errors import StoreLocked, UnfinishedWrite, WriteError

from .conftest import numbers

BEFORE, LATER = {"old": "1234"}, numbers(5)

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


@pytest.fixture
def killed(base: Path, tmp_path: Path) -> Path:
    """A store with one committed record, whose second write was killed with SIGKILL while training."""
    import json

    path = tmp_path / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(BEFORE)
    done = subprocess.run([sys.executable, "-c", WRITER, str(path), json.dumps(LATER)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    return path


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
