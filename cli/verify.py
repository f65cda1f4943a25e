"""loramem verify: every file hashed, every record decoded."""

import click

from . import options
from .output import note, print_facts, print_json
from .progress import count_bar
from .workers import WorkerOptions, waited_workers_options

RECALL_INCOMPLETE, DAMAGED = 3, 4


@click.command("verify")
@click.option("--quick", is_flag=True, help="Structure and hashes alone; the base model is not loaded.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted verify stopped, if nothing has changed since.")
@options.store_options
@waited_workers_options
def command(quick: bool, resume: bool, store: options.StoreOptions, workers: WorkerOptions, as_json: bool) -> None:
    """Check every file and row of the store (./memory unless named) and decode every record.

    Exit code 3 when a record does not come back, 4 when something is damaged.
    """
    if quick and resume:
        raise click.UsageError("--quick decodes nothing that could be resumed: give one of the two.")
    if quick and workers != WorkerOptions():
        raise click.UsageError("--quick decodes nothing that others could compute.")
    with store.open() as opened:
        if quick:
            report = opened.verify(quick=True)
        else:
            with workers.executor() as executor, count_bar("records") as progress:
                report = opened.verify(resume=resume, progress=progress, executor=executor)
    if as_json:
        print_json(report)
    else:
        print_facts(
            [
                ("records", report.records),
                ("exact", "not decoded" if report.exact is None else report.exact),
                *([("resumed", f"{report.resumed} of these decoded before")] if report.resumed else []),
                ("damaged", len(report.damaged)),
                ("seconds", f"{report.elapsed_s:.1f}"),
            ]
        )
        for problem in report.damaged:
            note(f"damaged: {problem}")
        for key in report.failed:
            note(f"not recalled: {key!r}")
    if not report.ok:
        click.get_current_context().exit(DAMAGED if report.damaged else RECALL_INCOMPLETE)
