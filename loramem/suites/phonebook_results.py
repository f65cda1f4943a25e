"""What the phone-book measurements say: a table beside the published one, remarks made from the numbers, plots."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from loramem.suites.figures import Axis, HeatMap, Plot, Point, Series
from loramem.suites.paper_schedule import Schedule
from loramem.suites.runner import METHODS, Result, Table

OURS, PUBLISHED = METHODS[-1], METHODS[:-1]
# arXiv 2605.30260: exact match in %, mean over 1,000 to 32,000 answer tokens, at these ranks.
PAPER_RANKS = (1, 2, 4, 8, 16, 32, 64)
PAPER = {
    "Qwen3-8B": {
        "sft": (2.32, 17.4, 37.5, 55.5, 84.8, 99.5, 100.0),
        "memft-ot": (5.78, 19.1, 36.2, 57.4, 86.1, 98.6, 100.0),
        "memft-sw": (8.45, 19.7, 37.8, 58.8, 86.5, 99.5, 100.0),
    },
    "Llama-3.1-8B": {
        "sft": (0.50, 3.85, 18.7, 28.0, 37.8, 47.0, 59.3),
        "memft-ot": (1.00, 11.2, 31.4, 53.9, 61.0, 73.9, 87.0),
        "memft-sw": (1.84, 15.0, 34.0, 45.7, 70.7, 96.1, 100.0),
    },
}
LOW, HIGH = 2.0, 98.0  # between them, in %, a comparison of methods says something
NOTHING = "-"


@dataclass(frozen=True)
class Group:
    """Measurements on the same records with the same unit, by length, rank and method; a result per seed."""

    setting: str
    results: Mapping[tuple[int, int], Mapping[str, Sequence[Result]]]

    @property
    def lengths(self) -> list[int]:
        return sorted({length for length, _ in self.results})

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for _, rank in self.results})

    @property
    def methods(self) -> list[str]:
        return [method for method in METHODS if any(method in cell for cell in self.results.values())]

    def exact(self, length: int, rank: int, method: str) -> list[float]:
        """Exact match in %, by seed; empty where nothing was measured."""
        return [exact_percent(result) for result in self.results.get((length, rank), {}).get(method, ())]

    def mean(self, length: int, rank: int, method: str) -> float | None:
        found = self.exact(length, rank, method)
        return mean(found) if found else None


def groups(lines: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Lines by what they were measured on, in the order in which that first came up.

    Of lines that differ in their device alone the last counts, so that no seed counts twice.
    """
    found: dict[str, dict[tuple[int, int], dict[str, dict[int, Result]]]] = {}
    for line in sorted(lines, key=lambda line: line["cell"]["seed"]):
        cell = line["cell"]
        by_size = found.setdefault(_setting(cell), {})
        by_method = by_size.setdefault((cell["length"], cell["rank"]), {})
        by_method.setdefault(cell["method"], {})[cell["seed"]] = line["result"]
    return [
        Group(
            setting,
            {
                size: {method: list(seeds.values()) for method, seeds in by_size[size].items()}
                for size in sorted(by_size)
            },
        )
        for setting, by_size in found.items()
    ]


def exact_percent(result: Result) -> float:
    return 100 * float(result["exact"]) / float(result["records"])


