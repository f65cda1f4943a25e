"""The Parametric Memory Law, fitted to converged runs of four kinds of data beside the constants that were published.

ΔL(r, ℓ) = C · r^α · ℓ^(−β) + b (arXiv 2605.30260, figure 2): phone books, and one long text with no, 40 % or only
random tokens. A run is one of `loramem.planning.calibrate`; one that ships with the package, made by the same base,
dtype, device, threads and torch, is read and not made again.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import median
from typing import Any

from loramem.errors import ArgumentError, InputError
from loramem.planning.law_tables import LAW_COLUMNS, FittedRuns, fit_groups
from loramem.planning.runs import MIXTURES, Run, by_kind, place_name, read_runs, shipped_file
from loramem.suites.figures import Axis, HeatMap, Plot, Point, Series, point
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

OPTIONS = ("lengths", "ranks", "model", "paper", "unit", "layer")
KINDS = ("phonebook", "text", "mixed", "random")
MODULE = "o_proj"
"""With the embedded base `down_proj`, nearer to the paper's unit, holds the shorter lengths whole: no grid is left."""
RANKS = (1, 2, 3, 4, 5)
LENGTHS = {"phonebook": (1000, 1200, 1400, 1700, 2000, 2400)}
TEXT_LENGTHS = (500, 700, 1000, 1400, 1700, 2000)
QUICK_KINDS, QUICK_RANKS, QUICK_LENGTHS = ("random",), (1, 2), (100, 140, 200)
PAPER_RANKS = (1, 2, 4, 8, 16, 32, 64)
PAPER_LENGTHS = {"phonebook": (1000, 2000, 4000, 8000, 12_000, 16_000, 24_000, 32_000)}
PAPER_TEXT_LENGTHS = (50, 100, 200, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 10_000)
# R² and MAPE in percent of Llama3.1-8B-Instruct and Qwen3-8B-Instruct, as published; the mixtures are its r0, r40 and
# r100, the combination is over all six of its mixtures.
PUBLISHED = {
    "phonebook": ((0.981, 1.606), (0.990, 0.476)),
    "text": ((0.992, 1.430), (0.996, 0.752)),
    "mixed": ((0.996, 2.528), (0.996, 2.331)),
    "random": ((0.996, 2.563), (0.996, 3.472)),
}
PUBLISHED_COMBINED = ((0.987, 7.057), (0.983, 8.320))
CONFIDENCE = 0.9
MIXED = "mixtures"


@dataclass(frozen=True)
class Cell:
    """One adapter, trained with plain cross-entropy until it no longer improves."""

    kind: str
    """Of `KINDS`."""
    length: int
    """Answer tokens, about."""
    rank: int
    module: str
    """The linear module that carries the adapter."""
    layer: int | None
    """Its decoder layer; at two thirds of them if None."""
    seed: int
    model: str
    device: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.length} tokens, rank {self.rank}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Every kind at every length and rank.

    Raises:
        InputError: A branch is asked for: the law is about adapters that a store could hold.
    """
    if request.unit == "branch":
        raise InputError(f"The law suite adapts {MODULE}, or with --unit down_proj that module.")
    ranks = request.ranks or (QUICK_RANKS if request.quick else PAPER_RANKS if request.paper else RANKS)
    for seed in range(request.seeds or 1):
        for kind in QUICK_KINDS if request.quick else KINDS:
            for length in request.lengths or lengths(kind, request):
                for rank in ranks:
                    module, layer = request.unit or MODULE, request.layer
                    yield Cell(kind, length, rank, module, layer, seed, request.model, request.device)


def lengths(kind: str, request: SuiteOptions) -> tuple[int, ...]:
    """Answer tokens of a kind, unless others are asked for."""
    if request.quick:
        return QUICK_LENGTHS
    if request.paper:
        return PAPER_LENGTHS.get(kind, PAPER_TEXT_LENGTHS)
    return LENGTHS.get(kind, TEXT_LENGTHS)


def run(cell: Cell) -> Result:
    """Make the run, unless it ships."""
    from loramem.models.adapters import AdaptedModel
    from loramem.models.base_model import load_base_model
    from loramem.models.layers import decoder_layers
    from loramem.models.placement import Placement
    from loramem.planning import calibrate
    from loramem.suites.paper_unit import paper_layer
    from loramem.suites.timing import conditions

    base = load_base_model(cell.model, device=cell.device)
    layer = paper_layer(len(decoder_layers(base.model))) if cell.layer is None else cell.layer
    try:
        placement = Placement.named(base.model, (cell.module,), (layer,))
    except ArgumentError as error:
        raise InputError(f"{error} Choose with --unit and --layer.") from None
    wanted = calibrate.CalibrationGrid(cell.kind, placement, (cell.length,), (cell.rank,), cell.seed)
    bench = calibrate.Bench(AdaptedModel(base), wanted, cell.length)
    shipped = {run.identity: run for run in read_runs(shipped_file())}
    known = shipped.get(bench.identity(cell.rank))
    made = known or bench.run(cell.rank)
    return {
        "run": asdict(made),
        "shipped": known is not None,
        "seconds": made.elapsed_s,
        "steps": made.steps,
        "base": conditions(base),
    }


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A law per kind and of all mixtures, the intervals of its constants, and what the paper has for it."""
    runs = _runs(lines)
    groups, remarks = fit_groups([*by_kind(runs), *_mixtures(runs)])
    columns = (
        *(*LAW_COLUMNS[:5], "± C", "± α", "± β", "± b", *LAW_COLUMNS[5:]),
        *("R², Llama", "R², Qwen", "MAPE %, Llama", "MAPE %, Qwen"),
    )
    rows = [_row(one) for one in groups]
    shipped = sum(line["result"]["shipped"] for line in lines)
    notes = (
        f"{len(lines) - shipped} runs were made here; {shipped} ship with the package, made by the same base, dtype, "
        "device, threads and torch.",
        f"ΔL = C · r^α · ℓ^(−β) + b in nats per token; ±: half the {CONFIDENCE:.0%} interval of a constant. Runs that "
        "end below 0.69 nats are saturated and not fitted, by the paper's rule. Last columns: the published fits for "
        f"Llama3.1-8B-Instruct and Qwen3-8B-Instruct (text: r0, mixed: r40, random: r100, {MIXED}: r0 to r100).",
    )
    return Table(columns, tuple(rows), (*notes, *remarks))


