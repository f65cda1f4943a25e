"""loramem put: one record."""

import click

from . import options
from .output import note, note_needs_ids, print_json
from .progress import write_bar


@click.command("put")
@click.argument("key")
@click.argument("value")
@options.planned_change_options
@options.namespace_option
@options.goal_options
@options.ask_option
def command(
    key: str,
    value: str,
    store: options.StoreOptions,
    as_json: bool,
    namespace: str,
    ranks: options.RankOptions,
    ask: tuple[str, ...],
) -> None:
    """Write one record into the store (./memory unless named)."""
    from loramem import Record

    settings = ranks.settings()
    record = Record(key, value, namespace)
    with store.load(create=True) as opened, write_bar() as progress:
        report = opened.write([record], ask=ask, goal=ranks.goal, rank=ranks.rank, settings=settings, progress=progress)
    if as_json:
        print_json(report)
    elif report.written or report.questions:
        note(f"Written; lowest p {report.min_prob:.3f}, rank {report.rank}, {report.elapsed_s:.1f} s.")
        note_needs_ids(report.needs_ids)
    else:
        note("The store holds this record already.")
