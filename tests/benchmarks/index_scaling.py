"""What a commit and `stats` cost as a store grows: python -m tests.benchmarks.index_scaling [ROWS ...]

Rows are made up, so no model and no adapter's file is needed. A commit is the two transactions of a write of one
record: its journal, and its row with that of its adapter. What a write does beside them (training, files) is not here.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from loramem import MemoryStore, Record, WriterSettings
from loramem.index.commits import commit_records, commit_write, seal_index
from loramem.index.index import NAME, Index
from loramem.index.rows import StoredAdapter, StoredRecord, now, stored_record
from loramem.records.prompts import prompt_digest
from loramem.store.manifest import Manifest

ROOT = Path(__file__).parents[2]
ROWS = (1_000, 10_000, 100_000, 1_000_000)
EACH = 200  # records of an adapter, as many as a shard has at most
COMMITS = 200
AT_ONCE = 100 * EACH


@dataclass(frozen=True)
class Measured:
    """A store of so many records."""

    rows: int
    commit_ms: float
    """Median over `COMMITS` of them."""
    computing_ms: float
    """Of it on the processor: the rest waits for the disk, twice."""
    stats_s: float
    """In a process of its own, the first time."""
    peak_mb: float
    """Of that process, Python included."""
    check_s: float
    """Every row against its seal, all of them against their sum."""


def adapter(number: int) -> StoredAdapter:
    return StoredAdapter(
        id=f"{number:032x}",
        namespace="",
        rank=8,
        parameters=100_000,
        size_bytes=400_000,
        files=dict.fromkeys(("README.md", "adapter_config.json", "adapter_model.safetensors"), f"{number:064x}"),
        placement={"layers": [4, 5], "modules": ["down_proj"]},
        training={
            "cost_bits": 6000.0,
            "elapsed_s": 1.0,
            "request": {"goal": "fast", "rank": None},
            "settings": asdict(WriterSettings()),
        },
        proof={"device": "cpu", "min_prob": 0.7, "records": EACH, "dtypes": {"adapter": "float32", "base": "float32"}},
        created_at=now(),
    )


def row(number: int, of: int) -> StoredRecord:
    record = Record(f"Somebody with a name {number}:", f"{number:010}")
    return stored_record(record, prompt_digest([number]), 10, f"{of:032x}", 0.6 + number % 1000 / 5000, keep_value=True)


def grow(index: Index, rows: int) -> None:
    """More rows, up to so many."""
    for first in range(index.count(), rows, AT_ONCE):
        last = min(first + AT_ONCE, rows)
        numbers = range(first, last)
        commit_records(
            index,
            (row(number, number // EACH) for number in numbers),
            map(adapter, range(first // EACH, (last - 1) // EACH + 1)),
        )


def commits(index: Index, rows: int) -> Iterator[tuple[float, float]]:
    """Milliseconds that writes of one record take in the index, and how many of them the processor is busy."""
    for number in range(rows, rows + COMMITS):
        record, alone = Record(f"Somebody with a name {number}:", f"{number:010}"), adapter(number + (1 << 64))
        stored = stored_record(record, prompt_digest([number]), 10, alone.id, 0.8, keep_value=True)
        started, busy = time.perf_counter(), time.process_time()
        write = index.begin_write([record], {"goal": "fast", "rank": None})
        commit_write(index, write, [alone], [stored])
        yield 1000 * (time.perf_counter() - started), 1000 * (time.process_time() - busy)


def told(path: Path) -> dict[str, float]:
    """`stats` of a store in this process: seconds, and the most memory that it ever had."""
    with MemoryStore(path, create=False) as store:
        started = time.perf_counter()
        store.stats()
        elapsed_s = time.perf_counter() - started
    return {"stats_s": elapsed_s, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(path: Path, sizes: Sequence[int] = ROWS) -> Iterator[Measured]:
    """Grow a new store at ``path`` from size to size, and measure at each."""
    path.mkdir()
    manifest = Manifest.from_bytes((ROOT / "tests" / "store-format-1" / "store.json").read_bytes(), path)
    manifest.save(path)
    with closing(Index(path / NAME)) as index:
        index.migrate()
        seal_index(index, manifest.sha256)
        for rows in sorted(sizes):
            grow(index, rows)
            index.empty_log()
            command = [sys.executable, "-m", "tests.benchmarks.index_scaling", "--stats", str(path)]
            stats = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
            commit_ms, computing_ms = map(statistics.median, zip(*commits(index, rows), strict=True))
            started = time.perf_counter()
            damaged = list(index.damaged())
            check_s = time.perf_counter() - started
            assert not damaged, damaged[:3]
            yield Measured(rows, commit_ms, computing_ms, check_s=check_s, **stats)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--stats", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stats:
        print(json.dumps(told(options.stats)))
        return
    print("| rows | commit, ms | of it computing, ms | stats, s | peak memory of it, MB | every seal checked, s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(Path(folder) / "memory", options.rows):
            rows, *others = asdict(found).values()
            print(f"| {rows:,} | {' | '.join(f'{value:.3g}' for value in others)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
