"""How text and tables are laid out for somebody who reads them in a terminal: to its width, broken between words alone.

What goes into a pipe or a file is laid out for no width (`loramem_cli.output`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from loramem._util.printable import printable

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

GAP = 2
"""Blanks between two columns of a table."""
LARGEST_SHARE = 0.4
"""Of the width: what a column may claim for its longest word. A longer one (an address, a path) is folded."""
NUMBER = re.compile(r"-|[^a-z]*\d[^a-z]*", re.IGNORECASE)
"""Cells that stand at the right of their column and are not broken, such as 1,234 or 8.3 (7.5–9)."""


def is_read(stream: IO[str]) -> bool:
    """Whether a stream is a terminal."""
    return stream.isatty()


def columns(stream: IO[str]) -> int:
    """How many columns the terminal has; COLUMNS says otherwise, and 80 where nobody knows."""
    from rich.console import Console

    return Console(file=stream).width


def wrap(text: str, width: int, indent: int = 0) -> str:
    """Lines of at most so many columns; a word that is longer stays whole, so that it can be copied.

    Args:
        indent: Blanks before all lines but the first.
    """
    from rich.cells import cell_len

    first, *rest = text.split(" ")
    lines = [first]
    for word in rest:
        left = width - cell_len(lines[-1]) - 1
        if lines[-1].strip() and left < cell_len(word) <= width - indent:
            lines.append(" " * indent + word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> "Table | str":
    """A table of at most so many columns, wrapped between words.

    Columns in which nothing stands are left out. Where even the longest words do not fit side by side, every row is a
    block of lines instead, a head and a cell on each.
    """
    from rich.table import Table
    from rich.text import Text

    used = [place for place in range(len(heads)) if not rows or any(row[place] for row in rows)]
    heads = [heads[place] for place in used]
    cells = [[printable(row[place]) for place in used] for row in rows]
    columns = [_Column.of(head, [row[place] for row in cells], width) for place, head in enumerate(heads)]
    free = width - GAP * (len(heads) - 1)
    if sum(column.least for column in columns) > free:
        return "\n\n".join(facts(list(zip(heads, row, strict=True)), width) for row in cells)
    laid_out = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for head, column, size in zip(heads, columns, _shrunk(columns, free), strict=True):
        justify: JustifyMethod = "right" if column.numbers else "left"
        laid_out.add_column(wrap(head, size), width=size, no_wrap=column.numbers, justify=justify, overflow="fold")
    for row in cells:
        laid_out.add_row(*map(Text, row))
    return laid_out


def facts(pairs: Sequence[tuple[str, str]], width: int) -> str:
    """Name and value, one pair a line; what does not fit goes on under the value."""
    from rich.cells import cell_len, set_cell_size

    names = max(cell_len(name) for name, _ in pairs)
    return "\n".join(wrap(f"{set_cell_size(name, names)}  {value}", width, names + 2) for name, value in pairs)


@dataclass(frozen=True)
class _Column:
    """What the cells of a column take."""

    numbers: bool
    most: int
    cells: int
    """What they take without the head."""
    least: int

    @classmethod
    def of(cls, head: str, cells: Sequence[str], width: int) -> "_Column":
        from rich.cells import cell_len

        numbers = bool(cells) and all(map(NUMBER.fullmatch, cells))
        parts = [*head.split(" "), *(cells if numbers else (word for cell in cells for word in cell.split(" ")))]
        widest, least = max(map(cell_len, cells), default=0), max(map(cell_len, parts))
        return cls(numbers, max(cell_len(head), widest), widest, min(least, int(LARGEST_SHARE * width)))


def _shrunk(columns: Sequence[_Column], width: int) -> list[int]:
    """Widths of columns that fit.

    What is too much goes off columns whose head is wider than their cells, then off the widest. Words stay whole.
    """
    sizes = [column.most for column in columns]

    def too_wide(place: int) -> tuple[bool, int]:
        return sizes[place] > columns[place].cells, sizes[place]

    while sum(sizes) > width:
        sizes[max((place for place, size in enumerate(sizes) if size > columns[place].least), key=too_wide)] -= 1
    return sizes