def _setting(cell: Mapping[str, Any]) -> str:
    layer = "" if cell["layer"] is None else f" of layer {cell['layer']}"
    data = "generated" if cell["data"] is None else f"file {cell['data']}"
    cut = "" if cell["cut"] == 1 else f", epochs / {cell['cut']}"
    dtype = "" if cell.get("dtype", "auto") == "auto" else f", {cell['dtype']}"
    return f"{cell['unit']}{layer}, {data}{cut}{dtype}"


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per length and rank; then the mean over lengths at each rank, and the published means."""
    found = groups(lines)
    methods = [method for method in METHODS if any(method in group.methods for group in found)]
    rows = [row for group in found for row in _rows(group, methods)]
    columns = (
        *("set-up", "length", "rank"),
        *(f"{method} exact %" for method in methods),
        *("unit: parameters", "ours: parameters", "ours: placement"),
        *(f"{method} s" for method in methods),
        *(f"{method} visits/record" for method in methods),
    )
    blank = (NOTHING,) * (len(columns) - 3 - len(methods))
    for model, means in PAPER.items():
        for place, rank in enumerate(PAPER_RANKS):
            shown = (f"{means[method][place]:g}" if method in means else NOTHING for method in methods)
            rows.append((f"published, {model}", "mean of 1,000 to 32,000", str(rank), *shown, *blank))
    notes = (
        "Exact: share of the records decoded exactly, greedily and free-running, the end token included; mean over "
        "seeds, and their range. Lowest probability, token accuracy, steps and curve of every cell are in its line.",
        "The published means are of other base models, of width 4,096 and over lengths of 1,000 to 32,000: what they "
        "say of a rank holds for no other base. Compare the order of the methods.",
        *(note for group in found for note in _notes(group, f"{group.setting}: " if len(found) > 1 else "")),
    )
    return Table(columns, tuple(rows), notes)


def _rows(group: Group, methods: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for (length, rank), cell in group.results.items():
        theirs = next((cell[method][0] for method in PUBLISHED if method in cell), None)
        ours = cell[OURS][0] if OURS in cell else None
        yield (
            *(group.setting, f"{length:,}", str(rank)),
            *(_spread(group.exact(length, rank, method)) for method in methods),
            NOTHING if theirs is None else f"{theirs['parameters']:,}",
            NOTHING if ours is None else f"{ours['parameters']:,}",
            NOTHING if ours is None else f"{ours['placement']}, rank {ours['rank']}",
            *(_mean(cell.get(method, ()), lambda result: result["seconds"]) for method in methods),
            *(_mean(cell.get(method, ()), lambda result: result["visits"] / result["records"]) for method in methods),
        )
    for rank in group.ranks:
        means = [_over_lengths(group, rank, method) for method in methods]
        shown = (NOTHING if value is None else f"{value:.1f}" for value in means)
        label = "mean of " + ", ".join(f"{length:,}" for length in group.lengths)
        yield (group.setting, label, str(rank), *shown, *(NOTHING,) * (3 + 2 * len(methods)))


def _over_lengths(group: Group, rank: int, method: str) -> float | None:
    """None unless every length was measured: means over other lengths could not be compared."""
    found = [group.mean(length, rank, method) for length in group.lengths]
    return None if None in found else mean(value for value in found if value is not None)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NOTHING
    low, high = min(values), max(values)
    return f"{mean(values):.1f}" + (f" ({low:.1f}–{high:.1f})" if low < high else "")


def _mean(results: Sequence[Result], value: Any) -> str:
    return f"{mean(map(value, results)):.1f}" if results else NOTHING


def _notes(group: Group, start: str) -> Iterator[str]:
    """What the numbers say of the questions that the suite was made for."""
    if {"sft", "memft-sw"} <= set(group.methods):
        yield start + _sliding_against_sft(group)
    if OURS in group.methods and len(group.methods) > 1:
        yield start + _ours_against_published(group)
    yield from (start + note for note in _other_batches(group))
    for length in group.lengths:
        least = ", ".join(f"{method} {_least_complete(group, length, method)}" for method in group.methods)
        yield f"{start}Fewest parameters with every record exact at {length:,} tokens, at every seed: {least}."
    placed = {
        f"{result['placement']}, rank {result['rank']} at {result['parameters']:,}"
        for cell in group.results.values()
        for result in cell.get(OURS, ())
    }
    if placed:
        yield (
            f"{start}Ours has as many parameters as the unit within 10 %, at a placement of its own: "
            f"{'; '.join(sorted(placed))}."
        )


def _other_batches(group: Group) -> Iterator[str]:
    """Where batches are smaller than the published row's, which would not divide the records."""
    for (length, rank), cell in group.results.items():
        for method, results in cell.items():
            for batch, row in sorted({_batches(method, result) for result in results if result["schedule"]}):
                if batch != row:
                    yield f"{method} at {_at(length, rank)}: batches of {batch} in place of the published row's {row}."


def _batches(method: str, result: Result) -> tuple[int, int]:
    """Of a published method: its batch, and that of the row that it follows."""
    schedule = result["schedule"]
    return schedule["batch_records"], Schedule.row(result["records"], method, schedule["family"]).batch_records


def _sliding_against_sft(group: Group) -> str:
    pairs = [
        (length, rank, sliding, plain)
        for length, rank in group.results
        if (sliding := group.mean(length, rank, "memft-sw")) is not None
        and (plain := group.mean(length, rank, "sft")) is not None
    ]
    behind = [f"{_at(n, r)} ({sliding:.1f} against {plain:.1f})" for n, r, sliding, plain in pairs if sliding < plain]
    equal = [f"{_at(n, r)} (both {plain:.1f})" for n, r, sliding, plain in pairs if sliding == plain]
    said = f"memft-sw beats sft in {len(pairs) - len(behind) - len(equal)} of {len(pairs)} cells."
    said += f" It is behind at {'; '.join(behind)}." if behind else ""
    return said + (f" It is equal at {'; '.join(equal)}." if equal else "")


