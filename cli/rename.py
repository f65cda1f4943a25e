"""loramem rename: the same value under another key."""

import click

from . import options
from .output import note, note_needs_ids, print_json
from .progress import write_bar


@click.command("rename")
@click.argument("key")
@click.argument("new_key")
@options.change_options
@options.namespace_option
@options.goal_options
def command(
    key: str,
    new_key: str,
    store: options.StoreOptions,
    as_json: bool,
    namespace: str,
    ranks: options.RankOptions,
) -> None:
    """Write the value of KEY under NEW_KEY and end KEY, in one commit of the store (./memory unless named)."""
    settings = ranks.settings()
    with store.open() as opened, write_bar() as progress:
        report = opened.rename(
            key, new_key, namespace=namespace, goal=ranks.goal, rank=ranks.rank, settings=settings, progress=progress
        )
    if as_json:
        print_json(report)
    else:
        note(f"Renamed; lowest p {report.min_prob:.3f}, rank {report.rank}, {report.elapsed_s:.1f} s.")
        note_needs_ids(report.needs_ids)
