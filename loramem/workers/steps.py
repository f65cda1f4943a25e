"""How far jobs of other processes are, told to the one that waits for them, where their executor has a way back.

A message says numbers and the name of a job, which only who sent it can tell: what a job's own hash is made of could
be guessed from it.
"""

import hashlib
import queue
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from typing import Any

from loramem.training.jobs import ShardJob
from loramem.training.progress import ProgressCallback, WriteProgress

EVERY_S = 1.0
"""A job tells its first step, and then one in so many seconds."""
Message = tuple[str, WriteProgress]


@dataclass(frozen=True)
class Teller:
    """Goes with the jobs to their processes.

    Args:
        send: Picklable.
    """

    send: Callable[[Message], None]
    salt: str

    def of(self, job: ShardJob) -> ProgressCallback:
        """Tells some of a job's steps."""
        name, due = _name(self.salt, job), 0.0

        def tell(told: WriteProgress) -> None:
            nonlocal due
            if (now := time.monotonic()) >= due:
                due = now + EVERY_S
                self.send((name, told))

        return tell


class Channel(ABC):
    """The way back from an executor's processes; where nobody listens nothing is sent."""

    def __init__(self) -> None:
        self._salt = secrets.token_hex(16)

    @abstractmethod
    def sender(self) -> Callable[[Message], None]:
        """Picklable, for a process of the executor."""

    @abstractmethod
    def received(self) -> list[Message]:
        """What came since it was asked before."""

    def close(self) -> None:  # noqa: B027 - what holds nothing open has nothing to do
        """Hear nothing more."""

    def teller(self) -> Teller:
        return Teller(self.sender(), self._salt)

    def listener(
        self, jobs: Sequence[ShardJob], progress: ProgressCallback, done: Container[int]
    ) -> Callable[[], None]:
        """What hands on what came of these jobs, each time that it is called.

        Args:
            done: Places of those that are not heard of any more.
        """
        numbers = {_name(self._salt, job): number for number, job in enumerate(jobs)}
        total = sum(len(job.records) for job in jobs)

        def hear() -> None:
            for name, told in self.received():
                if (number := numbers.get(name)) is not None and number not in done:
                    progress(replace(told, shard=number + 1, shards=len(jobs), records_total=total))

        return hear


class Reporting(Executor):
    """An executor with a way back."""

    channel: Channel


def _name(salt: str, job: ShardJob) -> str:
    return hashlib.sha256(f"{salt}{job.identity}".encode()).hexdigest()[:16]


class QueueChannel(Channel):
    """To the processes of a pool, which get their end of it as they start: see `initialize`."""

    def __init__(self, context: BaseContext) -> None:
        super().__init__()
        self.queue: Queue[Message] = context.Queue()

    def sender(self) -> Callable[[Message], None]:
        return _put

    def received(self) -> list[Message]:
        found = list[Message]()
        while True:
            try:
                found.append(self.queue.get_nowait())
            except queue.Empty:
                return found


_mine: Any = None
"""In a process of a pool: the queue to the one that started it."""


def initialize(mine: "Queue[Message]") -> None:
    global _mine
    mine.cancel_join_thread()  # what nobody took keeps no process from ending
    _mine = mine


def _put(message: Message) -> None:
    _mine.put(message)
