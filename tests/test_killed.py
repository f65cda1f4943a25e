"""Processes that change a store are killed at random moments and at every named event; nothing is lost."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loramem import MemoryStore
from loramem.events import NAMES

from .conftest import ROOT, numbers

KILLED_AT = """
import logging, sys
from tests.killing import KillAt
from loramem import MemoryStore

events = logging.getLogger("loramem.events")
events.setLevel(logging.INFO)
events.addHandler(KillAt(sys.argv[2], 1))
store = MemoryStore(sys.argv[1], create=False)
store.write({"key 0": "other", "new": "1"}, on_conflict="replace")
store.delete("key 1")
store.compact()
store.erase("key 2")
store.repair()
print("survived")
"""


def kill_many(base: Path, folder: Path, kills: int, seed: int) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "tests.killing", str(base), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_few_kills_at_random_lose_nothing(base: Path, tmp_path: Path) -> None:
    assert kill_many(base, tmp_path / "run", 6, seed=3) == "6 kills, nothing lost\n"


@pytest.mark.slow
def test_many_kills_at_random_lose_nothing(base: Path, tmp_path: Path) -> None:
    assert kill_many(base, tmp_path / "run", 300, seed=5) == "300 kills, nothing lost\n"


OFTEN = ("published", "committed", "forgotten")
AFTER = {
    "journalled": ({"key 0", "key 1", "key 2", "key 3"}, True),
    "trained": ({"key 0", "key 1", "key 2", "key 3"}, True),
    "published": ({"key 0", "key 1", "key 2", "key 3"}, True),
    "committed": ({"key 0", "key 1", "key 2", "key 3", "new"}, False),
    "cleaned": ({"key 0", "key 1", "key 2", "key 3", "new"}, False),
    "collected": ({"key 0", "key 1", "key 2", "key 3", "new"}, False),
    "deleted": ({"key 0", "key 2", "key 3", "new"}, False),
    "compacted": ({"key 0", "key 2", "key 3", "new"}, False),
    "forgotten": ({"key 0", "key 3", "new"}, False),
    "vacuumed": ({"key 0", "key 3", "new"}, False),
    "repaired": ({"key 0", "key 3", "new"}, False),
}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(numbers(4))
    return path


@pytest.mark.parametrize(
    "event", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_killed_at_a_named_event_the_store_is_whole(written: Path, tmp_path: Path, event: str) -> None:
    path = shutil.copytree(written, tmp_path / "memory")
    command = [sys.executable, "-W", "ignore", "-c", KILLED_AT, str(path), event]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    keys, pending = AFTER[event]
    expected = {key: value for key, value in numbers(4).items() if key in keys}
    if "new" in keys:
        expected |= {"key 0": "other", "new": "1"}
    with MemoryStore(path, create=False) as store:
        assert {recall.key: recall.value for recall in store.recall_many()} == expected
        assert store.verify(quick=True).ok
        assert (store.pending() is not None) == pending
        if pending:
            assert store.resume().written == 2
        store.gc(grace_s=0)  # what was left undone is finished here
        assert not (path / "staging").exists()
        assert store.verify(quick=True).ok
        assert {folder.name for folder in (path / "adapters").iterdir()} == {adapter.id for adapter in store.adapters()}
