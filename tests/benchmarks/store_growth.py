"""A store that grows batch by batch, its shards trained by a worker: python -m tests.benchmarks.store_growth FOLDER

Of every batch a line of growth.jsonl in FOLDER says what a record took on the processor, in the process that has the
store and in the worker, and what memory that process has. Run again it goes on where it stopped, also in the middle of
a batch. ``--stream`` gives all to one call of `write_batches`, whose batches overlap. ``--steps`` says what adapters of
each batch took, as the store has it, beside what the worker took for a record and step. What commands take on the
store: `tests.benchmarks.store_size`.

The base is random, of width 64 with three layers, and values are two digits: so many records as can be, no more. On a
larger base a record takes the worker longer and the parent the same.
"""

import argparse
import json
import random
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from loramem import MemoryStore, WriteReport
from loramem.workers.executors import Processes
from loramem.workers.processes import usable_cores

from ..conftest import build_base

RESULTS = "growth.jsonl"


def records(first: int, last: int) -> Iterator[tuple[str, str]]:
    for number in range(first, last):
        yield f"key {number}", f"{random.Random(number).randrange(100):02}"


def resident_mb() -> float:
    """Memory that this process has now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@dataclass
class Took:
    """What a worker has done so far, in seconds."""

    busy: float = 0.0
    """On the processor."""
    idle: float = 0.0
    """By the clock, from the end of a job to the beginning of the next."""
    ended: float | None = None


_took = Took()


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In a worker."""
    if _took.ended is not None:
        _took.idle += time.perf_counter() - _took.ended
    try:
        return function(*args, **kwargs)
    finally:
        _took.busy, _took.ended = time.process_time(), time.perf_counter()


def told() -> Took:
    return _took


class Worker(Processes):
    """One process, whose jobs are timed there."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(timed, fn, *args, **kwargs)

    def took(self) -> Took:
        """What it has done up to here."""
        return super().submit(told).result()


def written(
    store: MemoryStore, most: int, batch: int, until: float, worker: Executor, *, stream: bool
) -> Iterator[WriteReport]:
    """Write batches until there are so many records, or the time is over."""
    if stream:
        yield from store.write_batches(records(len(store), most), batch=batch, executor=worker)
    while not stream and (there := len(store)) < most and time.monotonic() < until:
        yield store.write(records(there, min(most, there + batch)), executor=worker)


def grow(folder: Path, most: int, batch: int, minutes: float, *, stream: bool = False) -> Iterator[dict[str, Any]]:
    """What each batch took."""
    base = folder / "base"
    if not base.exists():
        build_base(base, "llama")
    until = time.monotonic() + 60 * minutes
    with MemoryStore(folder / "memory", str(base)) as store, Worker() as worker:
        if store.pending() is not None:
            store.resume(executor=worker)
        store.base  # noqa: B018 - loads it
        started, mine, theirs = time.monotonic(), time.process_time(), worker.took()
        for report in written(store, most, batch, until, worker, stream=stream):
            ended, now = time.monotonic(), worker.took()
            each = 1000 / report.written
            yield {
                "records": len(store),
                "batch": report.written,
                "stream": stream,
                "adapters": len(report.adapters),
                "wall_ms": each * (ended - started),
                "parent_ms": each * (time.process_time() - mine),
                "worker_ms": each * (now.busy - theirs.busy),
                "worker_idle_ms": each * (now.idle - theirs.idle),
                "parent_mb": resident_mb(),
                "exact_match": report.exact_match,
            }
            started, mine, theirs = time.monotonic(), time.process_time(), now


def with_steps(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a growth, with mean rank and steps of the adapters that hold the records of each batch."""
    with MemoryStore(folder / "memory", create=False) as store:
        adapters = store.adapters()
    ends = list(accumulate(adapter.proof["records"] for adapter in adapters))
    for line in map(json.loads, (folder / RESULTS).read_text().splitlines()):
        last = bisect_right(ends, line["records"])
        mine = adapters[last - line["adapters"] : last]
        steps = fmean(adapter.training["steps"] for adapter in mine)
        yield {
            **line,
            "rank": fmean(adapter.rank for adapter in mine),
            "steps": steps,
            "worker_ms_of_a_step": line["worker_ms"] / steps,
        }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=2_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="Begin no batch after so many.")
    parser.add_argument("--stream", action="store_true", help="One call of write_batches; --minutes has no effect.")
    parser.add_argument("--steps", action="store_true", help="Only say what the batches of a growth took.")
    options = parser.parse_args(arguments)
    if options.steps:
        for line in with_steps(options.folder):
            print(json.dumps(line))
        return
    options.folder.mkdir(exist_ok=True, parents=True)
    print(f"{usable_cores()} cores")
    for line in grow(options.folder, options.records, options.batch, options.minutes, stream=options.stream):
        with (options.folder / RESULTS).open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
