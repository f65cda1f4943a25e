"""Results on stdout; everything else on stderr."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import click


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(asdict(result) if is_dataclass(result) else result, ensure_ascii=False))  # type: ignore[arg-type]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout, as wide as the terminal allows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)


def print_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table on stdout, for tables wider than a terminal that end in a document."""
    for cells in (columns, ["---"] * len(columns), *rows):
        click.echo(f"| {' | '.join(cells)} |")


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Name and value, one pair a line."""
    pairs = [(name, str(value)) for name, value in facts]
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {value}")


def note(message: str) -> None:
    """A remark on stderr."""
    click.echo(message, err=True)
