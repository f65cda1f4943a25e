"""loramem import: a store from an export."""

from pathlib import Path

import click

from . import options
from .output import note, print_json


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@options.store_option
@options.json_option
def command(source: Path, store: Path, as_json: bool) -> None:
    """Make a new store (./memory unless named) from SOURCE, which loramem export wrote.

    Every file, row and seal is checked; loramem verify then decodes the values.
    """
    from loramem import MemoryStore

    with MemoryStore.import_bundle(source, store) as opened:
        count = opened.stats().records
    print_json({"records": count}) if as_json else note(f"Imported {count} records into {store}.")
