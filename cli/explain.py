"""loramem explain: the probability of every token of a value."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from loramem._util.explained import MEANINGS, Certainty, certainty, visible
from loramem._util.printable import printable

from . import options, terminal
from .output import kept_facts, print_facts, print_json, print_table, print_text

if TYPE_CHECKING:
    from rich.text import Text

    from loramem import Explanation

COLOURS: dict[Certainty, str] = {"certain": "green", "near": "yellow", "below": "red"}
BAR = 20
"""Characters of p = 1."""


@click.command("explain")
@click.argument("key")
@options.store_options
@options.namespace_option
def command(key: str, store: options.StoreOptions, as_json: bool, namespace: str) -> None:
    """Show why KEY is recalled: p of every answer token and the end token, with and without the adapter.

    Certain is p ≥ 0.9; near is p > 0.5, where greedy decoding still cannot choose another token; the rest is below. The
    store is ./memory unless named.
    """
    with store.open() as opened:
        explanation = opened.explain(key, namespace)
    if as_json:
        print_json({**asdict(explanation), "min_prob": explanation.min_prob})
        return
    if terminal.is_read(sys.stdout):
        _draw(explanation)
    else:
        rows = [(repr(t.text), f"{t.prob:.4f}", f"{t.base_prob:.4f}", t.certainty) for t in explanation.tokens]
        print_table(("token", "p", "p of the base", "certainty"), rows)


def _draw(explanation: "Explanation") -> None:
    """The value twice, coloured by what each token's p is with and without the adapter; then a line per token."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, tokens = Console(highlight=False), explanation.tokens
    values = Table.grid(padding=(0, 2))
    for name, probs in (
        ("with the adapter", [token.prob for token in tokens]),
        ("without it", [token.base_prob for token in tokens]),
    ):
        texts = zip(tokens, probs, strict=True)
        values.add_row(name, Text.assemble(*(_coloured(visible(token.text), prob) for token, prob in texts)))
    table = Table("token", "p", "", "without", "", box=None, header_style="bold", pad_edge=False)
    for token in tokens:
        table.add_row(
            Text(visible(token.text)),
            *(part for prob in (token.prob, token.base_prob) for part in _bar(prob)),
        )
    legend = [(Text(level, style=COLOURS[level]), Text(f" {meaning}")) for level, meaning in MEANINGS.items()]
    console.print(Text(printable(explanation.key), style="bold"), values, "", table, "", sep="\n")
    console.print(Text("   ").join(Text.assemble(*parts) for parts in legend))
    print_text(f"lowest p {explanation.min_prob:.4f}, adapter {explanation.adapter}")
    if explanation.contexts:
        print_text(f"proved in {explanation.contexts} chats as well")
    if explanation.kept is not None:
        print_facts(kept_facts(explanation.kept))


def _bar(prob: float) -> "tuple[Text, Text]":
    return _coloured(f"{prob:.4f}", prob), _coloured("━" * round(BAR * prob), prob)


def _coloured(text: str, prob: float) -> "Text":
    from rich.text import Text

    return Text(text, style=COLOURS[certainty(prob)])
