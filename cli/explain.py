"""loramem explain: the probability of every token of a value."""

from dataclasses import asdict

import click

from . import options
from .output import print_json


@click.command("explain")
@click.argument("key")
@options.store_options
@options.namespace_option
def command(key: str, store: options.StoreOptions, as_json: bool, namespace: str) -> None:
    """Show why KEY is recalled: p of every answer token and the end token, with and without the adapter.

    A token is ordered when p > 0.5, and stubborn otherwise. The store is ./memory unless named.
    """
    with store.open() as opened:
        explanation = opened.explain(key, namespace)
    if as_json:
        print_json({**asdict(explanation), "min_prob": explanation.min_prob})
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("token", "p", "p of the base", "", box=None, header_style="bold", pad_edge=False)
    for token in explanation.tokens:
        colour = "green" if token.prob >= 0.9 else "yellow" if token.ordered else "red"
        label = "ordered" if token.ordered else "stubborn"
        bar = Text("█" * round(token.prob * 20), style=colour)
        table.add_row(
            Text(repr(token.text)),
            Text(f"{token.prob:.4f}", style=colour),
            Text(f"{token.base_prob:.4f}"),
            Text.assemble(bar, f" {label}"),
        )
    Console().print(table)
    click.echo(f"lowest p {explanation.min_prob:.4f}, adapter {explanation.adapter}")
