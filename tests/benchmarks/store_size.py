"""What commands take on a large store and on smaller ones.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.store_size FOLDER --sizes 50000,10000

FOLDER/memory is copied (`tests.benchmarks.store_growth` makes one); a smaller store is what is left when the newest
adapters are erased with all their records. Each command is timed as a whole process, the start of Python and imports
with it, and as a call in Python, imports and the base model's loading apart; on the processor and by the clock, medians
of the turns. Every size is a line of docs/results/store-size.jsonl, and is not measured again.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loramem import MemoryStore

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "store-size.jsonl"
COMMANDS = {
    "recall": ("recall", "key 5"),
    "rm": ("rm", "{some}"),
    "stats": ("stats",),
    "ls | head": ("ls",),
    "verify --quick": ("verify", "--quick"),
}
CALLS = {
    "open": ("", "MemoryStore(path, create=False)"),
    "recall": ("import loramem.store.read; store.base", "store.recall('key 5')"),
    "recall, same adapter": ("store.recall('key 5')", "store.recall('key 6')"),
    "delete": ("", "store.delete('{some}')"),
    "stats": ("", "store.stats()"),
    "verify, quick": ("", "store.verify(quick=True)"),
}
"""What is done before, and what is timed."""
TIMED = """
import json, sys, time
from loramem import MemoryStore
path, before, work = sys.argv[1:]
store = MemoryStore(path, create=False)
exec(before)
started, busy = time.perf_counter(), time.process_time()
exec(work)
print(json.dumps([time.process_time() - busy, time.perf_counter() - started]))
"""
Seconds = tuple[float, float]
"""On the processor, by the clock."""


def called(store: Path, before: str, work: str) -> Seconds:
    """Of a call in a process of its own."""
    command = [sys.executable, "-c", TIMED, str(store), before, work]
    cpu_s, wall_s = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    return cpu_s, wall_s


def ran(store: Path, arguments: Sequence[str]) -> Seconds:
    """Of a whole command, whose reader takes three lines and goes."""
    command = [sys.executable, "-m", "loramem_cli", *arguments, "--store", str(store)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0 or "ls" in arguments, command  # which finds its pipe closed
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s


def shrink(store: Path, records: int) -> None:
    """Erase the newest adapters with all they hold, as long as so many records are left."""
    with MemoryStore(store, create=False) as opened:
        left, gone = len(opened), list[str]()
        for adapter in reversed(opened.adapters()):
            held = [record.key for record in opened.iter_records(adapter=adapter.id)]
            if left - len(held) < records:
                break
            gone, left = gone + held, left - len(held)
        if gone:
            opened.erase(gone)


def measure(store: Path, turns: int) -> dict[str, dict[str, Seconds]]:
    """Of each command and call, the medians."""
    with MemoryStore(store, create=False) as opened:
        keys = reversed(list(opened.keys()))

    def several(run: Callable[[Callable[[str], str]], Seconds]) -> Seconds:
        def named(text: str) -> str:
            return text.format(some=next(keys)) if "{some}" in text else text

        cpu_s, wall_s = zip(*(run(named) for _ in range(turns)), strict=True)
        return median(cpu_s), median(wall_s)

    return {
        "commands": {
            name: several(lambda named, asked=asked: ran(store, list(map(named, asked))))
            for name, asked in COMMANDS.items()
        },
        "calls": {
            name: several(lambda named, call=call: called(store, call[0], named(call[1])))
            for name, call in CALLS.items()
        },
    }


def sizes(source: Path, wanted: Sequence[int], turns: int, known: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A line for the store as it is, and one for each smaller size that is not known."""
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "memory"
        shutil.copytree(source, store)
        for size in (None, *sorted(wanted, reverse=True)):
            if size is not None:
                shrink(store, size)
            with MemoryStore(store, create=False) as opened:
                records, adapters = len(opened), len(opened.adapters())
            if records not in known:
                yield {"records": records, "adapters": adapters, **measure(store, turns)}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="", help="Of smaller stores, such as 50000,10000.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    known = [json.loads(line)["records"] for line in lines]
    wanted = [int(size) for size in options.sizes.split(",") if size]
    for line in sizes(options.folder / "memory", wanted, options.turns, known):
        with options.results.open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
