"""loramem rm: records that are not recalled any more."""

import click

from . import options
from .output import note, print_json


@click.command("rm")
@click.argument("keys", nargs=-1, required=True, metavar="KEY…")
@options.change_options
@options.namespace_option
def command(
    keys: tuple[str, ...],
    store: options.StoreOptions,
    as_json: bool,
    namespace: str,
) -> None:
    """Delete records from the store (./memory unless named), all of them or none.

    Their values stay in adapters until compact; erase clears every trace.
    """
    with store.open() as opened:
        count = opened.delete(keys, namespace)
    print_json({"deleted": count}) if as_json else note(f"Deleted {count} records.")
