"""What the lines of the phase suite say: the bins of p as a table, the other answers as sentences, and the plots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from loramem.suites.figures import Axis, HeatMap, Plot, Point, Series
from loramem.suites.runner import Result, Table
from loramem.suites.transition import (
    COUNTS,
    EDGES,
    POSITIONS,
    THRESHOLD,
    Correlation,
    added,
    bin_of,
    calibration,
    share_interval,
    spearman,
)

PAPER = "the paper's: 0.908, n = 155"
SHOWN = 20  # counter-examples that are told in full; all are in the results

Lines = Sequence[Mapping[str, Any]]
Pair = tuple[int, int]


def table(lines: Lines) -> Table:
    """A row per bin of p; below it the counter-examples, the correlations and what sampling gave."""
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
        *_sampled(lines),
        *_nucleus(lines),
        *_refused(lines),
    )
    return Table(columns, tuple(rows), notes)


def _counted(right: int, tokens: int) -> tuple[str, str, str]:
    return f"{tokens:,}", f"{right:,}", f"{right / tokens:.2%}" if tokens else "-"


def _counter_examples(lines: Lines, tallies: Mapping[str, Any]) -> Iterable[str]:
    found = [(line["cell"], one) for line in lines for one in line["result"]["counter_examples"]]
    above, whole = sum(tallies["prefix"][bin_of(THRESHOLD) + 1 :]), sum(one["whole_record"] for _, one in found)
    yield (
        f"Counter-examples to p > 0.5: {len(found)} of {above:,} such tokens decoded after the true prefix, {whole} of "
        "them in records whose every token has p > 0.5. Examined, end tokens not counted: "
        f"{tallies['answer_tokens']:,} answer tokens of {tallies['records']:,} decoded records, "
        f"{tallies['answer_tokens_prefix']:,} of them after the true prefix."
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
        pairs, failing = _pairs(runs), sum(run["failure"] is not None for run in runs)
        later = [pair for pair in pairs if pair[0] > 0]
        yield (
            f"Long records, each with an adapter taken at a random step: {len(runs)} runs, {failing} with a "
            f"failure. Earliest token with p ≤ 0.5 against first failure: {_told(spearman(pairs))} ({PAPER}). In "
            f"{sum(s == f for s, f in pairs)} runs they are the same token. Without the {len(pairs) - len(later)} runs "
            f"whose very first token is stubborn: {_told(spearman(later))}."
        )
        ends = [(run["end_stubborn"], run["end_failure"]) for run in runs if run["end_failure"] is not None]
        yield (
            f"The same runs at the end of their training: {len(ends)} with a failure, "
            f"{_told(spearman([pair for pair in ends if pair[0] is not None]))}."
        )
    if stages := _of(lines, "book", "stages"):
        records = [(s, f) for stage in stages for s, f in stage["pairs"] if s is not None]
        yield (
            f"Books, every failing record of every stage (not independent of each other): {_told(spearman(records))}; "
            f"{sum(stage['exact'] for stage in stages):,} other records were exact."
        )


def _sampled(lines: Lines) -> Iterable[str]:
    for (end, top_p), cells in sorted(_ways(lines).items(), key=lambda way: (way[0][0], -way[0][1])):
        records = [(tuple(row), samples) for samples, rows in cells for row in rows]
        recalls = sum(samples for _, samples in records)
        exact = sum(int(row[3]) for row, _ in records)
        low, high = share_interval(exact, recalls)
        when = "at the end of training" if end else "before the end of training"
        measured = f"{exact / recalls:.1%} of {recalls:,} recalls verbatim (95 % interval {low:.1%} to {high:.1%})"
        lowest = min(row[2] for row, _ in records)
        if top_p == 1:
            predicted = sum(row[0] * samples for row, samples in records) / recalls
            yield (
                f"Sampling at temperature 1 {when} (lowest p {lowest:.2f}): {measured}; the product of p says "
                f"{predicted:.1%}. {_calibrated(cells)}"
            )
            continue
        lower, upper = (sum(row[place] * samples for row, samples in records) / recalls for place in (0, 1))
        certain = [(row[3], samples) for row, samples in records if row[2] > top_p]
        yield (
            f"Top-p = {top_p:g} {when} (lowest p {lowest:.2f}): {measured}; must lie between {lower:.1%} and "
            f"{upper:.1%}, whose exact place p alone does not tell. Of the {len(certain)} records whose every p is "
            f"above {top_p:g}, {sum(int(count) for count, _ in certain):,} of "
            f"{sum(samples for _, samples in certain):,} recalls are."
        )


def _calibrated(cells: Sequence[tuple[int, Sequence[Sequence[float]]]]) -> str:
    told = []
    for samples, rows in cells:
        if found := calibration([(row[0], int(row[3])) for row in rows], samples):
            spread = "" if found.dispersion is None else f", dispersion {found.dispersion:.2f}"
            told.append(f"z = {found.z:+.2f}{spread}")
    return f"By book: {'; '.join(told)} (right probabilities give |z| < 2 in 95 of 100, and a dispersion near 1)."


def _nucleus(lines: Lines) -> Iterable[str]:
    found = [line["result"]["nucleus"] for line in lines if line["cell"]["part"] == "sampling"]
    if not found:
        return
    deviations = [one for nucleus in found for one in nucleus["deviations"]]
    yield (
        f"Nucleus just below each record's lowest p: {sum(nucleus['recalls'] for nucleus in found):,} sampled recalls, "
        f"{sum(one['wrong'] for one in deviations)} not verbatim; {sum(nucleus['left_out'] for nucleus in found)} "
        "records left out because their lowest p is not above 0.5."
    )
    for one in deviations[:SHOWN]:
        yield f"Not deterministic: {one['key']!r} with lowest p {one['lowest_p']:.4f}, {one['wrong']} recalls differ."


def _refused(lines: Lines) -> Iterable[str]:
    if refused := _of(lines, "long", "refused"):
        yield f"{len(refused)} long records could not be expressed by this tokenizer and were left out."


def plots(lines: Lines) -> tuple[Plot | HeatMap, ...]:
    """The transition, first failures, p by position, and sampling against the product of p; what was measured of it."""
    return (
        _transition(lines),
        *_failures(lines),
        *_grids(lines),
        *_verbatim(lines),
    )


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


def _grids(lines: Lines) -> Iterable[HeatMap]:
    ends = [line for line in lines if line["cell"]["part"] == "long" and line["result"]["grid"]["tokens"]]
    if not ends:
        return
    longest = max(line["cell"]["size"] for line in ends)
    steps = max(run["steps"] for run in _of(lines, "long", "runs"))
    ways: tuple[tuple[str, str, Lines, Callable[[Mapping[str, Any]], int]], ...] = (
        ("rank", "rank", [line for line in ends if line["cell"]["size"] == longest], lambda cell: cell["rank"]),
        ("length", "answer tokens", ends, lambda cell: cell["size"]),
    )
    for value, name, total in (("mean p", "mean", "sum_p"), ("share of tokens with p > 0.5", "share", "above")):
        for way, label, shown, of in ways:
            rows = sorted({of(line["cell"]) for line in shown})
            sums = [[line["result"]["grid"] for line in shown if of(line["cell"]) == row] for row in rows]
            width = max(len(one["tokens"]) for grids in sums for one in grids)
            yield HeatMap(
                name=f"{name}-by-{way}",
                title=f"{value[0].upper()}{value[1:]} at the end of training, by position and {way}",
                x=Axis(f"position in the answer, {POSITIONS} tokens up to"),
                y=Axis(label),
                value=value,
                columns=tuple(str(POSITIONS * (field + 1)) for field in range(width)),
                rows=tuple(map(str, rows)),
                values=tuple(tuple(_ratio(grids, total, field) for field in range(width)) for grids in sums),
                note=f"Long records of {f'{longest} tokens' if way == 'rank' else 'all ranks'}, each with an adapter; "
                f"training ended when every token was certified, when nothing improved, or after {steps} steps.",
            )


def _ratio(grids: Sequence[Mapping[str, Any]], name: str, field: int) -> float | None:
    """Of the grids that reach this field, the sum of ``name`` over the tokens."""
    reaching = [one for one in grids if field < len(one["tokens"])]
    tokens = sum(one["tokens"][field] for one in reaching)
    return round(sum(one[name][field] for one in reaching) / tokens, 2) if tokens else None


def _verbatim(lines: Lines) -> Iterable[Plot]:
    shown = []
    for (end, top_p), cells in sorted(_ways(lines).items()):
        if top_p != 1:
            continue
        bins: dict[int, list[tuple[float, float, int]]] = {}
        for samples, rows in cells:
            for row in rows:
                bins.setdefault(bin_of(row[0]), []).append((row[0], row[3], samples))
        points = [
            _share(100 * mean(p for p, *_ in rows), int(sum(k for _, k, _ in rows)), sum(n for *_, n in rows))
            for _, rows in sorted(bins.items())
        ]
        shown.append(Series("end of training" if end else "before the end", tuple(points)))
    if shown:
        yield Plot(
            name="sampling",
            title="Sampled recalls at temperature 1",
            kind="scatter",
            x=Axis("product of p over the record, %, mean of bins of 10"),
            y=Axis("recalled verbatim, %"),
            series=tuple(shown),
            diagonal="measured = product of p",
            note="Bars are 95 % intervals.",
        )


def _share(x: float, right: int, tokens: int) -> Point:
    low, high = share_interval(right, tokens)
    return Point(x, 100 * right / tokens, 100 * low, 100 * high)


def _of(lines: Lines, part: str, name: str) -> list[Result]:
    return [one for line in lines if line["cell"]["part"] == part for one in line["result"][name]]


def _pairs(runs: Iterable[Mapping[str, Any]]) -> list[Pair]:
    """Earliest stubborn and first failing position of the runs that fail where they have a stubborn token."""
    return [
        (run["stubborn"], run["failure"]) for run in runs if run["failure"] is not None and run["stubborn"] is not None
    ]


def _ways(lines: Lines) -> dict[tuple[bool, float], list[tuple[int, Sequence[Sequence[float]]]]]:
    """By end of training and top-p: of each book, recalls per record, and its records as the suite keeps them."""
    found: dict[tuple[bool, float], list[tuple[int, Sequence[Sequence[float]]]]] = {}
    for line in lines:
        if line["cell"]["part"] == "sampling":
            for way in line["result"]["ways"]:
                found.setdefault((way["end"], way["top_p"]), []).append((line["cell"]["repeats"], way["records"]))
    return found


def _told(found: Correlation | None) -> str:
    if found is None:
        return "too few runs for a correlation"
    return f"Spearman ρ = {found.rho:.3f} (95 % interval {found.low:.3f} to {found.high:.3f}, n = {found.n})"
