"""Jobs on a Dask cluster; `loramem.workers.clusters` is the way here."""

import queue
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from distributed import Client, get_worker
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from loramem.training.progress import WriteProgress
from loramem.workers.executors import ClusterExecutor
from loramem.workers.steps import Channel, Message, Reporting

_Answer = TypeVar("_Answer")


class EventChannel(Channel):
    """Events of a topic that the scheduler hands on."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client, self.topic = client, f"loramem-{secrets.token_hex(8)}"
        self._came, self._subscribed = queue.SimpleQueue[Message](), False

    def sender(self) -> Callable[[Message], None]:
        if not self._subscribed:
            self.client.subscribe_topic(self.topic, self._note)
            self._subscribed = True
        return partial(_log_event, self.topic)

    def received(self) -> list[Message]:
        return [self._came.get_nowait() for _ in range(self._came.qsize())]

    def close(self) -> None:
        if self._subscribed:
            self.client.unsubscribe_topic(self.topic)

    def _note(self, event: tuple[float, tuple[str, dict[str, Any]]]) -> None:
        _, (name, told) = event
        self._came.put((name, WriteProgress(**told)))


def _log_event(topic: str, message: Message) -> None:
    name, told = message
    get_worker().log_event(topic, (name, asdict(told)))


class DaskExecutor(ClusterExecutor, Reporting):
    """A client's workers. A job that goes down with its worker is run again on others, three times in all unless
    ``distributed.scheduler.allowed-failures`` says otherwise."""

    lost = (KilledWorker, CommClosedError)

    def __init__(self, client: Client) -> None:
        self.client, self.place = client, f"The Dask cluster at {client.scheduler.address}"
        # pure=False: else each job is hashed to look for an equal one, which takes longer than sending it.
        self._executor = client.get_executor(pure=False)
        self.channel = EventChannel(client)

    def submit(self, fn: Callable[..., _Answer], /, *args: Any, **kwargs: Any) -> Future[_Answer]:
        future: Future[_Answer] = self._executor.submit(fn, *args, **kwargs)
        return future

    def slots(self) -> int:
        return len(self.client.nthreads())  # processes: the threads of one take turns

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait=wait and not cancel_futures)
