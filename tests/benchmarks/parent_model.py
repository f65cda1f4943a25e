"""How many workers one process that has a store can feed: python -m tests.benchmarks.parent_model [--records N]

Measures on this machine what that process computes for each record and each shard of a write whose tokens, prices and
training are somebody else's, and how long it waits for the disk, and puts that together. A worker's computing is run
here where its answer is needed, and left out of the count; packing what it is sent and unpacking what it returns is
counted. Batches overlap: while one is trained the next is read, tokenized and planned, so that workers wait only where
this process computes longer than they do.

The base is random, with the last MLP of SmolLM2-135M, which decides how many records a shard has; no layer of it is
run here, so that more layers cost the same. ``--tokenizer FOLDER`` takes the tokenizer of a real one, with its chat
template. Values are ten digits. An adapter that comes back was trained of a few records; its proof is said to be of a
whole shard.
"""

import argparse
import json
import math
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from loramem import MemoryStore, WriterSettings
from loramem.index.commits import commit_write
from loramem.index.rows import stored_record
from loramem.models.base_model import load_base_model
from loramem.models.certificate import ALONE, misrecalled
from loramem.models.dtypes import Dtype
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import Record, iterate_records
from loramem.store.request import WriteRequest
from loramem.training import staged, worker
from loramem.training.executors import SYNCING
from loramem.training.jobs import Delivery, JobBase, ShardJob, releases
from loramem.training.shards import stored_adapter

from ..conftest import CONTEXT, VOCABULARY, save_tokenizer

SHARD_S = 12.0
"""What a worker takes for a shard: of SmolLM2-135M on two cores."""
WIDTH, INNER = 576, 1536
"""Of SmolLM2-135M."""
WORKERS = (16, 64, 256, 500, 1_000)
MANY = 10**8
KEPT, FEW = 50, 10
BATCH = 200_000


@dataclass(frozen=True)
class Parent:
    """What one process takes, in milliseconds on the processor unless it says otherwise."""

    reading: float
    """A record: from a line of JSON."""
    admission: float
    """A record: sent to be tokenized, compared with the store and the others."""
    planning: float
    """A record; sent to a worker that says what it costs, and a rank for its shard."""
    journal: float
    sending: float
    """A record of a job."""
    commit: float
    """A record: compared with the store once more, its row and seals."""
    alone_s: float
    """A batch: seconds for its sixteen least certain records, each decoded alone."""
    batch: int
    """Records of a batch."""
    keeping: float
    """A shard: its bytes hashed and written, its row."""
    syncs: int
    """Of a shard, to the disk."""
    sync_ms: float
    """Each, waiting."""
    records: float
    """Of a shard."""
    job_kb: float
    delivery_kb: float

    @property
    def of_a_record(self) -> float:
        """Milliseconds."""
        return self.reading + self.admission + self.planning + self.journal + self.sending + self.commit

    @property
    def computing_s(self) -> float:
        """Seconds of a shard and its records."""
        return (self.records * self.of_a_record + self.keeping) / 1000 + self.alone_s * self.records / self.batch

    @property
    def disk_s(self) -> float:
        """The same of waits for the disk, side by side."""
        return self.syncs * self.sync_ms / SYNCING / 1000

    def shard_s(self, workers: int) -> float:
        """Seconds from shard to shard."""
        return max(self.computing_s, self.disk_s, SHARD_S / workers)

    def used(self, workers: int) -> float:
        """Share of the workers' time in which they train."""
        return SHARD_S / workers / self.shard_s(workers)

    def saturated(self, workers: int) -> str:
        """What ends first."""
        return max(
            (self.computing_s, "this process"),
            (self.disk_s, "its disk"),
            (SHARD_S / workers, "workers"),
            key=lambda x: x[0],
        )[1]


