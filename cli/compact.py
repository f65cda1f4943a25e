"""loramem compact: small and half-dead adapters written anew."""

from typing import TYPE_CHECKING

import click

from . import options
from .output import note, print_facts, print_json
from .progress import write_bar
from .workers import WorkerOptions, workers_options

if TYPE_CHECKING:
    from loramem import CompactChoice


@click.command("compact")
@click.option(
    "--dead", "which", flag_value="dead", help="Rewrite every adapter that holds a deleted or replaced record."
)
@click.option("--all", "which", flag_value="all", help="Rewrite every adapter, whether it pays or not.")
@options.change_options
@workers_options
def command(
    which: "CompactChoice | None",
    store: options.StoreOptions,
    as_json: bool,
    workers: WorkerOptions,
) -> None:
    """Rewrite small and half-dead adapters of the store (./memory unless named) from the frozen base, in one commit.

    Nothing of deleted records is left in the new ones. The old files go with gc, after its grace.
    """
    with (
        store.open() as opened,
        workers.executor(store.wait_s) as executor,
        write_bar() as progress,
    ):
        report = opened.compact(which=which or "advised", progress=progress, executor=executor)
    if as_json:
        print_json(report)
    elif report.adapters_before:
        print_facts(
            [
                ("records", report.records),
                ("adapters", f"{report.adapters_after}, were {report.adapters_before}"),
                ("parameters", f"{report.parameters_after:,}, were {report.parameters_before:,}"),
                ("lowest p", "-" if report.min_prob is None else f"{report.min_prob:.3f}"),
                ("seconds", f"{report.elapsed_s:.1f}"),
            ]
        )
    else:
        note("Nothing to compact that pays; --dead and --all rewrite adapters in any case.")
