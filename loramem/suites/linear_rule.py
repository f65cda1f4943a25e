"""Memory and generalisation: pairs of f(x, y) = 3x + 5y + 7 that were trained on, and pairs that were not.

The paper gives the rule and its figures for Qwen3-8B; sizes, ranges and prompts are not published, and chosen here:
x and y from 0 to 99, key "f(12, 7) =", value "78". Published methods follow the PhoneBook schedule for as many records.
"""

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from loramem.errors import InputError
from loramem.models.dtypes import DtypeChoice
from loramem.records.record import Record
from loramem.suites.figures import Axis, Plot, Point, Series
from loramem.suites.methods import OWN, labels, unit_of
from loramem.suites.paper_schedule import Schedule
from loramem.suites.runner import METHODS, Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    from loramem.models.base_model import BaseModel
    from loramem.records.prompts import EncodedRecord

OPTIONS = ("records", "ranks", "methods", "model", "paper", "unit", "layer", "dtype")
RANKS, QUICK_RANKS, SEEDS = (1, 2, 4, 8, 16), (1, 8), 5
DEFAULT_METHODS = METHODS[:3]
LIMIT = 100  # x and y are below it
TRAINED, QUICK_TRAINED, PAPER_TRAINED = 40, 8, 100
UNSEEN = 200
CONFIDENCE = 0.95
PAPER = {
    "sft": {1: (83, 19), 2: (100, 38), 4: (99, 46), 8: (100, 39), 16: (100, 41)},
    "memft": {1: (95, 34), 2: (97, 47), 4: (100, 53), 8: (99, 49), 16: (100, 54)},
}
"""Published memory and generalisation in %, by rank (arXiv 2605.30260, Qwen3-8B); which MemFT is not said."""
MEASURES = {"memory": "trained pairs", "generalisation": "unseen pairs"}


@dataclass(frozen=True)
class Cell:
    """One adapter."""

    method: str
    rank: int
    trained: int
    """Pairs."""
    unseen: int
    """Pairs."""
    unit: str
    """Of a published method; our own has as many parameters, within 10 %."""
    layer: int | None
    """Of that unit; None at two thirds of the layers."""
    seed: int
    """Of the pairs, the initial matrices and the order."""
    model: str
    device: str
    dtype: DtypeChoice = "auto"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{self.method}, rank {self.rank}, {self.trained} pairs, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Seed by seed, so that an interrupted run has whole ones; ``records`` is the number of trained pairs."""
    sizes = request.records or (QUICK_TRAINED if request.quick else PAPER_TRAINED if request.paper else TRAINED,)
    ranks = request.ranks or (QUICK_RANKS if request.quick else RANKS)
    for trained in sizes:
        for seed in range(request.seeds or (2 if request.quick else SEEDS)):
            for method in request.methods or DEFAULT_METHODS:
                for rank in ranks:
                    where = unit_of(request, method)
                    yield Cell(
                        *(method, rank, trained, UNSEEN, *where, seed),
                        *(request.model, request.device, request.dtype),
                    )


def rule(x: int, y: int) -> int:
    """The paper's f."""
    return 3 * x + 5 * y + 7


