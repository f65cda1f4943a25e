"""Jobs, one after the other in this process or side by side in an executor's."""

import logging
import multiprocessing
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TypeVar

import torch

from loramem.errors import ArgumentError, NoWorkers, WorkerLost
from loramem.models.adapters import AdaptedModel
from loramem.models.dtypes import Dtype
from loramem.training.jobs import Delivery, ShardJob, ShardResult
from loramem.training.progress import ProgressCallback, WriteProgress
from loramem.training.shards import write_shard
from loramem.workers import staged
from loramem.workers.ahead import Ahead
from loramem.workers.job_folder import remove_abandoned
from loramem.workers.processes import end_with_parent, usable_cores
from loramem.workers.steps import Message, QueueChannel, Reporting, initialize
from loramem.workers.worker import run_job

log = logging.getLogger(__name__)

IN_FLIGHT = 256
"""Jobs that somebody else's executor holds at a time: enough for its workers, and no whole write in its queues."""
QUEUED = 2
"""Jobs per slot of a cluster or a pool: one that is run, and one that waits beside it."""
SYNCING = 8
"""Threads that wait for the disk, each for a shard: it takes in several as fast as one."""
POLL_S = 5.0
"""How often a cluster is looked at while nothing comes back from it."""
HEAR_S = 0.5
"""The same of what workers tell."""
GONE_S = 60.0
"""A cluster that lost its last worker has so long to get another."""

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class ClusterExecutor(Executor, ABC):
    """Runs functions on machines that may come and go.

    Attributes:
        place: What it is, in messages.
        lost: What its futures raise where a worker went with a job, as often as the cluster tries again.
    """

    place: str
    lost: tuple[type[BaseException], ...]

    @abstractmethod
    def slots(self) -> int:
        """Jobs that can run side by side now; 0 without workers."""

    def wait_for_workers(self, wait_s: float) -> None:
        """
        Raises:
            NoWorkers: There are none after so many seconds.
        """
        until = time.monotonic() + wait_s
        if self.slots() == 0 and wait_s:
            log.warning("%s has no workers yet; waiting %.0f s for one", self.place, wait_s)
        while self.slots() == 0:
            if time.monotonic() >= until:
                raise NoWorkers(
                    f"{self.place} has no workers. Start some, and wait for them if that takes time (wait_s, --wait)."
                )
            time.sleep(min(1.0, max(until - time.monotonic(), 0.05)))


def run_jobs(
    jobs: Sequence[ShardJob],
    staging: Path,
    adapted: AdaptedModel,
    served: Mapping[Dtype, AdaptedModel],
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
    ahead: Ahead[ShardJob, Delivery] | None = None,
) -> list[ShardResult]:
    """Results of the jobs, in their order; each is staged as soon as it is there, and one that was is taken as it is.

    All of them are on disk at the end.

    Args:
        staging: Folder of the write.
        adapted: The model that runs them in this process, if there is no executor.
        served: The same in other dtypes; see `write_shard`.
        executor: Runs `loramem.workers.worker.run_job` on each; its processes must find the base model.
        progress: Reporting of every step in this process, of some in others (see `job_function`), and of every finished
            shard.
        ahead: Has some of the jobs already, and is given workers that these leave idle.

    Raises what `run_job` raises, at the first job that fails; those that have not begun are cancelled.

    Raises:
        WorkerLost: A worker process was killed, or ran out of memory.
        RefusedResult: See `loramem.workers.staged.keep`.
    """
    results = {number: done for number, job in enumerate(jobs) if (done := staged.find(staging, job)) is not None}
    left = [number for number in range(len(jobs)) if number not in results]
    remove_abandoned()

    total = sum(len(job.records) for job in jobs)

    def tell(number: int) -> None:
        if progress is not None:
            told = _finished(jobs[number], results[number])
            progress(replace(told, shard=number + 1, shards=len(jobs), records_total=total))

    for number in sorted(results):
        tell(number)
    with ThreadPoolExecutor(SYNCING) as disk:

        def sync(number: int) -> Future[None]:
            return disk.submit(staged.sync, staging, jobs[number])

        syncs = [sync(number) for number in results]  # whoever staged them may have been killed before this
        if executor is None:
            for number in left:
                job = jobs[number]
                numbered = _numbered(progress, number + 1, len(jobs), total)
                results[number] = write_shard(job, staged.folder_of(staging, job), adapted, numbered, served)
                staged.finish(staging, job, results[number])
                syncs.append(sync(number))
                tell(number)
        else:
            hear = None
            if progress is not None and isinstance(executor, Reporting):
                hear = executor.channel.listener(jobs, progress, results)
            asked, run = (jobs[number] for number in left), job_function(executor, progress)
            with closing(completed(executor, run, asked, ahead, hear)) as deliveries:
                for place, delivery in deliveries:
                    number = left[place]
                    results[number] = staged.keep(staging, jobs[number], delivery)
                    syncs.append(sync(number))
                    tell(number)
        for synced in syncs:
            synced.result()
    return [results[number] for number in range(len(jobs))]


