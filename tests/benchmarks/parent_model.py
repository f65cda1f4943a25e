"""How many workers one process that has a store can feed: python -m tests.benchmarks.parent_model [--records N]

Writes a batch as `MemoryStore.write_batches` does on somebody else's workers, and measures what that process computes
for it from the first line of the input to the last row of the index, and how long it waits for the disk. What workers
do is done here where its answer is needed, and left out of the count; packing what they are sent and unpacking what
they return is counted. Batches overlap: while one is trained the next is read, tokenized and planned, so that workers
wait only where this process computes longer than they do.

The base is random, with the last MLP of SmolLM2-135M, which decides how many records a shard has; no layer of it is
run here, so that more layers cost the same. ``--tokenizer FOLDER`` takes the tokenizer of a real one, with its chat
template. Values are ten digits. Of each shard a few records are trained, once for all; its proof is said to be of the
whole, and a few bytes of its weights tell one adapter from another. So the sixteen least certain records of the batch,
which this process decodes alone, are found and not decoded: ``--alone FOLDER`` counts that.
"""

import argparse
import json
import math
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from loramem import MemoryStore
from loramem.models.adapter_header import WEIGHTS
from loramem.models.adapters import adapter_id
from loramem.models.base_model import load_base_model
from loramem.models.certificate import ALONE, misrecalled
from loramem.models.dtypes import Dtype
from loramem.records.input_files import stream_records
from loramem.records.prompts import encode_records
from loramem.records.record import iterate_records
from loramem.store import written
from loramem.training.jobs import Delivery, ShardJob
from loramem.workers import worker
from loramem.workers.executors import SYNCING

from ..conftest import CONTEXT, VOCABULARY, save_tokenizer

SHARD_S = 12.0
"""What a worker takes for a shard: of SmolLM2-135M on two cores."""
WIDTH, INNER = 576, 1536
"""Of SmolLM2-135M."""
WORKERS = (16, 64, 256, 500, 1_000)
MANY = 10**8
FEW = 10
BATCH = 200_000


@dataclass(frozen=True)
class Parent:
    """What one process takes."""

    computing_ms: float
    """On the processor: a record, with its share of all that is done for shards and for the batch."""
    alone_s: float
    """A batch: seconds for its sixteen least certain records, each decoded alone."""
    batch: int
    """Records of a batch."""
    syncs: int
    """Of a shard, to the disk."""
    sync_ms: float
    """Each, waiting."""
    records: float
    """Of a shard."""
    job_kb: float
    delivery_kb: float

    @property
    def computing_s(self) -> float:
        """Seconds of a shard and its records."""
        return self.records * (self.computing_ms / 1000 + self.alone_s / self.batch)

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

    def __init__(self) -> None:
        self.took_s, self._counting = 0.0, threading.Lock()
        self.jobs, self.deliveries = list[int](), list[int]()
        """Bytes of each shard's, as they are sent and returned."""
        self._trained = dict[int, Delivery]()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        sent = pickle.dumps(args)
        started = time.thread_time()
        (job,) = pickle.loads(sent)
        answer = pickle.dumps(self._shard(job) if isinstance(job, ShardJob) else fn(job))
        took_s = time.thread_time() - started
        with self._counting:
            self.took_s += took_s
            if isinstance(job, ShardJob):
                self.jobs.append(len(sent))
                self.deliveries.append(len(answer))
        future: Future[Any] = Future()
        future.set_result(pickle.loads(answer))
        return future

    def _shard(self, job: ShardJob) -> Delivery:
        """An adapter of a few of its records, whose proof is said to be of all, and whose last weight is its number:
        no two are the same."""
        if job.rank not in self._trained:
            self._trained[job.rank] = worker.run_job(replace(job, records=job.records[:FEW]))
        delivery = self._trained[job.rank]
        (files,), (shard,) = delivery.files.values(), delivery.result.shards
        last = struct.pack("<f", len(self.jobs))
        files = {**files, WEIGHTS: files[WEIGHTS][: -len(last)] + last}
        probs = tuple(0.9 + number % 1000 / 1e5 for number in range(len(job.records)))
        shard = replace(
            shard,
            adapter=adapter_id(files, job.namespace),
            indices=tuple(range(len(job.records))),
            proof=replace(shard.proof, min_probs=probs),
            served={dtype: replace(proof, min_probs=probs) for dtype, proof in shard.served.items()},
        )
        return Delivery(replace(delivery.result, shards=(shard,)), {shard.adapter: files})


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


@contextmanager
def nothing_decoded(store: MemoryStore) -> Iterator[None]:
    """What is least certain is found, and neither loaded nor decoded."""
    session = store._session
    models = [session.adapted, *(session.served_in(dtype).adapted for dtype in session.manifest.serve)]
    with ExitStack() as patched:
        patched.enter_context(patch.object(written, "prove_alone"))
        for adapted in models:
            patched.enter_context(patch.object(adapted, "load"))
        yield


def measure(folder: Path, count: int, tokenizer: Path | None) -> Parent:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a worker's, which would be counted as this process's
    given, workers = folder / "records.jsonl", Elsewhere()
    given.write_text("\n".join(lines(count)))
    with MemoryStore(folder / "memory", str(build_wide_base(folder / "base", tokenizer))) as store:
        early = {f"Somebody early {number}:": f"{number:010}" for number in range(FEW)}
        with nothing_decoded(store):
            store.write(early, executor=workers)  # what is made once for each process
            with counted_syncs() as took:
                started, before = time.process_time(), workers.took_s
                reports = list(store.write_batches(stream_records(given), batch=count, executor=workers))
                computing_s = time.process_time() - started - (workers.took_s - before)
        assert sum(report.written for report in reports) == count
        shards = sum(len(report.adapters) for report in reports)
    return Parent(
        1000 * computing_s / count,
        0.0,
        BATCH,
        len(took) // shards,
        1000 * sorted(took)[len(took) // 2],
        count / shards,
        max(workers.jobs) / 1024,
        max(workers.deliveries) / 1024,
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
        f"A record: {parent.computing_ms:.3f} ms\n"
        f"A shard of {parent.records:.0f} records: {parent.syncs} syncs of {parent.sync_ms:.1f} ms; "
        f"{parent.job_kb:.0f} KB sent, {parent.delivery_kb:.0f} KB returned\n"
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
