"""loramem gc: files that no live record needs."""

import click

from . import options
from .output import note, print_json


@click.command("gc")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Keep adapters that were retired less than so long ago, for readers that began before.",
)
@options.change_options
def command(grace_s: float, store: options.StoreOptions, as_json: bool) -> None:
    """Remove adapters that no live record of the store (./memory unless named) needs any more."""
    with store.open() as opened:
        report = opened.gc(grace_s)
    if as_json:
        print_json(report)
    else:
        kept = f"; {report.kept} are kept until their grace is over" if report.kept else ""
        note(f"Removed {report.adapters} adapters, {report.freed_bytes:,} bytes{kept}.")
