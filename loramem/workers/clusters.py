"""Executors of machines that may come and go, with the settings that shard jobs need; each is an optional extra."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from loramem.errors import ArgumentError, NoWorkers, reason
from loramem.workers.executors import ClusterExecutor
from loramem.workers.job_folder import remove_abandoned

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local:"
NOWHERE = "127.0.0.1:0"
"""Of the status page of a local cluster: a port that is free, which nobody else reaches."""
STARTING_S = 60.0
"""The processes of a local cluster have so long to import what they need."""


@contextmanager
def dask_executor(cluster: "str | Client", *, wait_s: float = 0.0) -> Iterator[ClusterExecutor]:
    """A Dask cluster as the ``executor`` of `loramem.MemoryStore.write` and all else that trains.

    Args:
        cluster: A scheduler's address such as "tcp://10.0.0.1:8786", "local:4" for so many processes of this machine,
            or a `distributed.Client`, which is left open.
        wait_s: Seconds to wait for the first worker.

    Raises:
        NoWorkers: Nobody answers there, or there are no workers.
        ArgumentError: Dask is not installed, or "local:" without a number of processes.
    """
    _require("dask", "distributed")
    from distributed import Client, LocalCluster

    from loramem.workers.dask_workers import DaskExecutor

    if isinstance(cluster, Client):
        mine = DaskExecutor(cluster)
        mine.wait_for_workers(wait_s)
        with closing(mine.channel):
            yield mine
    elif cluster.startswith(LOCAL):
        count = _processes(cluster)
        with (
            LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=NOWHERE) as local,
            Client(local, set_as_default=False) as client,
            dask_executor(client, wait_s=STARTING_S) as executor,
        ):
            yield executor
        remove_abandoned()  # of workers that were ended in the middle of a job
    else:
        try:
            client = Client(cluster, set_as_default=False)
        except (OSError, ValueError) as error:
            raise NoWorkers(f"No Dask scheduler answers at {cluster} ({reason(error)}). Start one there.") from None
        with client, dask_executor(client, wait_s=wait_s) as executor:
            yield executor


@contextmanager
def ray_executor(
    address: str = "auto", *, wait_s: float = 0.0, num_cpus: float = 1, num_gpus: float | None = None
) -> Iterator[ClusterExecutor]:
    """A Ray cluster as the ``executor`` of `loramem.MemoryStore.write` and all else that trains: an actor for every GPU
    of it, or for every CPU where there are none.

    Args:
        address: Of a cluster's head, such as "10.0.0.1:6379" or "ray://…"; "auto" is the one that this machine is of;
            "local" starts one of this machine alone. Where Ray is in use already, that cluster is taken.
        wait_s: Seconds to wait until the cluster has the CPU or GPU of one worker.
        num_cpus: That each actor takes.
        num_gpus: The same of GPUs, such as 0.5 for two on each; by default 1 where the cluster has any, else none.

    Raises:
        NoWorkers: Nobody answers there, or it has not the CPUs or GPUs of one worker.
        ArgumentError: Ray is not installed.
    """
    _require("ray", "ray")
    import ray

    from loramem.workers.ray_workers import RayExecutor

    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address, logging_level="error", log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise NoWorkers(f"No Ray cluster answers at {address} ({reason(error)}). Start one there.") from None
    try:
        with RayExecutor(num_cpus, num_gpus) as executor:
            executor.wait_for_workers(wait_s)
            yield executor
    finally:
        if mine:
            ray.shutdown()
        remove_abandoned()


def _require(extra: str, module: str) -> None:
    if find_spec(module) is None:
        raise ArgumentError(
            f"{module} is not installed: pip install 'loramem[{extra}]', here and on the workers",
            argument=extra,
            value=None,
        )


def _processes(cluster: str) -> int:
    number = cluster.removeprefix(LOCAL)
    if not number.isdecimal() or not int(number):
        raise ArgumentError(
            f"A local cluster is named by its processes, as in local:4, not {cluster!r}", argument="dask", value=cluster
        )
    return int(number)
