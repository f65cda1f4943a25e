"""--workers, --dask and --ray: who computes in place of this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from concurrent.futures import Executor

Command = Callable[..., Any]

_WAIT_FOR_WORKERS = click.option(
    "--wait",
    "first_worker_s",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for the first worker; by default not at all.",
)
_WORKERS = click.option(
    "--workers", type=click.IntRange(1), help="Compute in this many processes, which share the cores."
)
_DASK = click.option(
    "--dask",
    metavar="ADDRESS|local:N",
    help="Compute on a Dask cluster: its scheduler's address, or local:N for N processes of this machine.",
)
_RAY = click.option(
    "--ray", metavar="auto|ADDRESS", help="Compute on a Ray cluster, an actor for each GPU, or CPU without any."
)


@dataclass(frozen=True)
class WorkerOptions:
    """Who computes in place of this process; one of them at most."""

    processes: int | None = None
    dask: str | None = None
    ray: str | None = None
    wait_s: float = 0.0
    """For the first of a cluster."""

    @property
    def elsewhere(self) -> bool:
        """Whether a cluster computes."""
        return self.dask is not None or self.ray is not None

    @contextmanager
    def executor(self, wait_s: float | None = None) -> "Iterator[Executor | None]":
        """None for this process alone.

        Args:
            wait_s: In place of its own.

        Raises:
            NoWorkers: A cluster has nobody for so many seconds.
            ArgumentError: The extra is not installed.
        """
        if self.processes is not None:
            from loramem import process_pool

            with process_pool(self.processes) as pool:
                yield pool
        elif self.dask is not None:
            from loramem import dask_executor

            with dask_executor(self.dask, wait_s=self.wait_s if wait_s is None else wait_s) as cluster:
                yield cluster
        elif self.ray is not None:
            from loramem import ray_executor

            with ray_executor(self.ray, wait_s=self.wait_s if wait_s is None else wait_s) as cluster:
                yield cluster
        else:
            yield None


def cluster_options(command: Command) -> Command:
    """--dask, --ray and --wait, as ``cluster``, `WorkerOptions`; for a command whose --workers are something else."""

    @wraps(command)
    def with_cluster(*, dask: str | None, ray: str | None, first_worker_s: float, **others: Any) -> Any:
        if dask is not None and ray is not None:
            raise click.UsageError("Give one of --dask and --ray.")
        return command(cluster=WorkerOptions(None, dask, ray, first_worker_s), **others)

    return _DASK(_RAY(_WAIT_FOR_WORKERS(with_cluster)))


def workers_options(command: Command) -> Command:
    """--workers, --dask and --ray, as ``workers``, `WorkerOptions`; for commands that have --wait."""

    @wraps(command)
    def with_workers(*, workers: int | None, dask: str | None, ray: str | None, **others: Any) -> Any:
        if sum(each is not None for each in (workers, dask, ray)) > 1:
            raise click.UsageError("Give one of --workers, --dask and --ray.")
        return command(workers=WorkerOptions(workers, dask, ray), **others)

    return _WORKERS(_DASK(_RAY(with_workers)))


def waited_workers_options(command: Command) -> Command:
    """`workers_options` with a --wait of their own."""

    @wraps(command)
    def with_wait(*, workers: WorkerOptions, first_worker_s: float, **others: Any) -> Any:
        return command(workers=replace(workers, wait_s=first_worker_s), **others)

    return workers_options(_WAIT_FOR_WORKERS(with_wait))
