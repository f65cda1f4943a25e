"""Live bars on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramem.training.progress import ProgressCallback, WriteProgress


@contextmanager
def write_bar() -> Iterator["ProgressCallback"]:
    """A callback that draws tokens ordered, lowest p, loss, rank, elapsed and estimated time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]shard {task.fields[shard]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "tokens  lowest p {task.fields[min_prob]:.3f}  loss {task.fields[loss]:.3f}  rank {task.fields[rank]}"
        ),
        TextColumn("step {task.fields[step]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    tasks: dict[int, TaskID] = {}

    def show(told: "WriteProgress") -> None:
        if not tasks:
            bar.start()  # not before: what fails earlier has nothing to draw, and ending would print an empty line
        if told.shard not in tasks:
            tasks[told.shard] = bar.add_task(
                "", start=True, total=told.tokens_total, shard="", min_prob=0.0, loss=0.0, rank=0, step=0
            )
        bar.update(
            tasks[told.shard],
            completed=told.tokens_ordered,
            shard=f"{told.shard}/{told.shards}",
            min_prob=told.min_prob,
            loss=told.loss,
            rank=told.rank,
            step=told.step,
        )

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


@contextmanager
def count_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that draws how many of how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"[bold]{what}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar, task = Progress(*columns, console=Console(stderr=True)), None

    def show(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            bar.start()  # not before: what fails earlier has nothing to draw
            task = bar.add_task("", total=total)
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if task is not None:
            bar.stop()