def _ours_against_published(group: Group) -> str:
    compared, behind = 0, []
    for length, rank in group.results:
        values = {method: group.mean(length, rank, method) for method in group.methods}
        known = {method: value for method, value in values.items() if value is not None}
        if OURS not in known or len(known) < 2 or not any(LOW <= value <= HIGH for value in known.values()):
            continue
        compared += 1
        best = max(PUBLISHED, key=lambda method: known.get(method, -1.0))
        if known[OURS] < known[best]:
            behind.append(f"{_at(length, rank)} ({known[OURS]:.1f} against {known[best]:.1f} of {best})")
    said = (
        f"Of {compared} cells in which some method is between {LOW:g} and {HIGH:g} %, loramem is at least the best "
        f"published method in {compared - len(behind)}."
    )
    return said + (f" It is behind at {'; '.join(behind)}." if behind else "")


def _least_complete(group: Group, length: int, method: str) -> str:
    complete = [
        group.results[length, rank][method][0]["parameters"]
        for rank in group.ranks
        if (exact := group.exact(length, rank, method)) and min(exact) == 100
    ]
    return f"{min(complete):,}" if complete else "none"


def _at(length: int, rank: int) -> str:
    return f"{length:,} tokens, rank {rank}"


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot | HeatMap, ...]:
    """Exact match by rank at each length, by rank and length for each method, and learning curves of one cell."""
    drawn: list[Plot | HeatMap] = []
    for number, group in enumerate(groups(lines), start=1):
        tail = f"-{number}" if number > 1 else ""
        drawn += [_by_rank(group, length, tail) for length in group.lengths] if len(group.ranks) > 1 else []
        drawn += [_grid(group, method, tail) for method in group.methods] if len(group.lengths) > 1 else []
        drawn.append(_curves(group, tail))
    return tuple(drawn)


def _by_rank(group: Group, length: int, tail: str) -> Plot:
    def points(method: str) -> tuple[Point, ...]:
        found = [(rank, exact) for rank in group.ranks if (exact := group.exact(length, rank, method))]
        return tuple(Point(rank, mean(exact), min(exact), max(exact)) for rank, exact in found)

    return Plot(
        name=f"by-rank-{length}{tail}",
        title=f"Exact recall of {length:,} answer tokens",
        kind="line",
        x=Axis("rank of the published unit (log scale)", log=True),
        y=Axis("records decoded exactly, %"),
        series=tuple(Series(method, drawn) for method in group.methods if (drawn := points(method))),
        note=f"{group.setting}. Mean over seeds and their range. loramem has as many parameters as the unit of that "
        "rank, within 10 %.",
    )


def _grid(group: Group, method: str, tail: str) -> HeatMap:
    return HeatMap(
        name=f"grid-{method}{tail}",
        title=f"Exact recall by rank and length: {method}",
        x=Axis("rank of the published unit"),
        y=Axis("answer tokens"),
        value="exact, %",
        columns=tuple(map(str, group.ranks)),
        rows=tuple(f"{length:,}" for length in group.lengths),
        values=tuple(tuple(group.mean(length, rank, method) for rank in group.ranks) for length in group.lengths),
        high=100.0,
        note=f"{group.setting}. Share of the records decoded exactly, mean over seeds.",
    )


def _curves(group: Group, tail: str) -> Plot:
    """Of the cell in which the methods differ most, of the first seed."""

    def difference(size: tuple[int, int]) -> tuple[int, float]:
        found = [mean(map(exact_percent, results)) for results in group.results[size].values()]
        return len(found), max(found) - min(found)

    length, rank = max(group.results, key=difference)
    curves = {method: results[0]["curve"] for method, results in group.results[length, rank].items()}
    return Plot(
        name=f"learning{tail}",
        title=f"Learning {length:,} answer tokens at rank {rank}",
        kind="line",
        x=Axis("optimiser steps (log scale)", log=True),
        y=Axis("ordered tokens, %"),
        series=tuple(
            Series(method, tuple(Point(step, 100 * share, 100 * share, 100 * share) for step, share in curves[method]))
            for method in METHODS
            if method in curves
        ),
        note=f"{group.setting}; of all cells the one whose methods differ most, first seed. Ordered: of all answer and "
        "end tokens those with p > 0.5 (loramem: p >= 0.6) when a training step last saw them, for the published "
        "methods with dropout. Batches differ in size, and so do steps. Where loramem falls back, its training began "
        "again at a third of the rate.",
    )