class Elsewhere(Executor):
    """Workers that took no time: what their work takes here is counted in `took_s`, beside this process's own."""

    took_s = 0.0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        sent = pickle.dumps(args)
        started = time.process_time()
        answer = pickle.dumps(fn(*pickle.loads(sent)))
        self.took_s += time.process_time() - started
        future: Future[Any] = Future()
        future.set_result(pickle.loads(answer))
        return future


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


def build_wide_base(folder: Path, tokenizer: Path | None) -> Path:
    """One layer, with the MLP of SmolLM2-135M."""
    if tokenizer is None:
        save_tokenizer(folder)
    else:
        folder.mkdir()
        for file in [*tokenizer.glob("*.jinja"), *tokenizer.glob("tokenizer*.json"), *tokenizer.glob("special*.json")]:
            shutil.copy(file, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    vocabulary = VOCABULARY if tokenizer is None else len(loaded)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=loaded.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.normal_(std=(math.log(vocabulary) + 12) / WIDTH)
    model.save_pretrained(folder)
    return folder


def lines(count: int) -> list[str]:
    rng = random.Random(0)
    rows = ({"key": f"Somebody with a name {n}:", "value": f"{rng.randrange(10**10):010}"} for n in range(count))
    return list(map(json.dumps, rows))


def of_a_whole_shard(delivery: Delivery, job: ShardJob) -> Delivery:
    """The same adapter, whose proof is said to be of the records of a job."""
    (shard,) = delivery.result.shards
    probs = tuple(0.9 + number % 1000 / 1e5 for number in range(len(job.records)))
    shard = replace(
        shard,
        indices=tuple(range(len(job.records))),
        proof=replace(shard.proof, min_probs=probs),
        served={dtype: replace(proof, min_probs=probs) for dtype, proof in shard.served.items()},
    )
    return replace(delivery, result=replace(delivery.result, shards=(shard,)))


def alone(folder: Path) -> float:
    """Seconds on the processor for as many records as a batch decodes alone, on a real base in both dtypes.

    Its own weights give other tokens than the records', and as many of them.
    """
    records = list(iterate_records(map(json.loads, lines(ALONE))))
    took_s = 0.0
    for dtype in get_args(Dtype)[:2]:
        base = load_base_model(str(folder), dtype=dtype, device="cpu")
        encoded = encode_records(records, base.tokenizer, base.template, base.max_tokens)
        started = time.process_time()
        list(misrecalled(base.model, encoded, [[number] for number in range(len(encoded))]))
        took_s += time.process_time() - started
    return took_s / 2  # of sixteen over both dtypes together


def measure(folder: Path, count: int, tokenizer: Path | None) -> Parent:
    given, workers = lines(count), Elsewhere()

    def per(number: int, work: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of this process for each of so many things that the work does, and what it gives."""
        started, before = time.process_time(), workers.took_s
        result = work()
        return 1000 * (time.process_time() - started - (workers.took_s - before)) / number, result

    def read() -> list[Record]:
        return list(iterate_records(map(json.loads, given)))

    with MemoryStore(folder / "memory", str(build_wide_base(folder / "base", tokenizer))) as store:
        planner, index = store._session.planner, store._index
        reading, records = per(count, read)
        planner.admit(records[:FEW], executor=workers)  # what is made once for each process
        admission, (entries, _) = per(count, lambda: planner.admit(records, executor=workers))
        planning, plan = per(count, lambda: planner.plan(entries, WriteRequest(), executor=workers))
        journal, write = per(count, lambda: index.begin_write((e.record for e in entries), {}))
        sizes = [shard.records for shard in plan.shards]
        job = ShardJob(
            base=JobBase.of(store.base),
            serve=("bfloat16",),
            records=tuple(entry.bare() for entry in entries[:FEW]),
            rank=plan.shards[0].rank,
            placement=Placement.ladder(store.base.model)[0],
            settings=WriterSettings(),
            releases=releases(),
        )
        delivery = worker.run_job(job)

        def send(some: Sequence[EncodedRecord]) -> bytes:
            sent = replace(job, records=tuple(entry.bare() for entry in some))
            assert sent.identity
            return pickle.dumps(sent)

        def commit() -> None:
            rows = [
                stored_record(e.record, e.prompt_ids, e.length, "0" * 32, 0.9, keep_value=True, prompt=e.prompt)
                for e in entries
            ]
            commit_write(index, write, [], rows)

        sending, _ = per(count, lambda: [send(entries[each.first : each.first + each.records]) for each in plan.shards])
        whole = replace(job, records=tuple(entry.bare() for entry in entries[: sizes[0]]))
        whole.identity  # noqa: B018 - computed once
        returned = pickle.dumps(of_a_whole_shard(delivery, whole))
        (adapter,) = delivery.files

        def keep() -> None:
            for number in range(KEPT):
                place = folder / str(number)
                (shard,) = staged.keep(place, whole, pickle.loads(returned)).shards
                staged.sync(place, whole)
                stored_adapter(whole, shard, staged.folder_of(place, whole) / adapter, 1.0, {})

        with counted_syncs() as took:
            keeping, _ = per(KEPT, keep)
        again, admitted = per(count, lambda: planner.admits(records, entries, "error"))
        assert admitted
        committed, _ = per(count, commit)
    return Parent(
        reading,
        admission,
        planning,
        journal,
        sending,
        again + committed,
        0.0,
        BATCH,
        keeping,
        len(took) // KEPT,
        1000 * sorted(took)[len(took) // 2],
        count / len(sizes),
        len(send(entries[: sizes[0]])) / 1024,
        len(returned) / 1024,
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--tokenizer", type=Path, help="Folder of a base model, in place of a tiny one.")
    parser.add_argument("--alone", type=Path, help="Folder of a real base, on which sixteen records are decoded alone.")
    parser.add_argument("--batch", type=int, default=BATCH, help="Records of each.")
    parser.add_argument("--sync-ms", type=float, help="Of each wait for the disk, in place of what was measured.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        parent = measure(Path(folder), options.records, options.tokenizer)
    print(f"measured: {parent.sync_ms:.1f} ms a sync")
    alone_s = alone(options.alone) if options.alone else 0.0
    sync_ms = options.sync_ms or parent.sync_ms
    parent = replace(parent, sync_ms=sync_ms, alone_s=alone_s, batch=options.batch)
    print(
        f"A record, ms: reading {parent.reading:.3f}, admission {parent.admission:.3f}, "
        f"planning {parent.planning:.3f}, journal {parent.journal:.3f}, sending {parent.sending:.3f}, "
        f"commit {parent.commit:.3f}: {parent.of_a_record:.3f}\n"
        f"A shard of {parent.records:.0f} records: {parent.keeping:.1f} ms, {parent.syncs} syncs of "
        f"{parent.sync_ms:.1f} ms; {parent.job_kb:.0f} KB sent, {parent.delivery_kb:.0f} KB returned\n"
        f"A batch of {parent.batch:,} records: {parent.alone_s:.1f} s for the least certain ones alone\n"
        f"A shard with its records and its share of that: {1000 * parent.computing_s:.0f} ms, "
        f"{1000 * parent.disk_s:.0f} ms of the disk: at most {1 / max(parent.computing_s, parent.disk_s):.0f} shards a "
        f"second, {SHARD_S / max(parent.computing_s, parent.disk_s):.0f} workers\n"
    )
    print(f"| workers | shards a second | of their time they train | hours for {MANY:.0e} records | saturated |")
    print("|---|---|---|---|---|")
    for workers in WORKERS:
        elapsed_s = parent.shard_s(workers)
        hours = MANY / parent.records * elapsed_s / 3600
        said = f"{1 / elapsed_s:.1f} | {parent.used(workers):.0%} | {hours:.1f} | {parent.saturated(workers)}"
        print(f"| {workers:,} | {said} |")


if __name__ == "__main__":
    main(sys.argv[1:])
