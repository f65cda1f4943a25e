"""loramem erase: records gone from every file."""

import click

from . import options
from .output import note, print_json
from .progress import write_bar
from .workers import WorkerOptions, workers_options


@click.command("erase")
@click.argument("keys", nargs=-1, required=True, metavar="KEY…")
@options.change_options
@workers_options
@options.namespace_option
def command(
    keys: tuple[str, ...],
    store: options.StoreOptions,
    as_json: bool,
    workers: WorkerOptions,
    namespace: str,
) -> None:
    """Delete records of the store (./memory unless named) for real, with every earlier version and their history.

    A record that was renamed goes by its new key. What shared an adapter with them is written anew. Afterwards no file
    of the store holds their values; backups and exports are out of reach.
    """
    with (
        store.open() as opened,
        workers.executor(store.wait_s) as executor,
        write_bar() as progress,
    ):
        report = opened.erase(keys, namespace, progress=progress, executor=executor)
    if as_json:
        print_json(report)
    else:
        note(
            f"Erased {report.keys} keys; {report.records} records that shared an adapter were written anew "
            f"({report.elapsed_s:.1f} s)."
        )
