"""loramem ls: what the store holds, without decoding."""

from dataclasses import asdict
from pathlib import Path

import click

from . import options
from .output import print_json, print_table


@click.command("ls")
@click.option("--adapter", metavar="ID", help="Records of one adapter only.")
@click.option("--namespace", help="Records of one namespace only.")
@options.store_options
def command(
    adapter: str | None, namespace: str | None, store: Path, model: str | None, device: str, as_json: bool
) -> None:
    """List the records of the store (./memory unless named) with certificate and adapter.

    Values are not shown: recall decodes them. With --json, one object a line.
    """
    with options.open_store(store, model, device) as opened:
        records = list(opened.records(namespace, adapter))
    if as_json:
        for record in records:
            shown = asdict(record)
            print_json({name: shown[name] for name in shown if name not in ("value", "salt", "digest")})
        return
    print_table(
        ("key", "namespace", "tokens", "lowest p", "adapter", "written"),
        [(r.key, r.namespace, r.answer_tokens, f"{r.min_prob:.3f}", r.adapter[:12], r.written_at) for r in records],
    )
