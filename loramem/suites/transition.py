"""What was decoded, set against teacher-forced probabilities: where p > 0.5 holds, and what sampling must give.

Pure functions of probabilities, token ids and counts. Positions are counted from 0, and the end token is one.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

THRESHOLD = 0.5
EDGES = tuple(tenth / 10 for tenth in range(11))
"""Of the bins of p: above the lower edge, up to and including the upper one, so that one of them begins at 0.5."""
COUNTS = ("prefix", "prefix_right", "all", "all_right")
"""Per bin: tokens that were decoded after their true prefix, how many are right, and the same of all tokens."""
POSITIONS = 25  # answer tokens per field of a grid
TIE = 1e-6  # float32 gives other batch shapes other last digits


@dataclass(frozen=True)
class Reading:
    """A record under teacher forcing, and as it was decoded greedily and free-running."""

    key: str
    answer_ids: tuple[int, ...]
    """ℓ answer tokens and the end token."""
    probs: tuple[float, ...]
    """Teacher-forced, of each of them."""
    decoded_ids: tuple[int, ...]
    """As many, or fewer where the end token, which is then the last, came sooner."""

    @cached_property
    def right(self) -> tuple[bool, ...]:
        """Of each token, whether the same one was decoded at its position."""
        missing = len(self.answer_ids) - len(self.decoded_ids)
        decoded: tuple[int | None, ...] = (*self.decoded_ids, *[None] * missing)
        return tuple(expected == got for expected, got in zip(self.answer_ids, decoded, strict=False))

    @property
    def failure(self) -> int | None:
        """Position of the first token that was decoded wrongly. All before it had the true prefix, and so had it."""
        return next((position for position, right in enumerate(self.right) if not right), None)

    @property
    def stubborn(self) -> int | None:
        """Position of the first token at or below the threshold."""
        return next((position for position, p in enumerate(self.probs) if p <= THRESHOLD), None)


def bin_of(p: float) -> int:
    """Which of the bins between `EDGES` a probability is in."""
    return bisect_left(EDGES[1:-1], p)


def tally(readings: Iterable[Reading]) -> dict[str, Any]:
    """Tokens by their p and what became of them, JSON-able; see `COUNTS`."""
    found: dict[str, Any] = {name: [0] * (len(EDGES) - 1) for name in COUNTS}
    found |= {"records": 0, "answer_tokens": 0, "answer_tokens_prefix": 0}
    for reading in readings:
        length, failure = len(reading.answer_ids) - 1, reading.failure
        first = length if failure is None else failure
        found["records"] += 1
        found["answer_tokens"] += length
        found["answer_tokens_prefix"] += min(first + 1, length)
        for position, (p, right) in enumerate(zip(reading.probs, reading.right, strict=True)):
            bin_ = bin_of(p)
            found["all"][bin_] += 1
            found["all_right"][bin_] += right
            if position <= first:
                found["prefix"][bin_] += 1
                found["prefix_right"][bin_] += right
    return found


def added(tallies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several tallies as one."""
    return {
        name: [sum(column) for column in zip(*(one[name] for one in tallies), strict=True)]
        if name in COUNTS
        else sum(one[name] for one in tallies)
        for name in tallies[0]
    }


