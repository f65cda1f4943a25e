"""A store that grows batch by batch, its shards trained by a worker: python -m tests.benchmarks.store_growth FOLDER

Of every batch a line of growth.jsonl in FOLDER says what a record took on the processor, in the process that has the
store and in the worker, and what memory that process has. Run again it goes on where it stopped, also in the middle of
a batch. ``--end`` measures what the store's commands take, each in a process of its own.

The base is random, of width 64 with three layers, and values are two digits: so many records as can be, no more. On a
larger base a record takes the worker longer and the parent the same.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loramem import MemoryStore, process_pool
from loramem.training.processes import usable_cores

from ..conftest import build_base

ROOT = Path(__file__).parents[2]
RESULTS = "growth.jsonl"
END = {
    "open": "MemoryStore(path, create=False)",
    "recall": "store.recall('key 5')",
    "recall again": "store.recall('key 6')",
    "delete": "store.delete(some)",
    "stats": "store.stats()",
    "verify, quick": "store.verify(quick=True)",
}
TIMED = """
import sys, time
from loramem import MemoryStore
path, work, shown = sys.argv[1:]
import loramem.store.verify, loramem.store.read
store = MemoryStore(path, create=False) if work != shown else None
if "recall" in work:
    store.base
if "6" in work:
    store.recall("key 5")
some = next(store.keys()) if "some" in work else None
started = time.perf_counter()
eval(work)
print(time.perf_counter() - started)
"""


def records(first: int, last: int) -> Iterator[tuple[str, str]]:
    for number in range(first, last):
        yield f"key {number}", f"{random.Random(number).randrange(100):02}"


def resident_mb() -> float:
    """Memory that this process has now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def grow(folder: Path, most: int, batch: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Write batches until there are so many records, or the time is over."""
    base = folder / "base"
    if not base.exists():
        build_base(base, "llama")
    until = time.monotonic() + 60 * minutes
    with MemoryStore(folder / "memory", str(base)) as store, process_pool(1) as pool:
        if store.pending() is not None:
            store.resume(executor=pool)
        store.base  # noqa: B018 - loads it
        pool.submit(time.process_time).result()
        while (there := len(store)) < most and time.monotonic() < until:
            started, mine, theirs = time.monotonic(), time.process_time(), pool.submit(time.process_time).result()
            report = store.write(records(there, there + batch), executor=pool)
            yield {
                "records": len(store),
                "adapters": len(report.adapters),
                "wall_ms": 1000 * (time.monotonic() - started) / batch,
                "parent_ms": 1000 * (time.process_time() - mine) / batch,
                "worker_ms": 1000 * (pool.submit(time.process_time).result() - theirs) / batch,
                "parent_mb": resident_mb(),
                "exact_match": report.exact_match,
            }


def at_the_end(store: Path) -> Iterator[tuple[str, float]]:
    """Seconds of each command, imports and the base model's loading apart; of ``ls`` with all of them."""
    for name, work in END.items():
        command = [sys.executable, "-c", TIMED, str(store), work, "MemoryStore(path, create=False)"]
        yield name, float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    started = time.perf_counter()
    subprocess.run(f"{sys.executable} -m loramem_cli ls --store {store} | head -3", shell=True, check=True)
    yield "ls | head", time.perf_counter() - started


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=2_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="Begin no batch after so many.")
    parser.add_argument("--end", action="store_true", help="Measure the commands of the store as it is.")
    options = parser.parse_args(arguments)
    options.folder.mkdir(exist_ok=True, parents=True)
    if options.end:
        for name, seconds in at_the_end(options.folder / "memory"):
            print(f"{name}: {seconds:.3f} s", flush=True)
        return
    print(f"{usable_cores()} cores")
    for line in grow(options.folder, options.records, options.batch, options.minutes):
        with (options.folder / RESULTS).open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