def job_function(executor: Executor, progress: ProgressCallback | None) -> Callable[[ShardJob], Delivery]:
    """What runs a job in another process, and tells how far it is where somebody wants to know and can hear it."""
    if progress is None or not isinstance(executor, Reporting):
        return run_job
    return partial(run_job, teller=executor.channel.teller())


def completed(
    executor: Executor,
    function: Callable[[_Item], _Answer],
    items: Iterable[_Item],
    ahead: Ahead[_Item, _Answer] | None = None,
    hear: Callable[[], None] | None = None,
) -> Generator[tuple[int, _Answer]]:
    """What a function gives for each item, with the item's place, as the answers come; few are submitted ahead.

    Raises what the function raises, at the first item that fails; those that have not begun are cancelled, as they
    are when the caller asks for no more.

    Args:
        ahead: Has some of them already; gets the places that these leave when all are submitted.
        hear: Called now and then while they run.

    Raises:
        WorkerLost: A worker process ended, and no other could do its work.
    """
    cluster = executor if isinstance(executor, ClusterExecutor) else None
    lost: tuple[type[BaseException], ...] = (BrokenExecutor, CancelledError)
    lost += () if cluster is None else cluster.lost
    # A queue: `concurrent.futures.wait` would look at every future each time that one is done.
    running, done = dict[Future[_Answer], int](), queue.SimpleQueue[Future[_Answer]]()
    waiting, most, looked = enumerate(items), window(executor), time.monotonic()
    seen = looked
    wait_s = POLL_S if cluster is not None or ahead is not None else None
    try:
        while True:
            for number, item in islice(waiting, max(0, most - len(running))):
                future = executor.submit(function, item) if ahead is None else ahead.submit(item)
                running[future] = number
                future.add_done_callback(done.put)
            if not running:
                return
            if ahead is not None:
                ahead.fill(most - len(running), most, done.put)
            came: Future[_Answer] | None = None
            with suppress(queue.Empty):
                came = done.get(timeout=wait_s if hear is None else HEAR_S)
            if hear is not None:
                hear()
            if came is None:
                if cluster is None or (now := time.monotonic()) - looked < POLL_S:
                    continue
                looked = now
                if cluster.slots() > 0:
                    most, seen = window(executor), now
                else:
                    log.warning("%s has no workers left; %d jobs wait for one", cluster.place, len(running))
                    if now - seen > GONE_S:
                        raise BrokenExecutor(f"{cluster.place} has had no workers for {GONE_S:.0f} s")
                continue
            looked = seen = time.monotonic()
            if came in running:  # else it is of the next batch, and leaves its place to another
                yield running.pop(came), came.result()
    except lost as error:
        raise WorkerLost(
            f"A worker process ended in the middle of its job (killed, or out of memory; {type(error).__name__}). "
            "Nothing was committed. A write that is journalled goes on with loramem write --resume, its finished "
            "shards kept; else write again, with fewer workers where memory is short."
        ) from error
    finally:
        for future in running:
            future.cancel()


def window(executor: Executor) -> int:
    """Jobs that an executor is given at a time."""
    if isinstance(executor, ClusterExecutor):
        return max(1, QUEUED * executor.slots())
    return QUEUED * executor.workers if isinstance(executor, Processes) else IN_FLIGHT


class Processes(ProcessPoolExecutor, Reporting):
    """Processes of this machine; see `process_pool`."""

    def __init__(self, workers: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers, self.channel = workers, QueueChannel(context)
        super().__init__(
            workers,
            mp_context=context,
            initializer=_start_worker,
            initargs=(threads, self.channel.queue),
        )


@contextmanager
def process_pool(workers: int) -> Iterator[Executor]:
    """Spawned processes that share the cores this one may use: each computes with as many threads as its share.

    Never with more than this process does, so that OMP_NUM_THREADS holds for each of them.

    Raises:
        ArgumentError: No workers at all.
    """
    if workers < 1:
        raise ArgumentError(f"workers must be at least 1, not {workers}", argument="workers", value=workers)
    threads = max(1, min(usable_cores() // workers, torch.get_num_threads()))
    with Processes(workers, threads) as pool:
        yield pool


def _start_worker(threads: int, queue: "Queue[Message]") -> None:
    end_with_parent()
    initialize(queue)
    torch.set_num_threads(threads)


def _numbered(progress: ProgressCallback | None, shard: int, shards: int, total: int) -> ProgressCallback | None:
    """A callback that is also told which shard of how many is being written (1-based), and what all of them hold."""
    if progress is None:
        return None
    return lambda told: progress(replace(told, shard=shard, shards=shards, records_total=total))


def _finished(job: ShardJob, result: ShardResult) -> WriteProgress:
    tokens = [len(record.answer_ids) for record in job.records]
    return WriteProgress(
        step=sum(shard.training.steps for shard in result.shards),
        tokens_ordered=sum(tokens) - sum(tokens[index] for index in result.failed),
        tokens_total=sum(tokens),
        min_prob=min((shard.proof.min_prob for shard in result.shards), default=0.0),
        loss=0.0,
        rank=max((shard.training.rank for shard in result.shards), default=job.rank),
        elapsed_s=sum(shard.training.elapsed_s for shard in result.shards),
        records_ordered=len(job.records) - len(result.failed),
        records=len(job.records),
        proved=True,
    )