def grid(readings: Sequence[Reading]) -> dict[str, Any]:
    """Sum of p, tokens above the threshold, and tokens, by position in steps of `POSITIONS` answer tokens."""
    fields = -(-max(len(reading.answer_ids) - 1 for reading in readings) // POSITIONS) if readings else 0
    sums, above, tokens = [0.0] * fields, [0] * fields, [0] * fields
    for reading in readings:
        for position, p in enumerate(reading.probs[:-1]):
            sums[position // POSITIONS] += p
            above[position // POSITIONS] += p > THRESHOLD
            tokens[position // POSITIONS] += 1
    return {"sum_p": [round(value, 4) for value in sums], "above": above, "tokens": tokens}


def counter_examples(readings: Iterable[Reading]) -> Iterator[dict[str, Any]]:
    """Tokens with p > 0.5 that were decoded wrongly after their true prefix, JSON-able.

    That is the first failure of a record or none. A record whose every p is above 0.5 and whose decode is not exact
    has such a token (``whole_record``).
    """
    for reading in readings:
        position = reading.failure
        if position is None or reading.probs[position] <= THRESHOLD:
            continue
        yield {
            "key": reading.key,
            "position": position,
            "p": reading.probs[position],
            "expected_id": reading.answer_ids[position],
            "decoded_id": reading.decoded_ids[position],
            "whole_record": reading.stubborn is None,
            "tie": reading.probs[position] - THRESHOLD <= TIE,
        }


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95 % interval."""

    rho: float
    low: float
    high: float
    n: int


def spearman(pairs: Sequence[tuple[float, float]]) -> Correlation | None:
    """Spearman's ρ; its interval by Fisher's z with the standard error √((1 + ρ²/2) / (n - 3)) (Bonett, Wright 2000).

    Returns:
        None for fewer than four pairs, or where one of the two does not vary.
    """
    from scipy.stats import spearmanr

    if len(pairs) < 4 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    if abs(rho) > 1 - 1e-12:
        return Correlation(rho, rho, rho, len(pairs))
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (len(pairs) - 3))
    return Correlation(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), len(pairs))


def spearman_of_all(pairs: Sequence[tuple[float, float]]) -> Correlation | None:
    """Spearman's ρ of pairs with many ties, which Fisher's z does not allow for.

    Its interval lies between the percentiles of 9,999 bootstrap samples of the pairs, seeded; a sample in which one of
    the two does not vary counts as ρ = 0.

    Returns:
        As `spearman`.
    """
    import numpy
    from scipy.stats import bootstrap, rankdata

    def rho(x: Any, y: Any, axis: int = -1) -> Any:
        first, second = (rankdata(values, axis=axis) - (values.shape[axis] + 1) / 2 for values in (x, y))
        scale = numpy.sqrt((first**2).sum(axis) * (second**2).sum(axis))
        return (first * second).sum(axis) / numpy.where(scale > 0, scale, numpy.inf)

    if len(pairs) < 4 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    x, y = (numpy.array(values, dtype=float) for values in zip(*pairs, strict=True))
    found = bootstrap((x, y), rho, paired=True, vectorized=True, method="percentile", batch=999, rng=0)
    low, high = found.confidence_interval
    return Correlation(float(rho(x, y)), float(low), float(high), len(pairs))


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def sampled_bounds(probs: Sequence[float], top_p: float) -> tuple[float, float]:
    """Between which chances a record is sampled verbatim at temperature 1 with this top-p.

    A token above top-p is its whole nucleus and is drawn for certain. Any other one has p over the mass of its nucleus
    if it is in it, and this mass lies between top-p and 1. It may be outside where others have top-p together
    (`may_be_outside`): then it may never be drawn. With top-p = 1 both bounds are the product of p.
    """
    drawn = [p for p in probs if p <= top_p]
    lower = 0.0 if drawn and may_be_outside(min(drawn), top_p) else math.prod(drawn)
    return lower, math.prod(min(1.0, p / top_p) for p in drawn)


def may_be_outside(p: float, top_p: float) -> bool:
    """Whether a token can lie outside its nucleus: only if the others, with 1 - p, can reach top-p without it."""
    return top_p < 1 and p + top_p <= 1


@dataclass(frozen=True)
class Calibration:
    """How often things happened that were given probabilities."""

    expected: float
    observed: int
    trials: int
    z: float
    """(observed - expected) in standard deviations of the sum."""
    dispersion: float | None
    """Mean squared deviation of the records, each over its own variance, where that is at least 1; 1 if every
    probability is right."""


def calibration(records: Sequence[tuple[float, int]], trials: int) -> Calibration | None:
    """Predicted chances and counts of successes in ``trials`` each; None where nothing is uncertain."""
    uncertain = [(chance, count) for chance, count in records if 0 < chance < 1]
    if not uncertain:
        return None
    expected, observed = trials * sum(chance for chance, _ in uncertain), sum(count for _, count in uncertain)
    variances = [trials * chance * (1 - chance) for chance, _ in uncertain]
    squares = [
        (count - trials * chance) ** 2 / variance
        for (chance, count), variance in zip(uncertain, variances, strict=True)
        if variance >= 1
    ]
    return Calibration(
        expected,
        observed,
        trials * len(uncertain),
        (observed - expected) / math.sqrt(sum(variances)),
        sum(squares) / len(squares) if squares else None,
    )
