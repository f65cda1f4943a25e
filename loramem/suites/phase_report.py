"""What was decoded, set against teacher-forced probabilities: where p > 0.5 holds, as a table, sentences and plots.

Positions are counted from 0, and the end token is one.
"""

import math
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from loramem.suites.figures import Axis, Plot, Point, Series
from loramem.suites.runner import Result, Table

THRESHOLD = 0.5
EDGES = tuple(tenth / 10 for tenth in range(11))
"""Of the bins of p: above the lower edge, up to and including the upper one, so that one of them begins at 0.5."""
COUNTS = ("prefix", "prefix_right", "all", "all_right")
"""Per bin: tokens that were decoded after their true prefix, how many are right, and the same of all tokens."""
TIE = 1e-6  # float32 gives other batch shapes other last digits
PAPER = "the paper's is 0.908, n = 155"
SHOWN = 20  # counter-examples that are told in full; all are in the results

Lines = Sequence[Mapping[str, Any]]
Pair = tuple[int, int]


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


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def table(lines: Lines) -> Table:
    """A row per bin of p; below it the counter-examples and the correlations."""
    told, lines = len(lines), counted(lines)
    tallies = added([line["result"]["tally"] for line in lines])
    rows = []
    for bin_, (low, high) in enumerate(pairwise(EDGES)):
        prefix, prefix_right, every, right = (tallies[name][bin_] for name in COUNTS)
        rows.append(
            (f"{low:g}–{high:g}", *_counted(prefix_right, prefix), *_counted(right, every)),
        )
    columns = (
        *("p, teacher-forced", "tokens after the true prefix", "decoded right", "share right"),
        *("all tokens", "decoded right in place", "share right in place"),
    )
    notes = (
        "Bins exclude their lower edge and include the upper one. After the true prefix: up to and including the first "
        "token of a record that was decoded wrongly; beyond it the prefix is no longer the one that p was taken under.",
        *_counter_examples(lines, tallies),
        *_stubborn_and_failure(lines),
        *_refused(lines),
        *_left_out(told - len(lines)),
    )
    return Table(columns, tuple(rows), notes)


def counted(lines: Lines) -> Lines:
    """The lines that are put together: of quick runs only where there are no others, of each cell the last.

    Cells that differ in their device alone are the same draws, and count once.
    """
    quick = ["--quick" in shlex.split(line["command"]) for line in lines]
    whole = [line for line, is_quick in zip(lines, quick, strict=True) if not is_quick] or lines
    cells = {tuple((name, value) for name, value in line["cell"].items() if name != "device"): line for line in whole}
    return list(cells.values())


def _left_out(lines: int) -> Iterable[str]:
    if lines:
        yield f"{lines} lines are left out: of quick runs, or of cells that were measured on another device as well."


def _counted(right: int, tokens: int) -> tuple[str, str, str]:
    return f"{tokens:,}", f"{right:,}", f"{right / tokens:.2%}" if tokens else "-"


def _counter_examples(lines: Lines, tallies: Mapping[str, Any]) -> Iterable[str]:
    found = [(line["cell"], one) for line in lines for one in line["result"]["counter_examples"]]
    above, whole = sum(tallies["prefix"][bin_of(THRESHOLD) + 1 :]), sum(one["whole_record"] for _, one in found)
    after, every = sum(tallies["prefix"]), sum(tallies["all"])
    last = sum(run["step"] == run["steps"] for run in _of(lines, "long", "runs"))
    yield (
        f"{above:,} tokens with p > 0.5 were decoded after the true prefix, end tokens included. Counter-examples to "
        f"p > 0.5: {len(found)} of {above:,}, {whole} of them in records whose every token has p > 0.5. Of all "
        f"{every:,} tokens of {tallies['records']:,} decoded records, {after - above:,} more have p ≤ 0.5 after the "
        f"true prefix, of which nothing is claimed, and {every - after:,} stand beyond a record's first failure, where "
        "p was taken under another prefix than decoding had. Without end tokens: "
        f"{tallies['answer_tokens']:,} answer tokens, {tallies['answer_tokens_prefix']:,} after the true prefix."
        + (f" {last} long records were taken at the last step, and count there and as its end." if last else "")
    )
    for cell, one in found[:SHOWN]:
        yield (
            f"Counter-example ({cell['part']}, {cell['kind']}, rank {cell['rank']}, seed {cell['seed']}): "
            f"{one['key']!r} at position {one['position']}: p = {one['p']:.7f} for {one['expected']!r}, "
            f"decoded {one['decoded']!r}{' (within 1e-6 of 0.5)' if one['tie'] else ''}."
        )


