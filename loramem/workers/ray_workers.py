"""Jobs on a Ray cluster; `loramem.workers.clusters` is the way here."""

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from loramem.workers.executors import ClusterExecutor
from loramem.workers.steps import Channel, Message, Reporting

TRIES = 3
"""Times that a job is run again whose worker went down with it."""
_Answer = TypeVar("_Answer")


class _Worker:
    """An actor: a process of its own, which keeps the base model from job to job."""

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class _Inbox:
    """An actor that keeps what was told until it is asked."""

    def __init__(self) -> None:
        self.messages = list[Message]()

    def put(self, message: Message) -> None:
        self.messages.append(message)

    def take(self) -> list[Message]:
        taken, self.messages = self.messages, []
        return taken


class InboxChannel(Channel):
    """An actor beside the workers."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox: Any = None

    def sender(self) -> Callable[[Message], None]:
        if self.inbox is None:
            self.inbox = ray.remote(num_cpus=0)(_Inbox).remote()
        return partial(_put, self.inbox)

    def received(self) -> list[Message]:
        try:
            taken: list[Message] = ray.get(self.inbox.take.remote())
        except RayError:  # it went with its machine: there is no progress any more, and the write goes on
            return []
        return taken

    def close(self) -> None:
        if self.inbox is not None:
            ray.kill(self.inbox)


def _put(inbox: Any, message: Message) -> None:
    inbox.put.remote(message)


class RayExecutor(ClusterExecutor, Reporting):
    """Actors that are started with the first job, as many as fit then, and a thread for each, which waits for it.

    Args:
        num_cpus: That each takes.
        num_gpus: The same of GPUs; 1 where the cluster has any if None, else none.
    """

    lost = (RayError,)

    def __init__(self, num_cpus: float = 1, num_gpus: float | None = None) -> None:
        self.place = f"The Ray cluster at {ray.get_runtime_context().gcs_address}"
        self._cpus = num_cpus
        self._gpus = float(ray.cluster_resources().get("GPU", 0) >= 1) if num_gpus is None else num_gpus
        self._actors, self._idle = list[Any](), queue.SimpleQueue[Any]()
        self._pool: ThreadPoolExecutor | None = None
        self.channel = InboxChannel()

    def slots(self) -> int:
        there = ray.cluster_resources()
        fits = [there.get("CPU", 0) / self._cpus] if self._cpus else []
        fits += [there.get("GPU", 0) / self._gpus] if self._gpus else []
        return int(min(fits, default=0))

    def submit(self, fn: Callable[..., _Answer], /, *args: Any, **kwargs: Any) -> Future[_Answer]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(self.actors()))
        return self._pool.submit(self._run, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)
        for actor in self._actors:
            ray.kill(actor)
        self.channel.close()

    def actors(self) -> list[Any]:
        """Handles of the actors, started now if they were not."""
        if not self._actors:
            settings = {"num_cpus": self._cpus, "num_gpus": self._gpus}
            kind = ray.remote(**settings, max_restarts=-1, max_task_retries=TRIES)(_Worker)
            self._actors = [kind.remote() for _ in range(max(1, self.slots()))]
            for actor in self._actors:
                self._idle.put(actor)
        return self._actors

    def _run(self, fn: Callable[..., _Answer], *args: Any, **kwargs: Any) -> _Answer:
        actor = self._idle.get()
        try:
            answer: _Answer = ray.get(actor.run.remote(fn, *args, **kwargs))
            return answer
        except RayTaskError as error:  # of the job itself
            raise error.cause from None
        finally:
            self._idle.put(actor)
