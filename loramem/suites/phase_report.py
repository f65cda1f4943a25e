"""What the lines of the phase suite say: the bins of p as a table, the other answers as sentences, and the plots."""

import shlex
from collections import Counter
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
    may_be_outside,
    share_interval,
    spearman,
    spearman_of_all,
)

PAPER = "the paper's is 0.908, n = 155"
SHOWN = 20  # counter-examples that are told in full; all are in the results

Lines = Sequence[Mapping[str, Any]]
Pair = tuple[int, int]


def table(lines: Lines) -> Table:
    """A row per bin of p; below it the counter-examples, the correlations and what sampling gave."""
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
        *_sampled(lines),
        *_nucleus(lines),
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
    """The correlation over all runs, and that of those which fail, with how many runs it leaves out and why."""
    every = [(_place(run, f"{when}stubborn"), _place(run, f"{when}failure")) for run in runs]
    kinds = Counter((run[f"{when}stubborn"] is not None, run[f"{when}failure"] is not None) for run in runs)
    return (
        f"over all runs {_told(spearman_of_all(every))}, where no such token and no failure stand one behind the end "
        "token, and the interval is by bootstrap over runs because of the ties. Of the failing runs with a stubborn "
        f"token alone {_told(spearman(_pairs(runs, when)))}, by Fisher's z; that leaves out {kinds[True, False]} runs "
        f"with a stubborn token that are exact, {kinds[False, False]} without either, and {kinds[False, True]} that "
        "fail without one."
    )


def _place(run: Mapping[str, Any], name: str) -> int:
    """A position of a run; behind all of its tokens, the end token too, where there is none."""
    position: int | None = run[name]
    return run["tokens"] + 1 if position is None else position


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
        # Lines of before a token could lie outside its nucleus have a lower bound above 0 there.
        lowers = [0.0 if may_be_outside(row[2], top_p) else row[0] for row, _ in records]
        lower = sum(low * samples for low, (_, samples) in zip(lowers, records, strict=True)) / recalls
        upper = sum(row[1] * samples for row, samples in records) / recalls
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
        errors = Counter(one["error"] for one in refused)
        told = ", ".join(f"{error} {count}" for error, count in sorted(errors.items()))
        yield f"{len(refused)} long records could not be expressed by this tokenizer and were left out ({told})."


def plots(lines: Lines) -> tuple[Plot | HeatMap, ...]:
    """The transition, first failures, p by position, and sampling against the product of p; what was measured of it."""
    lines = counted(lines)
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


def _pairs(runs: Iterable[Mapping[str, Any]], when: str = "") -> list[Pair]:
    """Earliest stubborn and first failing position of the runs that fail and have a stubborn token.

    Args:
        when: "" at the random step, "end_" at the end of training.
    """
    found = ((run[f"{when}stubborn"], run[f"{when}failure"]) for run in runs)
    return [(stubborn, failure) for stubborn, failure in found if stubborn is not None and failure is not None]


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
        return "no correlation (fewer than four runs, or nothing varies)"
    return f"Spearman ρ = {found.rho:.3f} (95 % interval {found.low:.3f} to {found.high:.3f}, n = {found.n})"
