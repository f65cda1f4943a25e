"""loramem rm: records that are not recalled any more."""

from pathlib import Path

import click

from . import options
from .output import note, print_json


@click.command("rm")
@click.argument("keys", nargs=-1, required=True, metavar="KEY…")
@options.change_options
@options.namespace_option
def command(
    keys: tuple[str, ...],
    store: Path,
    model: str | None,
    device: str,
    as_json: bool,
    wait_s: float,
    namespace: str,
) -> None:
    """Delete records from the store (./memory unless named), all of them or none.

    Their values stay in adapters until compact; erase clears every trace.
    """
    with options.open_store(store, model, device, wait_s=wait_s) as opened:
        count = opened.delete(keys, namespace)
    print_json({"deleted": count}) if as_json else note(f"Deleted {count} records.")
