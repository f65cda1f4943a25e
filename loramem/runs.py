"""Ranges of equal neighbours."""

from collections.abc import Iterator, Sequence


def runs(labels: Sequence[str], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Half-open ranges of equal neighbouring labels, none longer than ``most``."""
    start = 0
    for index in range(1, len(labels) + 1):
        if index == len(labels) or labels[index] != labels[start] or index - start == most:
            yield start, index
            start = index
