"""Live bars on stderr: of a write, and of a verify."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramem.writer import ProgressCallback, WriteProgress


@contextmanager
def write_bar() -> Iterator["ProgressCallback"]:
    """A callback that draws tokens ordered, lowest p, loss, rank, elapsed and estimated time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(told: "WriteProgress") -> None:
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

        yield show


@contextmanager
def verify_bar() -> Iterator[Callable[[int, int], None]]:
    """A callback that draws records done, elapsed and estimated time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("records"), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
