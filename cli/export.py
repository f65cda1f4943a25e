"""loramem export: a store as a directory or one file."""

from pathlib import Path

import click

from . import options
from .output import note, print_json


@click.command("export")
@click.argument("target", type=click.Path(path_type=Path))
@options.store_options
def command(target: Path, store: options.StoreOptions, as_json: bool) -> None:
    """Write the store (./memory unless named) to the new folder TARGET, or to one file if TARGET ends in .tar.

    A manifest lists every file with its sha256. Whoever has it can read the keys, and the values too.
    """
    with store.open() as opened:
        size_bytes = opened.export(target)
    print_json({"bytes": size_bytes}) if as_json else note(f"Exported {size_bytes:,} bytes to {target}.")
