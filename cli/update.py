"""loramem update: another value or other metadata for a record."""

import click

from . import options
from .output import note, note_needs_ids, print_json
from .progress import write_bar


@click.command("update")
@click.argument("key")
@click.argument("value", required=False)
@click.option("--meta", multiple=True, metavar="NAME=VALUE", help="Metadata in place of all it had; may be repeated.")
@options.change_options
@options.namespace_option
@options.goal_options
def command(
    key: str,
    value: str | None,
    meta: tuple[str, ...],
    store: options.StoreOptions,
    as_json: bool,
    namespace: str,
    ranks: options.RankOptions,
) -> None:
    """Give KEY another VALUE in the store (./memory unless named); the old one is not recalled from then on.

    Without VALUE only the metadata change, and nothing is trained. The old value stays in its adapter until compact;
    erase clears every trace.
    """
    if value is None and not meta:
        raise click.UsageError("Give a VALUE, or --meta.")
    settings = ranks.settings()
    with store.open() as opened, write_bar() as progress:
        report = opened.update(
            key,
            value,
            namespace=namespace,
            metadata=options.named_values(meta) if meta else None,
            goal=ranks.goal,
            rank=ranks.rank,
            settings=settings,
            progress=progress,
        )
    if as_json:
        print_json(report)
    elif report.written:
        note(f"Updated; lowest p {report.min_prob:.3f}, rank {report.rank}, {report.elapsed_s:.1f} s.")
        note_needs_ids(report.needs_ids)
    else:
        note("Metadata updated." if meta else "The store holds this record already.")
