"""loramem rename: the same value under another key."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .output import note, note_needs_ids, print_json
from .progress import write_bar

if TYPE_CHECKING:
    from loramem.planning.plan import GoalName


@click.command("rename")
@click.argument("key")
@click.argument("new_key")
@options.change_options
@options.namespace_option
@options.goal_options
def command(
    key: str,
    new_key: str,
    store: Path,
    model: str | None,
    device: str,
    as_json: bool,
    wait_s: float,
    namespace: str,
    goal: "GoalName",
    rank: int | None,
    max_rank: int,
) -> None:
    """Write the value of KEY under NEW_KEY and end KEY, in one commit of the store (./memory unless named)."""
    settings = options.writer_settings(goal, rank, max_rank)
    with options.open_store(store, model, device, wait_s=wait_s) as opened, write_bar() as progress:
        report = opened.rename(
            key, new_key, namespace=namespace, goal=goal, rank=rank, settings=settings, progress=progress
        )
    if as_json:
        print_json(report)
    else:
        note(f"Renamed; lowest p {report.min_prob:.3f}, rank {report.rank}, {report.elapsed_s:.1f} s.")
        note_needs_ids(report.needs_ids)
