"""How often a write visits its records, by how much it asks of every parameter. No torch.

    visits per record = v · (bits per parameter)^e

Visits do not depend on the machine; what one costs does, and is measured (`loramem.planning.timings`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loramem.records.outcome import Outcome

MIN_COST_BITS = 1.0
"""A base model that knows the values already makes them cost nothing; a bit is the least that is counted."""

# e = 0.5 ± 0.5 against a scatter of ± 0.3 in ln visits: writes of nearly one density say nothing about e, and a slope
# through two of them can be anything. (0.3 / 0.5)² is the spread in ln density at which data and prior count alike.
PRIOR_EXPONENT, PRIOR_WEIGHT = 0.5, 0.36


@dataclass(frozen=True)
class Pace:
    """A fitted pace.

    >>> sizes = (500, 4000)
    >>> outcomes = [Outcome("hex", 1, 100, n, 1000.0, True, visits=20 * (1000 / n) ** 0.5) for n in sizes]
    >>> round(fit(outcomes).visits(2000, 1000.0), 2)
    14.14
    """

    at_one_bit: float
    """v: visits per record at one bit of cost per parameter."""
    exponent: float
    """e, at least 0."""
    outcomes: int

    def visits(self, parameters: float, cost_bits: float) -> float:
        """Per record, at least one."""
        density = max(cost_bits, MIN_COST_BITS) / parameters
        return max(1.0, self.at_one_bit * math.pow(density, self.exponent))


def fit(outcomes: Sequence[Outcome]) -> Pace | None:
    """Least squares in logarithms over the certified outcomes whose visits are known; None without any.

    A weak prior on e decides where their densities are too alike to tell.
    """
    known = [
        (math.log(max(outcome.cost_bits, MIN_COST_BITS) / outcome.parameters), math.log(outcome.visits))
        for outcome in outcomes
        if outcome.certified and outcome.visits
    ]
    if not known:
        return None
    x, y = (sum(column) / len(known) for column in zip(*known, strict=True))
    spread = sum((one - x) ** 2 for one, _ in known)
    together = sum((one - x) * (other - y) for one, other in known)
    exponent = max(0.0, (together + PRIOR_WEIGHT * PRIOR_EXPONENT) / (spread + PRIOR_WEIGHT))
    return Pace(math.exp(y - exponent * x), exponent, len(known))