def _stubborn_and_failure(lines: Lines) -> Iterable[str]:
    runs = _of(lines, "long", "runs")
    if runs:
        pairs = _pairs(runs)
        later = [pair for pair in pairs if pair[0] > 0]
        yield (
            "Long records, each with an adapter taken at a random step, earliest token with p ≤ 0.5 against first "
            f"failure: {_correlated(runs)} In {sum(s == f for s, f in pairs)} runs they are the same token. Without "
            f"the {len(pairs) - len(later)} runs whose very first token is stubborn: {_told(spearman(later))}; "
            f"{PAPER}."
        )
        yield f"The same runs at the end of their training: {_correlated(runs, 'end_')}"
    if stages := _of(lines, "book", "stages"):
        records = [(s, f) for stage in stages for s, f in stage["pairs"] if s is not None]
        yield (
            f"Books, every failing record of every stage (not independent of each other): {_told(spearman(records))}; "
            f"{sum(stage['exact'] for stage in stages):,} other records were exact."
        )


def _correlated(runs: Sequence[Mapping[str, Any]], when: str = "") -> str:
    """The correlation of the runs that fail and have a stubborn token, and how many it leaves out and why."""
    kinds = Counter((run[f"{when}stubborn"] is not None, run[f"{when}failure"] is not None) for run in runs)
    return (
        f"{_told(spearman(_pairs(runs, when)))}, of the failing runs with a stubborn token alone; that leaves out "
        f"{kinds[True, False]} runs with a stubborn token that are exact, {kinds[False, False]} without either, and "
        f"{kinds[False, True]} that fail without one."
    )


def _refused(lines: Lines) -> Iterable[str]:
    if refused := _of(lines, "long", "refused"):
        errors = Counter(one["error"] for one in refused)
        told = ", ".join(f"{error} {count}" for error, count in sorted(errors.items()))
        yield f"{len(refused)} long records could not be expressed by this tokenizer and were left out ({told})."


def plots(lines: Lines) -> tuple[Plot, ...]:
    """The transition, and first failures where there are any."""
    lines = counted(lines)
    return (_transition(lines), *_failures(lines))


def _transition(lines: Lines) -> Plot:
    tallies = added([line["result"]["tally"] for line in lines])

    def series(name: str, tokens: str, right: str) -> Series:
        points = [
            _share(100 * (low + high) / 2, tallies[right][bin_], tallies[tokens][bin_])
            for bin_, (low, high) in enumerate(pairwise(EDGES))
            if tallies[tokens][bin_]
        ]
        return Series(name, tuple(points))

    return Plot(
        name="transition",
        title="Tokens decoded right, by their probability",
        kind="line",
        x=Axis("teacher-forced p of the token, %, in bins of 10"),
        y=Axis("decoded right, free-running, %"),
        series=(
            series("after the true prefix", "prefix", "prefix_right"),
            series("all tokens", "all", "all_right"),
        ),
        note="Bars are 95 % intervals. The bins from 50 % on exclude 50 % itself.",
    )


def _failures(lines: Lines) -> Iterable[Plot]:
    kinds: dict[str, list[Pair]] = {}
    for line in lines:
        if line["cell"]["part"] == "long":
            kinds.setdefault(line["cell"]["kind"], []).extend(_pairs(line["result"]["runs"]))
    series = [
        Series(kind, tuple(Point(s + 1, f + 1, f + 1, f + 1) for s, f in pairs))
        for kind, pairs in kinds.items()
        if pairs
    ]
    if series:
        yield Plot(
            name="failures",
            title="First failure of long records",
            kind="scatter",
            x=Axis("earliest token with p ≤ 0.5 (the first is 1, log scale)", log=True),
            y=Axis("first token decoded wrongly (log scale)", log=True),
            series=tuple(series),
            diagonal="the same token",
            note="Records with an adapter each, at a random step of its training; equal ones cover each other. Below "
            "the line a token with p > 0.5 would have failed.",
        )


def _share(x: float, right: int, tokens: int) -> Point:
    low, high = share_interval(right, tokens)
    return Point(x, 100 * right / tokens, 100 * low, 100 * high)


def _of(lines: Lines, part: str, name: str) -> list[Result]:
    return [one for line in lines if line["cell"]["part"] == part for one in line["result"][name]]


def _pairs(runs: Iterable[Mapping[str, Any]], when: str = "") -> list[Pair]:
    """Earliest stubborn and first failing position of the runs that fail and have a stubborn token.

    Args:
        when: "" at the random step, "end_" at the end of training.
    """
    found = ((run[f"{when}stubborn"], run[f"{when}failure"]) for run in runs)
    return [(stubborn, failure) for stubborn, failure in found if stubborn is not None and failure is not None]


def _told(found: Correlation | None) -> str:
    if found is None:
        return "no correlation (fewer than four runs, or nothing varies)"
    return f"Spearman ρ = {found.rho:.3f} (95 % interval {found.low:.3f} to {found.high:.3f}, n = {found.n})"