def pairs(trained: int, unseen: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Records to train on and records to ask for, all of different pairs (x, y).

    The unseen ones are the same however many are trained on.

    Raises:
        InputError: More than there are.
    """
    drawn = random.Random(seed).sample([(x, y) for x in range(LIMIT) for y in range(LIMIT)], LIMIT**2)
    if not 0 < trained <= LIMIT**2 - unseen:
        raise InputError(f"There are {LIMIT**2:,} pairs: not {trained:,} to train on beside {unseen} unseen ones.")
    records = [Record(f"f({x}, {y}) =", str(rule(x, y))) for x, y in drawn]
    return records[unseen : unseen + trained], records[:unseen]


def run(cell: Cell) -> Result:
    """Train on some pairs, decode these and others."""
    from loramem.models.base_model import load_base_model
    from loramem.records.prompts import encode_records
    from loramem.suites.methods import trained_adapter
    from loramem.suites.timing import conditions, warm_up

    base = load_base_model(cell.model, device=cell.device, dtype=cell.dtype)
    memory, others = (
        encode_records(records, base.tokenizer, base.template, base.max_tokens, base.unreachable)
        for records in pairs(cell.trained, cell.unseen, cell.seed)
    )
    warm_up(base)
    schedule = Schedule.published(len(memory), cell.method)
    with trained_adapter(
        base, memory, cell.method, cell.rank, schedule, seed=cell.seed, unit=cell.unit, layer=cell.layer
    ) as taken:
        return {
            "seconds": round(taken.seconds, 3),
            "steps": taken.steps,
            "visits": taken.visits,
            "parameters": taken.parameters,
            "placement": taken.where,
            "memory": _answers(base, memory),
            "generalisation": _answers(base, others),
            "error_of_mean": error_of_mean(*([int(one.record.value) for one in known] for known in (memory, others))),
            "base": conditions(base),
        }


def _answers(base: "BaseModel", records: Sequence["EncodedRecord"]) -> Result:
    from loramem.models.batches import group_by_length
    from loramem.models.decoding import DECODE_RECORDS, DECODE_TOKENS, decode_records
    from loramem.records.prompts import decode_answer

    batches = group_by_length(records, range(len(records)), DECODE_RECORDS, DECODE_TOKENS)
    decoded = dict(decode_records(base.model, records, batches))
    exact = sum(tuple(decoded[index]) == record.answer_ids[:-1] for index, record in enumerate(records))
    texts = [decode_answer(base.tokenizer, decoded[index]) for index in range(len(records))]
    return {"exact": exact, **errors([int(record.record.value) for record in records], texts)}


def errors(values: Sequence[int], texts: Sequence[str]) -> Result:
    """How far off the numbers among answers are; a number has one to three digits, as every value of the rule has.

    Returns:
        ``records``; ``parsed``: how many answers are numbers; ``mean_error``: their mean absolute error, None without.
    """
    off = [
        abs(int(text) - value) for value, text in zip(values, texts, strict=True) if re.fullmatch("[0-9]{1,3}", text)
    ]
    return {"records": len(values), "parsed": len(off), "mean_error": round(mean(off), 2) if off else None}


def error_of_mean(trained: Sequence[int], unseen: Sequence[int]) -> float:
    """Mean absolute error of who answers unseen pairs with the mean of the trained values: has nothing been learned?"""
    middle = mean(trained)
    return round(mean(abs(value - middle) for value in unseen), 2)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by Student's t; None for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per number of pairs, method and rank, over its seeds; below, methods against SFT on the same pairs."""
    groups = _groups(lines)
    columns = (
        *("trained pairs", "method", "rank", "placement", "parameters", "seeds", "memory, %", "generalisation, %"),
        *("unseen: answered with a number, %", "mean error", "mean error of the trained mean", "seconds"),
        *("paper: memory, %", "paper: generalisation, %"),
    )
    rows = tuple(_row(group) for group in groups.values())
    notes = (
        "Memory: trained pairs decoded exactly, end token included; generalisation: the same of unseen pairs. Mean "
        "over the seeds ± half of the 95 % interval by Student's t; a seed draws pairs, initial matrices and order. "
        "Mean error: |answer - value| of the unseen pairs that are answered with a number.",
        "Paper: Qwen3-8B; its MemFT stands beside both here, since it is not said which of the two it is.",
        *_other_batches(groups),
        *_differences(groups),
    )
    return Table(columns, rows, notes)


Group = tuple[int, str, int]
"""Trained pairs, method, rank."""


def _groups(lines: Sequence[Mapping[str, Any]]) -> dict[Group, dict[int, Mapping[str, Any]]]:
    """The lines of each group by seed."""
    label = labels([line["cell"] for line in lines])
    groups: dict[Group, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        cell = line["cell"]
        groups.setdefault((cell["trained"], label(cell), cell["rank"]), {})[cell["seed"]] = line
    return groups


def _other_batches(groups: Mapping[Group, Mapping[int, Mapping[str, Any]]]) -> Iterator[str]:
    """Where batches are smaller than the published row's, which would not divide the pairs."""
    for trained, method in dict.fromkeys(
        (trained, next(iter(group.values()))["cell"]["method"]) for (trained, *_), group in groups.items()
    ):
        if method == OWN:
            continue
        batch, row = (of(trained, method).batch_records for of in (Schedule.published, Schedule.row))
        if batch != row:
            yield f"{method}, {trained:,} pairs: batches of {batch} in place of the published row's {row}."


def _shares(group: Mapping[int, Mapping[str, Any]], measure: str) -> dict[int, float]:
    """By seed, in %."""
    found = {seed: line["result"][measure] for seed, line in group.items()}
    return {seed: 100 * one["exact"] / one["records"] for seed, one in found.items()}


def _row(group: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    cell, results = next(iter(group.values()))["cell"], [line["result"] for line in group.values()]
    unseen = [result["generalisation"] for result in results]
    mean_errors = [one["mean_error"] for one in unseen if one["mean_error"] is not None]
    published = PAPER.get("sft" if cell["method"] == "sft" else "memft", {}).get(cell["rank"], ("-", "-"))
    return (
        f"{cell['trained']:,}",
        cell["method"],
        str(cell["rank"]),
        results[0]["placement"],
        f"{results[0]['parameters']:,}",
        str(len(results)),
        *(_with_interval(list(_shares(group, measure).values())) for measure in MEASURES),
        f"{100 * mean(one['parsed'] / one['records'] for one in unseen):.0f}",
        f"{mean(mean_errors):.1f}" if mean_errors else "-",
        f"{mean(result['error_of_mean'] for result in results):.1f}",
        f"{mean(result['seconds'] for result in results):.1f}",
        *(("-", "-") if cell["method"] == OWN else map(str, published)),
    )


def _with_interval(values: Sequence[float], sign: str = "") -> str:
    half = half_width(values)
    return f"{mean(values):{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def _differences(groups: Mapping[Group, Mapping[int, Mapping[str, Any]]]) -> Iterator[str]:
    """Of every other method from SFT, seed by seed: both were given the same pairs."""
    for measure in MEASURES:
        told: dict[tuple[int, str], list[str]] = {}
        for (trained, method, rank), group in groups.items():
            plain = method.replace(next(iter(group.values()))["cell"]["method"], "sft")
            against = groups.get((trained, plain, rank), {})
            seeds = sorted(set(group) & set(against))
            if method != plain and seeds:
                ours, theirs = _shares(group, measure), _shares(against, measure)
                text = _with_interval([ours[seed] - theirs[seed] for seed in seeds], "+")
                told.setdefault((trained, method), []).append(f"rank {rank} {text}")
        for (trained, method), texts in told.items():
            name = f"{measure.capitalize()} of {method} minus sft"
            yield f"{name}, {trained:,} pairs, percentage points: {', '.join(texts)}."


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Memory and generalisation over rank, a line per method."""
    groups = _groups(lines)
    several = len({trained for trained, *_ in groups}) > 1

    def series(measure: str) -> tuple[Series, ...]:
        found: dict[str, list[Point]] = {}
        for (trained, method, rank), group in groups.items():
            name = method + (f", {trained:,} pairs" if several else "")
            values = list(_shares(group, measure).values())
            middle, half = mean(values), half_width(values) or 0.0
            point = Point(rank, middle, max(0.0, middle - half), min(100.0, middle + half))
            found.setdefault(name, []).append(point)
        return tuple(Series(name, tuple(sorted(points, key=lambda one: one.x))) for name, points in found.items())

    return tuple(
        Plot(
            name=measure,
            title=f"{measure.capitalize()} of f(x, y) = 3x + 5y + 7",
            kind="line",
            x=Axis("rank (log scale)", log=True),
            y=Axis(f"{what} decoded exactly, %"),
            series=series(measure),
            note="Mean over the seeds, with its 95 % interval by Student's t, cut at 0 and 100 %.",
        )
        for measure, what in MEASURES.items()
    )
