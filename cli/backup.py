"""loramem backup: a copy of a store that may be in use."""

from pathlib import Path

import click

from . import options
from .output import note, print_json


@click.command("backup")
@click.argument("target", type=click.Path(path_type=Path))
@options.store_options
def command(target: Path, store: options.StoreOptions, as_json: bool) -> None:
    """Copy the store (./memory unless named), even while it is written to, to the new folder TARGET.

    The copy is a store, as it was committed at one moment.
    """
    with store.open() as opened:
        size_bytes = opened.backup(target)
    print_json({"bytes": size_bytes}) if as_json else note(f"Copied {size_bytes:,} bytes to {target}.")
