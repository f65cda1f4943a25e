"""A long input on somebody else's workers, batch by batch: while one is trained the next is read, admitted and planned.

A thread does that, over a connection to the index of its own. It sees the index before or after the commit of the
batch that is trained meanwhile, so what it admitted is compared with the index once more when its turn comes, and
planned again if anything has changed. Plans go by what the store had learnt when the batch before was begun: so they
are the same however fast the thread is.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, closing
from operator import attrgetter
from typing import TypeVar

from loramem._util.collection import uncollected
from loramem.index.index import Index
from loramem.records.outcome import Outcome
from loramem.records.record import Record
from loramem.results import WriteReport
from loramem.store.request import OnConflict, WriteRequest
from loramem.store.write import Prepared, Transaction
from loramem.training.jobs import ShardJob
from loramem.training.progress import ProgressCallback
from loramem.workers.ahead import Ahead
from loramem.workers.executors import job_function

_Answer = TypeVar("_Answer")


def write_batches(
    transaction: Transaction,
    writing: Callable[[], AbstractContextManager[object]],
    parts: Iterator[list[Record]],
    request: Callable[[Index, Sequence[Record]], WriteRequest],
    on_conflict: OnConflict,
    progress: ProgressCallback | None,
    executor: Executor,
) -> Generator[WriteReport]:
    """What each batch came to, once it is committed.

    Args:
        writing: Holds the store's locks, for one batch.
        parts: The records of each; an empty list ends them. Taken by another thread.
        request: For a batch, by what the index says; asked for by another thread, and again when its turn comes.

    Raises what `Transaction.write` raises, at the batch that fails.
    """

    planner = transaction.planner

    def prepare(learnt: Sequence[Outcome]) -> Prepared | None:
        with uncollected(), closing(Index(transaction.index.path)) as index:
            if not (records := next(parts, [])):
                return None
            mine = planner.over(index)
            asked = request(index, records)
            return transaction.prepare(records, asked, on_conflict, executor, planner=mine, learnt=learnt)

    def known() -> Iterator[ShardJob]:
        """Jobs of the batch that is being prepared, as soon as it is."""
        if not upcoming.done() or upcoming.exception() is not None or (ready := upcoming.result()) is None:
            return iter(())
        return ready.waiting

    ahead = Ahead(executor, job_function(executor, progress), attrgetter("identity"), known)
    with writing():
        learnt = planner.learnt()
        # What reads the model, or calibrates it, does so now: later it is in use.
        planner.plan_inputs(None, 0, None, learnt)
        planner.adapted.base.unreachable  # noqa: B018
    upcoming = in_background(prepare, learnt)
    try:
        while (prepared := upcoming.result()) is not None:
            with writing():
                before, learnt = learnt, planner.learnt()
                upcoming = in_background(prepare, learnt)
                asked = request(transaction.index, prepared.records)
                report = transaction.write_prepared(prepared, asked, on_conflict, progress, executor, ahead, before)
            yield report
    finally:
        ahead.cancel()


def in_background(work: Callable[[Sequence[Outcome]], _Answer], learnt: Sequence[Outcome]) -> Future[_Answer]:
    """The work in a thread that nobody waits for when the process ends: it may hang on what it reads."""
    future: Future[_Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work(learnt))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
