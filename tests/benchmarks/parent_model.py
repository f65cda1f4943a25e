"""How many workers one process that has a store can feed: python -m tests.benchmarks.parent_model [--records N]

Measures on this machine what that process computes for each record and each shard of a write whose training is done
elsewhere, and how long it waits for the disk, and puts that together:

- Between two trainings (workers wait): admission, planning, journal, commit of a batch's records.
- During training: each shard is sent, and what comes back is compared, written and synced.

The base is random and tiny: no layer of it is run here, so that a larger one costs the same. Values are ten digits.
"""

import argparse
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loramem import MemoryStore, Record, WriterSettings
from loramem.index.commits import commit_write
from loramem.index.rows import stored_record
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord
from loramem.store.request import WriteRequest
from loramem.training import staged, worker
from loramem.training.jobs import JobBase, ShardJob, releases
from loramem.training.shards import stored_adapter

from ..conftest import build_base

SHARD, SHARD_S = 200, 12.0
"""Records of a shard, and what a worker takes for it: of SmolLM2-135M on two cores."""
WORKERS = (16, 64, 256, 500, 1_000)
MANY = 10**8
KEPT = 50


@dataclass(frozen=True)
class Parent:
    """What one process takes, in milliseconds on the processor unless it says otherwise."""

    admission: float
    """A record; tokens, prompts, and whether it is there already."""
    planning: float
    """A record; sent to a worker that says what it costs, and a rank for its shard."""
    journal: float
    commit: float
    """A record, with its row and seals."""
    sending: float
    """A record of a job."""
    keeping: float
    """A shard: its bytes hashed and written, its row."""
    syncs: int
    """Of a shard, to the disk."""
    sync_ms: float
    """Each, waiting."""
    job_kb: float
    delivery_kb: float

    @property
    def between_s(self) -> float:
        """Seconds of a shard's records while no worker has work."""
        return SHARD * (self.admission + self.planning + self.journal + self.commit) / 1000

    @property
    def during_s(self) -> float:
        """Seconds of a shard while workers train."""
        return (SHARD * self.sending + self.keeping + self.syncs * self.sync_ms) / 1000

    def shard_s(self, workers: int) -> float:
        """Seconds from shard to shard."""
        return self.between_s + max(self.during_s, SHARD_S / workers)

    def used(self, workers: int) -> float:
        """Share of the workers' time in which they train."""
        return SHARD_S / workers / self.shard_s(workers)


class Priced(Executor):
    """Workers that took no time to say what values cost."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        (job,) = args
        pickle.dumps(job)
        future: Future[Any] = Future()
        future.set_result([[0.1] * entry.length for entry in job.records])
        return future


def per(count: int, work: Callable[[], object]) -> float:
    """Milliseconds on the processor for each of so many things that the work does."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started) / count


@contextmanager
def counted_syncs() -> Iterator[list[float]]:
    """Seconds of every fsync meanwhile."""
    took, fsync = list[float](), os.fsync

    def timed(descriptor: int) -> None:
        started = time.perf_counter()
        fsync(descriptor)
        took.append(time.perf_counter() - started)

    os.fsync = timed
    try:
        yield took
    finally:
        os.fsync = fsync


def measure(folder: Path, count: int) -> Parent:
    rng = random.Random(0)
    records = [Record(f"Somebody with a name {n}:", f"{rng.randrange(10**10):010}") for n in range(count)]
    base = build_base(folder / "base", "llama")
    with MemoryStore(folder / "memory", str(base)) as store:
        store.write(records[:10])
        planner, index, fresh = store._session.planner, store._index, records[10:]
        entries, written = list[EncodedRecord](), list[int]()

        def commit() -> None:
            rows = [
                stored_record(e.record, e.prompt_ids, e.length, "0" * 32, 0.9, keep_value=True, prompt=e.prompt)
                for e in entries
            ]
            commit_write(index, written[0], [], rows)

        admission = per(len(fresh), lambda: entries.extend(planner.admit(fresh)[0]))
        planning = per(len(fresh), lambda: planner.plan(entries, WriteRequest(), executor=Priced()))
        journal = per(len(fresh), lambda: written.append(index.begin_write((e.record for e in entries), {})))
        committed = per(len(fresh), commit)
        job = ShardJob(
            base=JobBase.of(store.base),
            serve=("bfloat16",),
            records=tuple(entry.bare() for entry in entries[:12]),
            rank=8,
            placement=Placement.ladder(store.base.model)[0],
            settings=WriterSettings(),
            releases=releases(),
        )
        delivery = worker.run_job(job)
        (shard,) = delivery.result.shards

        def send() -> int:
            bare = tuple(entry.bare() for entry in entries)
            return len(pickle.dumps(replace(job, records=bare)))

        def keep() -> None:
            for number in range(KEPT):
                staged.keep(folder / str(number), replace(job), delivery)
                stored_adapter(job, shard, staged.folder_of(folder / str(number), job) / shard.adapter, 1.0, {})

        with counted_syncs() as took:
            keeping = per(KEPT, keep)
        return Parent(
            admission,
            planning,
            journal,
            committed,
            per(len(entries), send),
            keeping,
            len(took) // KEPT,
            1000 * sorted(took)[len(took) // 2],
            send() / len(entries) * SHARD / 1024,
            len(pickle.dumps(delivery)) / 1024,
        )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--sync-ms", type=float, help="Of each wait for the disk, in place of what was measured.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        parent = measure(Path(folder), options.records)
    print(f"measured: {parent.sync_ms:.1f} ms a sync")
    parent = replace(parent, sync_ms=options.sync_ms or parent.sync_ms)
    print(
        f"A record, ms: admission {parent.admission:.3f}, planning {parent.planning:.3f}, "
        f"journal {parent.journal:.3f}, commit {parent.commit:.3f}, sending {parent.sending:.3f}\n"
        f"A shard: {parent.keeping:.1f} ms, {parent.syncs} syncs of {parent.sync_ms:.1f} ms; "
        f"{parent.job_kb:.0f} KB sent, {parent.delivery_kb:.0f} KB returned (of a tiny base)\n"
        f"A shard of {SHARD} records: {1000 * parent.between_s:.0f} ms between trainings, {1000 * parent.during_s:.0f} "
        f"ms during them: at most {1 / parent.during_s:.0f} shards a second, {SHARD_S / parent.during_s:.0f} workers\n"
    )
    print(f"| workers | shards a second | of their time they train | hours for {MANY:.0e} records | saturated |")
    print("|---|---|---|---|---|")
    for workers in WORKERS:
        elapsed_s = parent.shard_s(workers)
        first = max(
            (parent.between_s, "admission, planning, commit"),
            (parent.during_s, "the disk" if parent.syncs * parent.sync_ms > parent.keeping else "taking shards in"),
            (SHARD_S / workers, "workers"),
        )[1]
        hours = MANY / SHARD * elapsed_s / 3600
        print(f"| {workers:,} | {1 / elapsed_s:.1f} | {parent.used(workers):.0%} | {hours:.1f} | {first} |")


if __name__ == "__main__":
    main(sys.argv[1:])
