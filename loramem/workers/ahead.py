"""Jobs of the next batch that are begun while the last ones of this are done, so that no worker waits."""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")
WAITING = 2
"""Times as many answers as jobs in flight may wait here for their batch."""


class Ahead(Generic[_Item, _Answer]):
    """Jobs in flight whose batch has not begun: what comes of them waits in memory.

    Args:
        executor: Runs them.
        function: That it runs on each.
        identity: By which a batch finds its own.
        upcoming: The next batch's jobs that have not begun, none as long as they are not known.
    """

    def __init__(
        self,
        executor: Executor,
        function: Callable[[_Item], _Answer],
        identity: Callable[[_Item], Hashable],
        upcoming: Callable[[], Iterator[_Item]],
    ) -> None:
        self._executor, self._function, self._identity, self._upcoming = executor, function, identity, upcoming
        self._begun = dict[Hashable, Future[_Answer]]()

    def submit(self, item: _Item) -> Future[_Answer]:
        """The job of a batch that begins, submitted now if it was not before."""
        begun = self._begun.pop(self._identity(item), None)
        return self._executor.submit(self._function, item) if begun is None else begun

    def fill(self, room: int, most: int, done: Callable[[Future[_Answer]], None]) -> None:
        """Begin jobs as long as fewer than ``room`` of them are under way.

        Args:
            most: That are in flight in all.
            done: Called with each as it is done.
        """
        if room <= 0:
            return
        under_way = sum(not future.done() for future in self._begun.values())
        jobs = self._upcoming()
        while under_way < room and len(self._begun) < WAITING * most and (item := next(jobs, None)) is not None:
            future = self._begun[self._identity(item)] = self._executor.submit(self._function, item)
            future.add_done_callback(done)
            under_way += 1

    def cancel(self) -> None:
        """Forget them; those that no worker has are not run."""
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()
