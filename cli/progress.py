"""Live bars on stderr, where a terminal shows them: one line, which goes when the work is done."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import terminal

if TYPE_CHECKING:
    from rich.progress import Progress

    from loramem.training.progress import ProgressCallback, WriteProgress

READING = "reading the facts"
UNTRAINED = 0.35
"""Share of a shard's training that is over when its first tokens are ordered, about."""
PROOF_READS = 2
"""Of a record, beside the one that training sees: in each dtype, by and large."""
LEAST_CERTAIN, ALONE_READS = 16, 12
"""Records that are decoded once more when all are certified, and how many reads in a batch one of them costs."""


@contextmanager
def write_bar() -> Iterator["ProgressCallback"]:
    """A callback that draws facts learned and certified of all, and seconds left."""
    with batches_bar() as bar:
        yield (lambda told: None) if bar is None else bar.see


@contextmanager
def batches_bar() -> Iterator["BatchBar | None"]:
    """The same for one batch after the other; None where nobody sees it."""
    if not terminal.is_read(sys.stderr):
        yield None
        return
    mine = BatchBar()
    with _bar(mine.left) as bar:
        mine.draw_on(bar)
        yield mine


class BatchBar:
    """One bar, which begins again with every batch."""

    def __init__(self) -> None:
        self.estimate = WriteEstimate(time.monotonic())

    def draw_on(self, bar: "Progress") -> None:
        self._bar, self._task = bar, bar.add_task(READING, total=None)

    def see(self, told: "WriteProgress") -> None:
        self.estimate.see(told, time.monotonic())
        self._bar.update(
            self._task, description=str(self.estimate), completed=self.estimate.learned, total=told.records_total
        )

    def begin(self) -> None:
        """The next batch; how this one ended is drawn, however short it was."""
        self._bar.refresh()
        self.estimate = WriteEstimate(time.monotonic())
        self._bar.reset(self._task, description=READING)

    def left(self, now: float) -> float | None:
        return self.estimate.left(now)


@contextmanager
def count_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that draws how many of how many are done, and seconds left."""
    if not terminal.is_read(sys.stderr):
        yield lambda done, total: None
        return
    started, told = time.monotonic(), [0, 0]

    def left(now: float) -> float | None:
        done, total = told
        return (now - started) * (total - done) / done if done else None

    with _bar(left) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            told[:] = done, total
            bar.update(task, description=f"{done:,} of {total:,} {what}", completed=done, total=total)

        yield show


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what is waited for, where nothing can be counted."""
    if not terminal.is_read(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


class WriteEstimate:
    """How far a write is, and when it will be done.

    Once a shard is proved, by the time that records took so far. Before, by what went before training: the base model
    read all records to price them, and the shard's once more for what training sees; a proof reads them again.
    """

    def __init__(self, started: float) -> None:
        """
        Args:
            started: Seconds on a monotonic clock, as all times here.
        """
        self.started = self.begun = started
        self.shards: dict[int, WriteProgress] = {}
        self.total = 0
        self.per_read = 0.0
        """Seconds that the base model takes for a record in a batch."""
        self.ends: float | None = None

    def see(self, told: "WriteProgress", now: float) -> None:
        if not self.shards and not told.proved:
            self.begun = max(now - told.elapsed_s, self.started)  # workers may have begun while another batch was seen
            self.per_read = (self.begun - self.started) / (told.records_total + told.records)
        self.total = told.records_total
        known = self.shards.get(told.shard)
        if known is None or told.proved or told.records_ordered >= known.records_ordered:
            self.shards[told.shard] = told  # what is trained again, or gets an adapter of its own, takes nothing back
        alone = min(LEAST_CERTAIN, told.records_total) * ALONE_READS * self.per_read
        if told.proved:
            self.ends = now + (now - self.begun) * (told.records_total / self._proved - 1) + alone
        elif not self._proved:
            self.ends = now + self._first_shard(told) + alone

    def left(self, now: float) -> float | None:
        """Seconds; None before anything is known."""
        return None if self.ends is None else max(0.0, self.ends - now)

    def __str__(self) -> str:
        if self.certified == self.total:
            return f"{self.total:,} facts certified, the least certain once more"
        return f"{self.learned:,} of {self.total:,} facts learned, {self.certified:,} certified"

    @property
    def learned(self) -> int:
        """Facts whose every token was certain enough when last seen in training."""
        return sum(told.records_ordered for told in self.shards.values())

    @property
    def certified(self) -> int:
        """Facts that were decoded from an adapter as saved."""
        return sum(told.records_ordered for told in self.shards.values() if told.proved)

    @property
    def _proved(self) -> int:
        return sum(told.records for told in self.shards.values() if told.proved)

    def _first_shard(self, told: "WriteProgress") -> float:
        """Seconds from a step of the first shard to the proof of the last."""
        trained = UNTRAINED + (1 - UNTRAINED) * told.tokens_ordered / told.tokens_total
        training = told.elapsed_s / trained
        proof = PROOF_READS * told.records * self.per_read
        others = (told.records_total - told.records) * ((1 + PROOF_READS) * self.per_read + training / told.records)
        return training - told.elapsed_s + proof + others / len(self.shards)  # so many workers are at it


@contextmanager
def _bar(left: Callable[[float], float | None]) -> "Iterator[Progress]":
    """A line of what it is about, a bar as long as there is room, and seconds left, until the block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = left(time.monotonic())
            return Text("" if seconds is None else f"{duration(seconds)} left", style="cyan")

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), Left())
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        yield bar


def duration(seconds: float) -> str:
    """Such as 8 s, 2 min 05 s or 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
