"""A store in the hands of processes that are killed: python -m tests.killing BASE FOLDER KILLS [SEED [RECORDS]]

Every child first compares the store with the log of what its predecessors did (each line synced), then changes it
until it is killed: at a random moment, or the n-th time a named event is told. An operation whose end was logged must
be there whole; the one that was under way may be there or not, whole in either case. The parent only imports and forks.
"""

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from loramem import MemoryStore
from loramem._util.events import NAMES
from loramem.api import reading  # noqa: F401
from loramem.errors import LoramemError
from loramem.store import compact, read, repair, verify, write  # noqa: F401
from loramem.training import trainer  # noqa: F401
from loramem.workers import executors  # noqa: F401

DIGITS = "0123456789"
MOST = 10  # records, so that comparing all of them is cheap
State = dict[str, str]


class Log:
    """Lines of JSON, each on disk before the call returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(line))
            file.flush()
            os.fsync(file.fileno())

    def latest(self) -> Iterator[dict[str, Any]]:
        """Entries, the last first; a line that its writer was killed in is none."""
        for line in reversed(self.path.read_text().split("\n") if self.path.exists() else []):
            with suppress(ValueError):
                yield json.loads(line)

    def states(self) -> list[State]:
        """What the store may hold: one state, or two if an operation was under way."""
        since: list[dict[str, Any]] = []
        for entry in self.latest():
            since.append(entry)
            if "state" in entry:  # what was found supersedes all before
                break
        possible: list[State] = [{}]
        for entry in reversed(since):
            if "after" in entry:
                possible = [possible[0], entry["after"]]
            elif "done" in entry:
                possible = possible[-1:]
            elif "state" in entry:
                possible = [entry["state"]]
        return possible


class KillAt(logging.Handler):
    """Ends the process without notice the n-th time an event is told."""

    def __init__(self, event: str, count: int) -> None:
        super().__init__()
        self.event, self.count = event, count

    def emit(self, record: logging.LogRecord) -> None:
        if record.event == self.event:  # type: ignore[attr-defined]
            self.count -= 1
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def check(store: MemoryStore, log: Log) -> State:
    """The state the store is in; anything but an allowed one, whole, ends the run."""
    held = {recall.key: recall.value for recall in store.recall_many()}
    assert sorted(held) == sorted(store.keys())
    assert held in log.states(), f"{held} is none of {log.states()}"
    assert (found := store.verify(quick=True)).ok, found
    log.add(state=held)
    return held


def change(store: MemoryStore, log: Log, state: State, rng: random.Random) -> State:
    """One random operation, announced before and confirmed after."""

    def value() -> str:
        return "".join(rng.choices(DIGITS, k=rng.randint(2, 6)))

    keys = sorted(state)
    operation = rng.choice(["write", "write", "update", "rename", "delete", "erase", "compact", "gc"])
    if operation == "write" or not keys:
        room = len(keys) < MOST or len(keys) > 10 * MOST  # a store that began large may grow on
        new = {f"key {rng.randrange(99)}": value() for _ in range(rng.randint(1, 3))} if room else {}
        new = {**new, **{key: value() for key in keys[: rng.randrange(2)]}}
        after = {**state, **new}
        log.add(after=after)
        store.write(new, on_conflict="replace", rank=rng.choice([None, 4]))  # two kinds are compacted apart
    elif operation == "update":
        key = rng.choice(keys)
        after = {**state, key: value()}
        log.add(after=after)
        store.update(key, after[key])
    elif operation == "rename":
        key, new_key = rng.choice(keys), f"key {100 + rng.randrange(99)}"
        if new_key in state:
            return state
        after = {**{k: v for k, v in state.items() if k != key}, new_key: state[key]}
        log.add(after=after)
        store.rename(key, new_key)
    elif operation in ("delete", "erase"):
        gone = rng.sample(keys, min(len(keys), rng.randint(1, 2)))
        after = {k: v for k, v in state.items() if k not in gone}
        log.add(after=after)
        store.delete(gone) if operation == "delete" else store.erase(gone)
    else:
        after = state
        log.add(after=after)
        store.compact() if operation == "compact" else store.gc(grace_s=rng.choice([0, 3600]))
    log.add(done=True)
    return after


def child(base: str, folder: Path, seed: int) -> None:
    """Check, then change until killed."""
    import torch

    torch.set_num_threads(1)
    rng, log = random.Random(seed), Log(folder / "log.jsonl")
    started = time.monotonic()
    store = MemoryStore(folder / "memory", base)
    opened_s = time.monotonic() - started
    state = check(store, log)
    if rng.random() < 0.5:
        event = rng.choice(NAMES)
        events = logging.getLogger("loramem._util.events")
        events.setLevel(logging.INFO)
        events.addHandler(KillAt(event, rng.randint(1, 2)))
        rest_s = 2.0  # where the event never comes
    else:
        rest_s = rng.uniform(0, 1.5)
    log.add(opened_s=opened_s)
    timer = threading.Timer(rest_s, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    if (pending := store.pending()) is not None:
        if rng.random() < 0.7:
            ended = {key for _, key, *_ in pending.request.get("ended", ())}
            after = {**state, **{record.key: record.value for record in pending.records}}
            after = {key: value for key, value in after.items() if key not in ended}
            log.add(after=after)
            store.resume()
            log.add(done=True)
            state = after
        else:
            store.discard()
    while True:
        state = change(store, log, state, rng)


def begin(base: str, folder: Path, records: int) -> None:
    """So many records to begin with."""
    state = {f"old {number}": f"{number:04}" for number in range(records)}
    with MemoryStore(folder / "memory", base) as store:
        store.write(state)
    Log(folder / "log.jsonl").add(state=state)
    os.kill(os.getpid(), signal.SIGKILL)


def main(base: str, folder: Path, kills: int, seed: int = 0, records: int = 0) -> int:
    """How many children were killed; raises at the first that found something wrong.

    Args:
        records: In the store when the first child comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-1 if records else 0, kills + 1):
        pid = os.fork()
        if pid == 0:
            try:
                child(base, folder, seed * 1_000_003 + number) if number >= 0 else begin(base, folder, records)
            except LoramemError as error:
                sys.stderr.write(f"child {number}: {type(error).__name__}: {error}\n")
                os._exit(3)
            except BaseException as error:
                sys.stderr.write(f"child {number}: {error!r}\n")
                os._exit(2)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"child {number} found something wrong (exit {os.WEXITSTATUS(status)})")
    return kills


if __name__ == "__main__":
    kills = main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *map(int, sys.argv[4:]))
    opened_s = [entry["opened_s"] for entry in Log(Path(sys.argv[2]) / "log.jsonl").latest() if "opened_s" in entry]
    print(f"{kills} kills, nothing lost; opened in {median(opened_s):.3f} s (median), {max(opened_s):.3f} s at most")
