"""Results on stdout; everything else on stderr.

What must be exact, JSON and recalled values, is exact or refused; tables and notes show escapes for characters that the
stream's encoding lacks.
"""

import codecs
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import click

from loramem._util.printable import printable

from . import terminal

if TYPE_CHECKING:
    from loramem.results import Divergence, Kept


def prepare_streams() -> None:
    """Make the standard streams ones that can be written to: none closed, none that raises at a character.

    A closed one also leaves its number to the next file that is opened, such as one of the store: what a library in C
    prints would go there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(result: Any) -> None:
    """One JSON document on stdout: UTF-8, or in ASCII with escapes, which says the same."""
    content = asdict(result) if is_dataclass(result) else result  # type: ignore[arg-type]
    text = json.dumps(content, ensure_ascii=False)
    if not _is_utf_8() or _missing(text) is not None:  # a lone surrogate, which older stores have in metadata
        text = json.dumps(content)
    click.echo(text)


def print_exact(text: str, of: str) -> None:
    """A line on stdout, to the character.

    Args:
        of: The key that it is about.

    Raises:
        ClickException: The encoding of stdout lacks one; nothing of the line was printed.
    """
    if (missing := _missing(text)) is not None:
        raise click.ClickException(
            f"Key {of!r} or its value holds {missing}, which the encoding of stdout ({sys.stdout.encoding}) lacks. Set "
            "PYTHONIOENCODING=utf-8, or give --json."
        )
    click.echo(text, color=True)  # as it is: click would leave out what looks like a colour of a terminal


def _is_utf_8() -> bool:
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf-8")


def _missing(text: str) -> str | None:
    """The first character that stdout's encoding lacks, as U+…; None if it has all."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout: fitted to a terminal, otherwise a line per row, as it comes, with tabs between its cells."""
    texts = ([str(cell) for cell in row] for row in rows)
    if terminal.is_read(sys.stdout):
        _print_fitted(columns, list(texts))
        return
    for row in chain([columns], texts):
        click.echo("\t".join(map(printable, row)))


def print_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table that ends in a document on stdout: fitted to a terminal, otherwise Markdown."""
    if terminal.is_read(sys.stdout):
        _print_fitted(columns, list(rows))
        return
    for cells in (columns, ["---"] * len(columns), *rows):
        click.echo(f"| {' | '.join(cells)} |")


def _print_fitted(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(terminal.table(columns, rows, console.width), soft_wrap=False)


def moment(written_at: str) -> str:
    """A time of the index (UTC, ISO 8601) as short as ISO allows."""
    return written_at.replace("+00:00", "Z")


def note_needs_ids(count: int) -> None:
    """Say that so many new keys cannot be asked by chat, if there are any."""
    if count:
        note(
            f"{count} of the new keys need ids where a server is asked: the chat template does not give them as they "
            "were trained (loramem ls says which)."
        )


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Name and value on stdout, one pair a line; fitted to a terminal."""
    pairs = [(name, str(value)) for name, value in facts]
    if terminal.is_read(sys.stdout):
        click.echo(terminal.facts(pairs, terminal.columns(sys.stdout)))
        return
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {value}")


def print_text(text: str) -> None:
    """A sentence on stdout, wrapped where a terminal shows it."""
    click.echo(_wrapped(text, sys.stdout))


def kept_facts(kept: "Kept") -> list[tuple[str, str]]:
    """What an adapter leaves of its base, for `print_facts`."""

    def line(name: str, found: "Divergence", of: str) -> tuple[str, str]:
        return name, f"{found.changed:.1%} of {found.positions:,} {of} changed, KL {found.kl:.3f} nats"

    counted = [
        ("refused", kept.refused, "unknown keys"),
        ("in other words", kept.other_words, "values given"),
        ("in other chats", kept.other_contexts, "values given"),
    ]
    return [
        line("text", kept.text, "likeliest tokens"),
        line("the base's answers", kept.answers, "likeliest tokens"),
        line("questions", kept.questions, "first tokens"),
        line("unknown keys", kept.unknown_keys, "first tokens"),
        ("same answers", f"{kept.same_answers:.0%} of {kept.questions.positions} questions"),
        *((name, f"{count[0]} of {count[1]} {of}") for name, count, of in counted if count is not None),
    ]


def written_facts(records: int, questions: int) -> str:
    """What was written, in words."""
    return f"{records} records and {questions} questions" if questions else f"{records} records"


def note(message: str) -> None:
    """A remark on stderr, on one line; wrapped where a terminal shows it, with what follows set in."""
    click.echo(_wrapped(message, sys.stderr, indent=2), err=True)


class Notes(logging.Handler):
    """Log records as remarks, which a bar that is being drawn makes room for."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


def _wrapped(text: str, stream: IO[str], indent: int = 0) -> str:
    if not terminal.is_read(stream):
        return text
    width = terminal.columns(stream)
    return "\n".join(terminal.wrap(line, width, indent) for line in text.split("\n"))
