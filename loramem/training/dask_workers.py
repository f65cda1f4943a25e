"""Jobs on a Dask cluster; `loramem.training.clusters` is the way here."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from distributed import Client
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from loramem.training.executors import ClusterExecutor

_Answer = TypeVar("_Answer")


class DaskExecutor(ClusterExecutor):
    """A client's workers. A job that goes down with its worker is run again on others, three times in all unless
    ``distributed.scheduler.allowed-failures`` says otherwise."""

    lost = (KilledWorker, CommClosedError)

    def __init__(self, client: Client) -> None:
        self.client, self.place = client, f"The Dask cluster at {client.scheduler.address}"
        # pure=False: else each job is hashed to look for an equal one, which takes longer than sending it.
        self._executor = client.get_executor(pure=False)

    def submit(self, fn: Callable[..., _Answer], /, *args: Any, **kwargs: Any) -> Future[_Answer]:
        future: Future[_Answer] = self._executor.submit(fn, *args, **kwargs)
        return future

    def slots(self) -> int:
        return len(self.client.nthreads())  # processes: the threads of one take turns

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait=wait and not cancel_futures)
