"""Shard jobs, one after the other in this process or side by side in an executor's."""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace

import torch

from loramem.errors import ArgumentError, WorkerLost
from loramem.models.adapters import AdaptedModel
from loramem.models.dtypes import Dtype
from loramem.training.processes import end_with_parent, usable_cores
from loramem.training.progress import ProgressCallback, WriteProgress
from loramem.training.shards import ShardJob, ShardResult, run_job, write_shard


def run_jobs(
    jobs: Sequence[ShardJob],
    adapted: AdaptedModel,
    served: Mapping[Dtype, AdaptedModel],
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> list[ShardResult]:
    """Results of the jobs, in their order.

    Args:
        adapted: The model that runs them in this process, if there is no executor.
        served: The same in other dtypes; see `write_shard`.
        executor: Runs `run_job` on each; its processes must find the base model and the staging folder.
        progress: Told of every step in this process, and of every finished shard.

    Raises as `run_job`, at the first job that fails; jobs that have not begun are cancelled.

    Raises:
        WorkerLost: A worker process was killed, or ran out of memory.
    """
    if executor is None:
        results = []
        for number, job in enumerate(jobs, start=1):
            results.append(write_shard(job, adapted, _numbered(progress, number, jobs), served))
            if progress is not None:
                progress(_finished(jobs, number, results[-1]))
        return results
    futures = {executor.submit(run_job, job): number for number, job in enumerate(jobs, start=1)}
    try:
        for future in as_completed(futures):
            number = futures[future]
            if progress is not None:
                progress(_finished(jobs, number, future.result()))
            future.result()
    except BrokenExecutor as error:
        raise WorkerLost(
            "A worker process ended in the middle of its shard (killed, or out of memory). Nothing was committed; "
            "finished shards are kept: go on with loramem write --resume, with fewer --workers."
        ) from error
    finally:
        for future in futures:
            future.cancel()
    return [future.result() for future in futures]


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
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    ) as pool:
        yield pool


def _start_worker(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


def _numbered(progress: ProgressCallback | None, shard: int, jobs: Sequence[ShardJob]) -> ProgressCallback | None:
    """A callback that is also told which shard of how many is being written (1-based), and what all of them hold."""
    if progress is None:
        return None
    total = _records(jobs)
    return lambda told: progress(replace(told, shard=shard, shards=len(jobs), records_total=total))


def _records(jobs: Sequence[ShardJob]) -> int:
    return sum(len(job.records) for job in jobs)


def _finished(jobs: Sequence[ShardJob], number: int, result: ShardResult) -> WriteProgress:
    job = jobs[number - 1]
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
        shard=number,
        shards=len(jobs),
        records_total=_records(jobs),
        proved=True,
    )