def _row(one: FittedRuns) -> tuple[str, ...]:
    name, *rest = one.row
    widths = (f"{width:.3g}" for width in one.law.half_widths(CONFIDENCE))
    return (name, *rest[:4], *widths, *rest[4:], *_published(PUBLISHED.get(_kind(name), PUBLISHED_COMBINED)))


def _published(fits: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    r_squared, mapes = zip(*fits, strict=True)
    return (*(f"{one:.3f}" for one in r_squared), *(f"{one:.1f}" for one in mapes))


def _mixtures(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    """The runs of long texts by placement, where there are several kinds: what one law with one b makes of them."""
    groups: dict[str, list[Run]] = {}
    for run in (run for run in runs if run.kind in MIXTURES):
        groups.setdefault(f"{MIXED}, one b, {place_name(run)}", []).append(run)
    yield from ((name, group) for name, group in groups.items() if len({run.kind for run in group}) > 1)


def _runs(lines: Sequence[Mapping[str, Any]]) -> list[Run]:
    return [Run.of(line["result"]["run"]) for line in lines]


def _kind(name: str) -> str:
    """The kind of data that a group of runs is named after."""
    return name.partition(",")[0]


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot | HeatMap, ...]:
    """After the paper's figure 2: predicted against measured, then for each kind the final loss and ΔL over length."""
    groups = list(by_kind(_runs(lines)))
    fitted, _ = fit_groups(groups)
    alone = len({_kind(name) for name, _ in groups}) == len(groups)

    def label(name: str) -> str:
        return _kind(name) if alone else name

    predicted = tuple(Series(label(one.name), tuple(_predictions(one))) for one in fitted)
    return (
        *([_predicted(predicted)] if predicted else []),
        *(draw(label(name), runs) for name, runs in groups for draw in (_losses, _reductions)),
    )


def _predictions(one: FittedRuns) -> Iterator[Point]:
    for run in one.runs:
        if not run.saturated:
            yield point(run.point.loss_reduction, [one.law.predict(run.rank, run.length)])


def _predicted(series: tuple[Series, ...]) -> Plot:
    return Plot(
        name="predicted",
        title="What the law says of the runs it was fitted to",
        kind="scatter",
        x=Axis("measured ΔL, nats per token"),
        y=Axis("ΔL of the law, nats per token"),
        series=series,
        diagonal="predicted = measured",
        note="A law per kind of data. Runs that end below 0.69 nats are not fitted and not shown.",
    )


def _losses(name: str, runs: Sequence[Run]) -> HeatMap:
    ranks, sizes = sorted({run.rank for run in runs}, reverse=True), sorted({run.length for run in runs})
    found = _by_place(runs, attrgetter("final_loss"))
    values = [[median(found[place]) if (place := (r, n)) in found else None for n in sizes] for r in ranks]
    known = [value for row in values for value in row if value is not None]
    return HeatMap(
        name=f"loss-{_slug(name)}",
        title=f"Final loss after training to convergence: {name}",
        x=Axis("answer tokens"),
        y=Axis("rank"),
        value="nats per token",
        columns=tuple(f"{length:,}" for length in sizes),
        rows=tuple(map(str, ranks)),
        values=tuple(map(tuple, values)),
        low=min(known),
        high=max(known),
        note="Of several seeds: the median. Below 0.69 the rank sufficed, and the law says nothing.",
    )


def _reductions(name: str, runs: Sequence[Run]) -> Plot:
    series: dict[int, list[Point]] = {}
    for (rank, length), values in sorted(_by_place(runs, attrgetter("point.loss_reduction")).items()):
        series.setdefault(rank, []).append(point(length, values))
    return Plot(
        name=f"reduction-{_slug(name)}",
        title=f"How far an adapter lowers the loss: {name}",
        kind="line",
        x=Axis("answer tokens (log scale)", log=True),
        y=Axis("ΔL, nats per token (log scale)", log=True),
        series=tuple(Series(f"rank {rank}", tuple(points)) for rank, points in series.items()),
        note="Less b, the law has parallel straight lines. A run that ended below 0.69 nats could have gone further: "
        "its ΔL is the base's whole loss. Of several seeds: median and range.",
    )


def _by_place(runs: Sequence[Run], quantity: Callable[[Run], float]) -> dict[tuple[int, int], list[float]]:
    """Values by rank and length."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        found.setdefault((run.rank, run.length), []).append(quantity(run))
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
