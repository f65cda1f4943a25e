"""Requests of many clients to `loramem serve`, records of all adapters in turn, against recall_many of the same keys.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.endpoint_load [MODEL] --records 400 --requests 10000 --clients 64

The server is this process, as the command runs it; the clients are another one, each with one request at a time. Every
answer is compared with what was written. recall_many and the requests are of one run, one after the other. With
--change a third process writes records and compacts every adapter while the requests are answered.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import quantiles

import httpx2
import torch

from loramem import MemoryStore
from loramem.endpoint.backends import OwnModel
from loramem.endpoint.limits import Limits
from loramem.planning.samples import generate
from loramem.suites.timing import clock, warm_up

from ..serving_threads import serving


def ask_all(url: str, keys: Sequence[str], clients: int) -> tuple[list[tuple[str, str | None, float]], float]:
    """Key, answer and seconds of every request, and seconds of all together; runs in a process of its own."""

    async def run() -> tuple[list[tuple[str, str | None, float]], float]:
        left, done = iter(keys), list[tuple[str, str | None, float]]()
        limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx2.AsyncClient(limits=limits, timeout=120) as http:

            async def client() -> None:
                for key in left:
                    body = {"model": "loramem", "messages": [{"role": "user", "content": key}]}
                    began = time.perf_counter()
                    response = await http.post(url + "/chat/completions", content=json.dumps(body))
                    seconds = time.perf_counter() - began
                    said = response.json()
                    done.append((key, said["choices"][0]["message"]["content"] if "choices" in said else None, seconds))

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            return done, time.perf_counter() - began

    return asyncio.run(run())


def change(place: Path, model: str | None) -> str:
    """Write records and rewrite all adapters; runs in a process of its own. What it came to."""
    torch.set_num_threads(1)
    with MemoryStore(place, model, create=False) as store:
        written = store.write({f"written meanwhile {number}": f"{number:04d}" for number in range(20)}).written
        report = store.compact(which="all")
    return f"{written} records written, {report.adapters_before} adapters compacted into {report.adapters_after}"


def compare(
    store: MemoryStore, records: int, requests: int, clients: int, *, changing: bool, model: str | None
) -> None:
    """Print both ways, and how many answers were wrong."""
    written = {record.key: record.value for record in generate("phonebook", records, 0)}
    store.write(written)
    warm_up(store.base)
    keys = random.Random(0).choices(list(written), k=requests)
    adapters = len(store.adapters())
    print(f"{store.base.id}: {records} records in {adapters} adapters, {requests} requests, {clients} clients")
    started, cpu = clock(store.base.device), time.process_time()
    recalled = sum(recall.value == written[recall.key] for recall in store.recall_many(keys))
    many_s, many_cpu = clock(store.base.device) - started, time.process_time() - cpu
    print(
        f"recall_many: {recalled} right, {requests / many_s:.0f}/s, "
        f"{1000 * many_cpu / requests:.2f} ms of the processor"
    )
    limits = Limits(answer_s=120)
    with serving(OwnModel(store, limits), limits) as url, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        pool.submit(ask_all, url, keys[: 2 * clients], clients).result()  # starts the process, loads the adapters
        cpu = time.process_time()
        asked = pool.submit(ask_all, url, keys, clients)
        changed = pool.submit(change, store.path, model) if changing else None
        done, served_s = asked.result()
        served_cpu = time.process_time() - cpu
        if changed is not None:
            print(f"meanwhile: {'' if changed.done() else 'not yet at the last answer, '}{changed.result()}")
    wrong = sum(answer not in (None, written[key]) for key, answer, _ in done)
    failed = sum(answer is None for _, answer, _ in done)
    hundredths = quantiles((seconds for *_, seconds in done), n=100)
    print(
        f"served: {len(done)} answers, {wrong} wrong, {failed} failed, {requests / served_s:.0f}/s, "
        f"{1000 * served_cpu / requests:.2f} ms of the processor, p50 {1000 * hundredths[49]:.0f} ms, "
        f"p99 {1000 * hundredths[98]:.0f} ms"
    )
    print(f"served / recall_many: {many_s / served_s:.2f} by the clock, {many_cpu / served_cpu:.2f} by the processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--change", action="store_true")
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder, MemoryStore(Path(folder) / "memory", asked.model) as store:
        compare(store, asked.records, asked.requests, asked.clients, changing=asked.change, model=asked.model)


if __name__ == "__main__":
    main()
