"""loramem put: one record."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .output import note, note_needs_ids, print_json
from .progress import write_bar

if TYPE_CHECKING:
    from loramem.planning.plan import GoalName


@click.command("put")
@click.argument("key")
@click.argument("value")
@options.change_options
@options.namespace_option
@options.goal_options
def command(
    key: str,
    value: str,
    store: Path,
    model: str | None,
    device: str,
    as_json: bool,
    namespace: str,
    goal: "GoalName",
    rank: int | None,
    max_rank: int,
    wait_s: float,
) -> None:
    """Write one record into the store (./memory unless named)."""
    from loramem import Record

    settings = options.writer_settings(goal, rank, max_rank)
    record = Record(key, value, namespace)
    with options.open_store(store, model, device, create=True, wait_s=wait_s) as opened, write_bar() as progress:
        report = opened.write([record], goal=goal, rank=rank, settings=settings, progress=progress)
    if as_json:
        print_json(report)
    elif report.written:
        note(f"Written; lowest p {report.min_prob:.3f}, rank {report.rank}, {report.elapsed_s:.1f} s.")
        note_needs_ids(report.needs_ids)
    else:
        note("The store holds this record already.")
