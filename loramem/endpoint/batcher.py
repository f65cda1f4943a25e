"""Concurrent questions, decoded together: whatever waits when a batch is done is the next one."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from loramem.endpoint.limits import Limits
from loramem.endpoint.protocol import Question
from loramem.errors import LoramemError
from loramem.results import Recall

LINGER, LOOKS, QUIET_LOOKS = 0.5, 10, 2
"""A batch waits for more questions as long as they keep coming, for so much of the time that the one before took at
most: it looks so often, and goes ahead where none came between so many looks. Few rows cost more each than many
(loramem-tiny on one core: 6.6 ms a record in batches of 32, 5.0 in batches of 64)."""
Decode = Callable[[Sequence[Question]], Sequence[Recall | LoramemError]]
_Result = TypeVar("_Result")
_Asked = tuple[Question, "asyncio.Future[Recall | LoramemError]"]


class Batcher:
    """Takes questions one at a time and has them decoded in batches, in one thread, which alone uses the model.

    Args:
        decode: Answers questions in their order.
    """

    def __init__(self, decode: Decode, limits: Limits) -> None:
        self.decode, self.limits = decode, limits
        self._waiting = deque[_Asked]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loramem-decode")
        self._more = asyncio.Event()

    async def run(self) -> None:
        """Decode what is asked until cancelled."""
        wanted, taken_s = 1, 0.0
        try:
            while True:
                await self._more.wait()
                await self._gather(wanted, LINGER * taken_s)
                batch = self._next()
                if not batch:
                    self._more.clear()
                    continue
                started = time.monotonic()
                await self._answer(batch)
                taken_s = time.monotonic() - started
                wanted = min(
                    self.limits.batch_records, len(self._waiting) + len(batch)
                )  # who was answered may ask again
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def ask(self, question: Question) -> Recall:
        """The answer to one question.

        Raises:
            LoramemError: As `loramem.MemoryStore.recall`.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        self._more.set()
        answer: Recall | LoramemError = await future
        if isinstance(answer, LoramemError):
            raise answer
        return answer

    async def alone(self, call: Callable[[], _Result]) -> _Result:
        """Run something else that needs the model, between batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _gather(self, wanted: int, most_s: float) -> None:
        """Wait for so many questions, as long as they keep coming, so that batches do not fall into halves."""
        seen = list[int]()
        for _ in range(LOOKS):
            seen.append(len(self._waiting))
            if not 0 < seen[-1] < wanted or seen[-1 - QUIET_LOOKS :].count(seen[-1]) > QUIET_LOOKS:
                break
            await asyncio.sleep(most_s / LOOKS)

    async def _answer(self, batch: list[_Asked]) -> None:
        try:
            answers = await self.alone(partial(self.decode, [question for question, _ in batch]))
        except Exception as error:  # of the batch as a whole, such as a store that cannot be read now
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def _next(self) -> list[_Asked]:
        """The oldest questions that somebody still waits for."""
        batch = list[_Asked]()
        while self._waiting and len(batch) < self.limits.batch_records:
            question, future = self._waiting.popleft()
            if not future.done():  # cancelled, where its client has gone or its time is over
                batch.append((question, future))
        return batch
