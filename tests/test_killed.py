"""Processes that change a store are killed at random moments and at every named event; nothing is lost."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loramem import MemoryStore
from loramem._util.events import NAMES

from .conftest import ROOT, numbers

KILLED_AT = """
import logging, os, shutil, sys
from tests.killing import KillAt
from loramem import MemoryStore

for event in sys.argv[3:]:
    path = shutil.copytree(sys.argv[1], os.path.join(sys.argv[2], event))
    if os.fork() == 0:
        try:
            events = logging.getLogger("loramem._util.events")
            events.setLevel(logging.INFO)
            events.addHandler(KillAt(event, 1))
            store = MemoryStore(path, create=False)
            store.write({"key 0": "other", "new": "1"}, on_conflict="replace")
            store.delete("key 1")
            store.compact()
            store.erase("key 2")
            store.repair()
        finally:
            os._exit(1)
    print(event, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def kill_many(base: Path | str, folder: Path, kills: int, seed: int) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "tests.killing", str(base), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_few_kills_at_random_lose_nothing(base: Path, tmp_path: Path) -> None:
    said = kill_many(base, tmp_path / "run", 6, seed=3)
    assert re.fullmatch(r"6 kills, nothing lost; opened in \d+\.\d{3} s \(median\), \d+\.\d{3} s at most\n", said), said


@pytest.mark.slow
def test_many_kills_at_random_lose_nothing(base: Path, tmp_path: Path) -> None:
    assert kill_many(base, tmp_path / "run", 300, seed=5).startswith("300 kills, nothing lost")


@pytest.mark.slow
def test_kills_over_the_embedded_base_lose_nothing(tmp_path: Path) -> None:
    assert kill_many("loramem-tiny", tmp_path / "run", 5, seed=7).startswith("5 kills, nothing lost")


AFTER = {
    "journalled": ({"key 0", "key 1", "key 2", "key 3"}, True),
    "trained": ({"key 0", "key 1", "key 2", "key 3"}, True),
    "installed": ({"key 0", "key 1", "key 2", "key 3"}, True),
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
def killed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores by the event that their process was killed at; one that did the imports forks them all."""
    folder = tmp_path_factory.mktemp("killed")
    with MemoryStore(folder / "before", str(base)) as store:
        store.write(numbers(4))
    command = [sys.executable, "-W", "ignore", "-c", KILLED_AT, str(folder / "before"), str(folder), *NAMES]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{event} {-signal.SIGKILL}" for event in NAMES], done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("event", NAMES)
def test_killed_at_a_named_event_the_store_is_whole(killed: Path, event: str) -> None:
    path = killed / event
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
