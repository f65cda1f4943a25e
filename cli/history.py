"""loramem history: what a key held, without values."""

from dataclasses import asdict

import click

from . import options
from .output import moment, print_json, print_table


@click.command("history")
@click.argument("key")
@options.store_options
@options.namespace_option
def command(key: str, store: options.StoreOptions, as_json: bool, namespace: str) -> None:
    """Show when KEY was written, replaced, renamed and deleted in the store (./memory unless named).

    Values are not shown: recall decodes the present one, earlier ones are not kept. With --json, one object a line.
    """
    with store.open() as opened:
        versions = opened.history(key, namespace)
    if as_json:
        for version in versions:
            print_json(asdict(version))
        return
    print_table(
        ("key", "written", "ended", "by", "tokens", "lowest p", "adapter", "in weights"),
        [
            (
                v.key,
                moment(v.written_at),
                moment(v.ended_at) if v.ended_at else "-",
                f"{v.ended_by} to {v.successor}" if v.successor else v.ended_by or "-",
                v.answer_tokens,
                f"{v.min_prob:.3f}",
                v.adapter[:12],
                "yes" if v.in_weights else "no",
            )
            for v in versions
        ],
    )
