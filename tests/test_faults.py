"""File operations that fail, one after the other; bits that flip; processes that contend; a dict as the model."""

import errno
import io
import itertools
import os
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from loramem import KeyNotFound, MemoryStore
from loramem.errors import LoramemError, RecordError

from . import damage
from .conftest import ROOT, numbers

# Stores share one base here, which PEFT warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT"),
]
OPERATIONS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")  # of os, and io.open


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(numbers(3))
        store.write({"a": "1"})
    return path


@contextmanager
def failing(number: int, code: int, store: Path) -> Iterator[Callable[[], bool]]:
    """Let the n-th file operation in a store fail; tells whether it came to that."""
    left = itertools.count(number - 1, -1)
    failed: list[str] = []

    def shim(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(target: Any, *args: Any, **kwargs: Any) -> Any:
            descriptor = target if isinstance(target, int) else kwargs.get("dir_fd")
            where = Path(target) if descriptor is None else Path(f"/proc/self/fd/{descriptor}").readlink()
            if store in (where, *where.parents) and not failed and next(left) == 0:
                failed.append(name)
                raise OSError(code, os.strerror(code), str(where))
            return real(target, *args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patched:
        for name in OPERATIONS:
            patched.setattr(os, name, shim(name, getattr(os, name)))
        patched.setattr(io, "open", shim("io.open", io.open))
        yield lambda: bool(failed)


@pytest.mark.parametrize("change", ["write", "compact", "erase"])
@pytest.mark.parametrize(
    ("code", "step"),
    [
        (errno.ENOSPC, 5),
        *(pytest.param(code, 1, marks=pytest.mark.slow) for code in (errno.ENOSPC, errno.EIO, errno.EACCES)),
    ],
)
def test_whichever_file_operation_fails_the_committed_state_is_readable(
    written: Path, tmp_path: Path, change: str, code: int, step: int
) -> None:
    before = {**numbers(3), "a": "1"}
    with MemoryStore(written, create=False) as opened:
        base = opened.base  # loaded once
    # Every operation in the slow run, every fifth here; the first that nothing is left for ends it.
    for number in itertools.count(1, step):
        path = shutil.copytree(written, tmp_path / str(number))
        with MemoryStore(path, create=False) as store:
            store._session.base = base
            changes = {
                "write": lambda store=store: store.write({"new": "2", "a": "3"}, on_conflict="replace"),
                "compact": lambda store=store: store.compact(),
                "erase": lambda store=store: store.erase("a"),
            }
            after = {"write": {**before, "new": "2", "a": "3"}, "compact": before, "erase": numbers(3)}[change]
            with failing(number, code, path) as came:
                try:
                    changes[change]()
                    raised = False
                except (OSError, LoramemError):
                    raised = True
        with MemoryStore(path, create=False) as store:
            store._session.base = base
            held = {recall.key: recall.value for recall in store.recall_many()}
            assert held in ([before, after] if raised else [after]), (number, change)
            assert store.verify(quick=True).ok
        shutil.rmtree(path)
        if not came():
            return


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_what_was_committed_readable(base: Path, tmp_path: Path) -> None:
    expected: dict[str, str] = {}
    with mounted(tmp_path / "disk", "1200k") as disk, MemoryStore(disk / "memory", str(base)) as store:
        with pytest.raises((OSError, LoramemError)):
            for number in range(100):
                store.write({f"key {number}": f"{number}"})
                expected[f"key {number}"] = f"{number}"
        assert {recall.key: recall.value for recall in store.recall_many()} == expected
        with MemoryStore(store.path, create=False) as again:
            assert {recall.key: recall.value for recall in again.recall_many()} == expected
            assert again.verify(quick=True).ok
    assert len(expected) > 1


@pytest.mark.slow
def test_wherever_a_write_fills_the_disk_what_was_committed_is_readable(written: Path, tmp_path: Path) -> None:
    before, page = {**numbers(3), "a": "1"}, 4096
    with MemoryStore(written, create=False) as opened:
        base = opened.base
    with mounted(tmp_path / "disk", "6m") as disk:
        for free in itertools.count(0, 2 * page):  # SQLite's own writes fail as well
            path, filler = shutil.copytree(written, disk / "memory"), disk / "filler"
            with MemoryStore(path, create=False) as store:
                store._session.base = base
                filler.write_bytes(b"0" * (shutil.disk_usage(disk).free - free))
                try:
                    store.write({"new": "2", "a": "3"}, on_conflict="replace")
                    raised = False
                except (OSError, LoramemError):
                    raised = True
                filler.unlink()
            with MemoryStore(path, create=False) as store:
                store._session.base = base
                held = {recall.key: recall.value for recall in store.recall_many()}
                assert held == (before if raised else {**before, "new": "2", "a": "3"}), free
                assert store.verify(quick=True).ok
                if store.pending() is not None:
                    assert store.resume().written == 2
            shutil.rmtree(path)
            if not raised:
                return


def test_a_store_on_a_read_only_medium_is_read(written: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "4m") as disk:
        path = shutil.copytree(written, disk / "memory")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with MemoryStore(path, create=False) as store:
            assert {recall.key: recall.value for recall in store.recall_many()} == {**numbers(3), "a": "1"}
            assert store.verify(quick=True).ok
            with pytest.raises(LoramemError, match="cannot be written"):
                store.delete("a")


def test_flipped_bits_and_lost_rows_are_reported_by_the_quick_check(written: Path, tmp_path: Path) -> None:
    path = shutil.copytree(written, tmp_path / "memory")
    with MemoryStore(path, create=False) as store:
        store.delete("a")  # a row in every table
    assert damage.main(path, 120, seed=1) == ([], [])


@pytest.mark.slow
def test_two_thousand_flipped_bits_are_reported(written: Path) -> None:
    assert damage.main(written, 2000, seed=2) == ([], [])


def test_files_cut_zeroed_or_swapped_are_reported(written: Path) -> None:
    assert damage.main(written, 40, seed=3, how=damage.ruin) == ([], [])


@pytest.mark.slow
def test_a_thousand_files_cut_zeroed_or_swapped_are_reported(written: Path) -> None:
    assert damage.main(written, 1000, seed=4, how=damage.ruin) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("how", [damage.flip, damage.ruin])
def test_damage_of_a_store_over_the_embedded_base_is_reported(tmp_path: Path, how: damage.Damage) -> None:
    with MemoryStore(tmp_path / "memory") as store:
        store.write(numbers(6))
        store.erase("key 0")  # what it leaves is no hole
    assert damage.main(tmp_path / "memory", 100, seed=5, how=how) == ([], [])


def test_a_damaged_write_ahead_log_gives_one_state_or_the_other(written: Path, tmp_path: Path) -> None:
    rng, before = random.Random(6), {**numbers(3), "a": "1"}
    path = shutil.copytree(written, tmp_path / "memory")
    with MemoryStore(path, create=False) as store:
        base = store.base
        store.delete("a")
        shutil.copytree(path, tmp_path / "killed")  # as a killed process leaves it: the commit is in the log alone
    seen = set()
    for number in range(12):
        path = shutil.copytree(tmp_path / "killed", tmp_path / str(number))
        log = bytearray((path / "index.db-wal").read_bytes())
        if number:
            log[rng.randrange(len(log))] ^= 1 << rng.randrange(8)
        (path / "index.db-wal").write_bytes(log)
        with MemoryStore(path, create=False) as store:
            store._session.base = base
            held = {recall.key: recall.value for recall in store.recall_many()}
            assert held in (before, numbers(3))
            assert store.verify(quick=True).ok
        seen.add("a" in held)
    assert seen == {True, False}


WRITER = """
import sys
from loramem import MemoryStore

path, base, name, count = sys.argv[1:]
with MemoryStore(path, base, wait_s=600) as store:
    for number in range(int(count)):
        store.write({f"{name} {number}": f"{number}{name}"})
"""


def contend(path: Path, base: Path, processes: int, writes: int) -> dict[str, str]:
    names = string.ascii_lowercase[:processes]
    running = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", WRITER, str(path), str(base), name, str(writes)])
        for name in names
    ]
    assert [process.wait() for process in running] == [0] * processes
    return {f"{name} {number}": f"{number}{name}" for name in names for number in range(writes)}


@pytest.mark.parametrize(("processes", "writes"), [(2, 2), pytest.param(8, 50, marks=pytest.mark.slow)])
def test_contending_processes_lose_and_duplicate_nothing(
    base: Path, tmp_path: Path, processes: int, writes: int
) -> None:
    MemoryStore(tmp_path / "memory", str(base)).close()
    expected = contend(tmp_path / "memory", base, processes, writes)
    with MemoryStore(tmp_path / "memory", create=False) as store:
        assert {recall.key: recall.value for recall in store.recall_many()} == expected
        assert store.verify(quick=True).ok


CREATOR = """
import sys
from loramem import MemoryStore
from loramem.models import base_model

base_model.load_base_model(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with MemoryStore(sys.argv[1], sys.argv[2]) as store:
    assert store.verify(quick=True).ok
"""


def test_processes_that_create_one_store_at_once_share_it(base: Path, tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CREATOR, str(tmp_path / "memory"), str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in running:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        process.communicate()  # closes its streams
    assert [process.returncode for process in running] == [0] * 2


def test_a_store_that_another_process_made_meanwhile_is_opened(base: Path, tmp_path: Path, monkeypatch) -> None:
    from loramem.models import base_model

    load, path = base_model.load_base_model, tmp_path / "memory"

    def slow(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(base_model, "load_base_model", load)
        with MemoryStore(path, str(base)) as other:
            other.write({"a": "1"})
        return load(*args, **kwargs)

    monkeypatch.setattr(base_model, "load_base_model", slow)
    with MemoryStore(path, str(base)) as store:
        assert store.recall("a") == "1"
        assert store.verify().ok


READER = """
import sys
from loramem import MemoryStore

read, seen = 0, set()
with MemoryStore(sys.argv[1], create=False) as store:
    while read < int(sys.argv[2]) or len(seen) < 3:
        values = [recall.value for recall in store.recall_many()]
        assert len(set(values)) == 1 and len(values) == int(sys.argv[3]), values
        read += len(values)
        seen.add(values[0])
print(read, len(seen))
"""


@pytest.mark.parametrize("reads", [200, pytest.param(100_000, marks=pytest.mark.slow)])
def test_reads_during_commits_mix_no_two_states(base: Path, tmp_path: Path, reads: int) -> None:
    keys = [f"{number}" for number in range(40)]
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(dict.fromkeys(keys, "0"))
        command = [sys.executable, "-W", "ignore", "-c", READER, str(store.path), str(reads), str(len(keys))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as reader:
            for number in itertools.count(1):
                store.write(dict.fromkeys(keys, f"{number}"), on_conflict="replace")
                if number % 3 == 0:
                    store.compact(which="all")
                if reader.poll() is not None:
                    break
            assert reader.stdout is not None
            read, states = map(int, reader.stdout.read().split())
    assert reader.returncode == 0
    assert read >= reads and states >= 3


class Model(RuleBasedStateMachine):
    """A store that does what a dict does."""

    base: Path
    folder: Path
    keys = st.sampled_from(["a", "b", "c d", "é", "key"])
    values = st.text(alphabet="0123456789xyz", min_size=1, max_size=6)

    @initialize()
    def start(self) -> None:
        self.path = self.folder / f"{random.getrandbits(64):x}"
        self.store, self.model = MemoryStore(self.path, str(self.base)), dict[str, str]()

    @rule(key=keys, value=values, how=st.sampled_from(["error", "skip", "replace"]))
    def write(self, key: str, value: str, how: Any) -> None:
        if how == "error" and self.model.get(key, value) != value:
            with pytest.raises(RecordError):
                self.store.write({key: value}, on_conflict=how)
            return
        self.store.write({key: value}, on_conflict=how)
        self.model = {key: value, **self.model} if how == "skip" else {**self.model, key: value}

    @rule(key=keys, to=keys)
    def rename(self, key: str, to: str) -> None:
        if key not in self.model or to in self.model:
            with pytest.raises(LoramemError):
                self.store.rename(key, to)
            return
        self.store.rename(key, to)
        self.model[to] = self.model.pop(key)

    @rule(key=keys, really=st.booleans())
    def remove(self, key: str, really: bool) -> None:
        if key in self.model:
            del self.model[key]
            self.store.erase(key) if really else self.store.delete(key)
        elif not really:
            with pytest.raises(KeyNotFound):
                self.store.delete(key)

    @rule(which=st.sampled_from(["advised", "dead", "all"]), grace_s=st.sampled_from([0, 3600]))
    def tidy(self, which: str, grace_s: float) -> None:
        self.store.compact(which=which)
        self.store.gc(grace_s)

    @rule()
    def reopen(self) -> None:
        base = self.store.base
        self.store.close()
        self.store = MemoryStore(self.path, create=False)
        self.store._session.base = base

    @invariant()
    def same(self) -> None:
        assert {recall.key: recall.value for recall in self.store.recall_many()} == self.model
        assert self.store.verify(quick=True).ok

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.path)


def explore(base: Path, folder: Path, examples: int, steps: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Bound", (Model,), {"base": base, "folder": folder})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_store_does_what_a_dict_does(base: Path, tmp_path: Path) -> None:
    explore(base, tmp_path, examples=4, steps=12)


@pytest.mark.slow
def test_a_store_does_what_a_dict_does_for_long(base: Path, tmp_path: Path) -> None:
    explore(base, tmp_path, examples=50, steps=30)
