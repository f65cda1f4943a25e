"""What came of a write at its first try: what the success boundary learns from. No torch."""

import math
from dataclasses import dataclass

from loramem.errors import BoundaryError


@dataclass(frozen=True)
class Outcome:
    """What came of one write at its first try.

    Raises:
        BoundaryError: A number is not finite, or rank, length or parameters are not positive, or the cost is negative.
    """

    kind: str
    """Kind of data, such as "phonebook"; of a store's own writes the calibrated one that costs most nearly as much."""
    rank: int
    length: int
    """Answer tokens, of all records together."""
    parameters: float
    """Adapter parameters."""
    cost_bits: float
    """Cost of the values, see `loramem.planning.cost`."""
    certified: bool
    """Whether every token was."""
    visits: float | None = None
    """Times a record was trained on, on average."""
    vocabulary: float | None = None
    """Effective, of answer and end tokens (`loramem.planning.variety`); None where it was not noted."""

    def __post_init__(self) -> None:
        check_numbers(rank=self.rank, length=self.length, parameters=self.parameters)
        check_numbers(least=0.0, cost_bits=self.cost_bits)
        if self.vocabulary is not None:
            check_numbers(vocabulary=self.vocabulary)


def check_numbers(*, least: float | None = None, **numbers: float) -> None:
    """Every number is finite and positive, or, given ``least``, not below it."""
    for name, number in numbers.items():
        if not math.isfinite(number) or (number <= 0 if least is None else number < least):
            wanted = "positive" if least is None else f"at least {least:g}"
            raise BoundaryError(f"The {name.replace('_', ' ')} must be {wanted}, not {number}.")
