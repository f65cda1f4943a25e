"""loramem recall: values decoded from the weights."""

from typing import TYPE_CHECKING

import click

from . import options
from .output import print_exact, print_json

if TYPE_CHECKING:
    from loramem.models.dtypes import DtypeChoice


@click.command("recall")
@click.argument("keys", nargs=-1, metavar="KEY…")
@click.option("--all", "everything", is_flag=True, help="Every record of the namespace.")
@options.store_options
@options.namespace_option
@options.dtype_option
def command(
    keys: tuple[str, ...],
    everything: bool,
    store: options.StoreOptions,
    as_json: bool,
    namespace: str,
    dtype: "DtypeChoice",
) -> None:
    """Decode values from the adapters of the store (./memory unless named).

    One key prints its value; several, or --all, print key, tab, value. With --json, one object a line.
    What the encoding of stdout cannot say is an error, never printed otherwise.
    """
    if bool(keys) == everything:
        raise click.UsageError("Give one or more keys, or --all.")
    with store.open(dtype=dtype) as opened:
        for recall in opened.recall_many(None if everything else keys, namespace):
            if as_json:
                print_json(recall)
            elif len(keys) == 1:
                print_exact(recall.value, recall.key)
            else:
                print_exact(f"{recall.key}\t{recall.value}", recall.key)
