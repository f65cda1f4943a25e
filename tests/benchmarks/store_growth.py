"""A store that grows batch by batch, its shards trained by a worker: python -m tests.benchmarks.store_growth FOLDER

Of every batch a line of growth.jsonl in FOLDER says what a record took on the processor, in the process that has the
store and in the worker, and what memory that process has. Run again it goes on where it stopped, also in the middle of
a batch. What commands take on it: `tests.benchmarks.store_size`.

The base is random, of width 64 with three layers, and values are two digits: so many records as can be, no more. On a
larger base a record takes the worker longer and the parent the same.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loramem import MemoryStore, process_pool
from loramem.training.processes import usable_cores

from ..conftest import build_base

RESULTS = "growth.jsonl"


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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=2_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="Begin no batch after so many.")
    options = parser.parse_args(arguments)
    options.folder.mkdir(exist_ok=True, parents=True)
    print(f"{usable_cores()} cores")
    for line in grow(options.folder, options.records, options.batch, options.minutes):
        with (options.folder / RESULTS).open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
