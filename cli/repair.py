"""loramem repair: damaged adapters and rows written anew."""

import click

from . import options
from .output import note, print_facts, print_json
from .progress import write_bar
from .workers import WorkerOptions, workers_options

RECALL_INCOMPLETE = 3


@click.command("repair")
@click.option("--drop-lost", is_flag=True, help="Delete the records whose value nobody knows any more.")
@options.change_options
@workers_options
def command(
    drop_lost: bool,
    store: options.StoreOptions,
    as_json: bool,
    workers: WorkerOptions,
) -> None:
    """Write damaged adapters and rows of the store (./memory unless named) anew from the values it keeps.

    Exit code 3 when records are lost; they are named.
    """
    with (
        store.open() as opened,
        workers.executor(store.wait_s) as executor,
        write_bar() as progress,
    ):
        report = opened.repair(drop_lost=drop_lost, progress=progress, executor=executor)
    if as_json:
        print_json(report)
    else:
        print_facts(
            [
                ("repaired", f"{report.repaired} records of {report.adapters} adapters"),
                ("lost", len(report.lost)),
                ("missing", report.missing),
                ("seconds", f"{report.elapsed_s:.1f}"),
            ]
        )
        for key in report.lost:
            note(f"lost: {key!r}")
        if report.missing:
            note(f"{report.missing} records have no row any more; write them again.")
    if report.lost or report.missing:
        click.get_current_context().exit(RECALL_INCOMPLETE)
