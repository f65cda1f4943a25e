"""Writing until every record is exact: loramem, PEFT under the Trainer, and the paper's recipe.

Same base, records and threads; every cell in a process of its own, the model loaded and warm before its clock starts.
Training is compared with training: the others decode off the clock, and prove and save nothing. They are stopped at a
multiple of our training seconds and scored as they are. The Trainer runs in float32, its default, and once more with
bfloat16 products where the processor has them; the paper's recipe runs with bfloat16.

On a small base the Trainer is tuned over many settings, and also runs at a placement like ours. On a large one, where a
setting takes minutes, it runs as people set it up, over a few rates, each tried for a part of the time.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, log2
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from loramem.planning.samples import generate
from loramem.suites.figures import Axis, Plot, Series, point
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

OPTIONS = ("records", "model")
OURS, PLACED, USUAL, PAPER = "loramem", "Trainer, our placement", "Trainer, all-linear", "paper recipe"
WHOLE = "loramem, whole write"
SOURCE_BITS = 2 + 9 * log2(10)  # entropy of a phone-book value: 6 to 9, then nine digits
CAP = 25
"""What the others may take, in medians of our training seconds."""
QUICK_CAP_S = 5.0
LARGE_PARAMETERS = 50_000_000
"""Of a base on which a step takes about a second on two cores."""
# Likely good ones first: whatever follows is stopped soon after the best time so far. The best was 0.01 and 0.003 on
# loramem-tiny, 0.001 on tinystories-260k, 0.0003 and 0.001 on a random Llama.
RATES = {PLACED: (3e-3, 1e-3, 1e-2, 3e-4, 2e-2, 1e-4), USUAL: (3e-3, 1e-3, 1e-2, 3e-4, 1e-4)}
BATCHES = (8, 16, 25)
LARGE_RATES, LARGE_BATCHES = (1e-3, 3e-4, 3e-3), (8,)
TRIAL = 0.4
"""Of the cap, for each candidate on a large base."""
SLACK = 1.1


@dataclass(frozen=True)
class Cell:
    """One write, or one candidate of a tuning."""

    method: str
    records: int
    seed: int
    model: str
    device: str
    quick: bool
    tuning: bool = False
    parameters: int | None = None
    """What "our placement" may spend, as many as ours."""
    learning_rate: float | None = None
    batch: int | None = None
    precision: str = "float32"
    """Of a baseline's matrix products: "float32" as the Trainer's default, or "auto", as our writer's."""
    times: int = CAP
    """Our training seconds that `cap_s` is of."""
    cap_s: float = inf

    @property
    def identity(self) -> Mapping[str, Any]:
        """All but the seconds of the cap, which follow from other cells'."""
        fields = {name: value for name, value in asdict(self).items() if name != "cap_s"}
        return {**fields, "model": public_name(self.model)}

    @property
    def title(self) -> str:
        trial = f", rate {self.learning_rate:g}, batch {self.batch}, {self.precision}" if self.tuning else ""
        limit = f" (at most {self.cap_s:.1f} s)" if self.cap_s < inf else ""
        return f"{self.method}, {self.records} records, seed {self.seed}{trial}{limit}"


def cells(request: SuiteOptions, known: Known) -> Iterator[Cell]:
    """Ours first: the others' caps are multiples of it. Then the paper, then the Trainer tuned and measured."""
    sizes = request.records or ((10,) if request.quick else (100, 400))
    seeds = range(request.seeds or (1 if request.quick else 3))
    ours = {size: [_cell(request, OURS, size, seed) for seed in seeds] for size in sizes}
    for size in sizes:
        yield from ours[size]
    large = known(ours[sizes[0]][0])["base"]["base_parameters"] >= LARGE_PARAMETERS

    def limited(method: str, size: int, seed: int) -> Cell:
        cap_s = CAP * median(known(cell)["training_s"] for cell in ours[size])
        parameters = known(ours[size][0])["parameters"] if method == PLACED else None
        cell = _cell(request, method, size, seed)
        return replace(cell, cap_s=QUICK_CAP_S if request.quick else cap_s, parameters=parameters)

    def repeated(size: int) -> range:
        return seeds[:1] if large or size > 100 else seeds

    for size in sizes:
        for seed in repeated(size):
            yield replace(limited(PAPER, size, seed), precision="auto")
    for method in (USUAL,) if large else (PLACED, USUAL):
        best = yield from tune(limited(method, min(sizes), 0), known, large)
        for size in sizes:
            for seed in repeated(size):
                cell = replace(limited(method, size, seed), learning_rate=best.learning_rate, batch=best.batch)
                yield cell
                yield replace(cell, precision="auto")


def tune(cell: Cell, known: Known, large: bool) -> Generator[Cell, None, Cell]:
    """Yield the candidates of a Trainer and return the one that had every record exact first.

    Where none had, the one with most exact when it was stopped, and of those the one with the lowest loss.
    """
    rates, batches = (LARGE_RATES, LARGE_BATCHES) if large else (RATES[cell.method], BATCHES)
    grid, cap_s = [(rate, batch) for rate in rates for batch in batches], cell.cap_s * (TRIAL if large else 1)
    best = _candidate(cell, grid[0])
    if cell.quick:
        return best
    lowest: tuple[bool, float, float] = (True, inf, inf)
    for settings in grid:
        limit_s = cap_s if lowest[0] else min(cap_s, SLACK * lowest[1])
        candidate = replace(_candidate(cell, settings), cap_s=limit_s)
        yield candidate
        result = known(candidate)
        capped = result["capped"]
        score = (True, -result["exact"], result["loss"]) if capped else (False, result["seconds"], result["loss"])
        if score < lowest:
            best, lowest = candidate, score
    return best


def run(cell: Cell) -> Result:
    """Write the cell's records its way."""
    result = _write(cell) if cell.method == OURS else _baseline(cell)
    result["source_bits_per_parameter"] = round(SOURCE_BITS * result["exact"] / result["parameters"], 4)
    return result


def _cell(request: SuiteOptions, method: str, records: int, seed: int) -> Cell:
    return Cell(method, records, seed, request.model, request.device, request.quick)


def _candidate(cell: Cell, settings: tuple[float, int]) -> Cell:
    rate, batch = settings
    return replace(cell, learning_rate=rate, batch=batch, tuning=True)


def _write(cell: Cell) -> Result:
    from loramem import MemoryStore, WriterSettings
    from loramem.suites.runner import peak_memory_mb
    from loramem.suites.timing import clock, conditions, warm_up

    records = generate("phonebook", cell.records, cell.seed)
    with TemporaryDirectory() as scratch, MemoryStore(Path(scratch) / "m", cell.model, device=cell.device) as store:
        warm_up(store.base)
        loaded_mb, started = peak_memory_mb(), clock(store.base.device)
        report = store.write(records, settings=WriterSettings(seed=cell.seed))
        call_s = clock(store.base.device) - started
        verified = store.verify()
        return {
            "seconds": round(report.elapsed_s, 3),
            "training_s": round(report.training_s, 3),
            "call_s": round(call_s, 3),
            "verify_s": round(verified.elapsed_s, 3),
            "steps": report.steps,
            "visits_per_record": round(report.visits / cell.records, 2),
            "exact": verified.exact,
            "records": cell.records,
            "rank": report.rank,
            "adapters": len(report.adapters),
            "parameters": report.parameters,
            "cost_bits": round(report.cost_bits, 1),
            "cost_bits_per_parameter": round(report.bits_per_parameter, 4),
            "min_prob": report.min_prob and round(report.min_prob, 4),
            "capped": False,
            "loaded_memory_mb": loaded_mb,
            "base": conditions(store.base),
        }


def _baseline(cell: Cell) -> Result:
    from loramem.models.base_model import load_base_model
    from loramem.models.placement import Placement
    from loramem.records.prompts import encode_records
    from loramem.suites import baselines
    from loramem.suites.paper_recipe import paper_recipe
    from loramem.suites.runner import peak_memory_mb
    from loramem.suites.timing import conditions, warm_up
    from loramem.training.trainer import autocast_dtype

    base = load_base_model(cell.model, device=cell.device)
    records = encode_records(
        generate("phonebook", cell.records, cell.seed), base.tokenizer, base.template, base.max_tokens, base.unreachable
    )
    warm_up(base)
    loaded_mb = peak_memory_mb()
    bfloat16 = cell.precision == "auto" and autocast_dtype(base.device) is not None
    if cell.method == PAPER:
        result = paper_recipe(base, records, seed=cell.seed, cap_s=cell.cap_s, bfloat16=bfloat16)
    else:
        assert cell.learning_rate and cell.batch
        config = baselines.all_linear()
        if cell.method == PLACED:
            assert cell.parameters
            per_rank = Placement.default(base.model).parameters_per_rank(base.model)
            config = baselines.same_placement(base, max(1, round(cell.parameters / per_rank)))
        result = baselines.trainer_loop(
            base,
            records,
            config,
            learning_rate=cell.learning_rate,
            batch_records=cell.batch,
            seed=cell.seed,
            cap_s=cell.cap_s,
            bfloat16=bfloat16,
        )
    return {**result, "loaded_memory_mb": loaded_mb, "base": conditions(base)}


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per number of records and method: median over seeds, and the range."""
    groups, rows = _groups(lines), []
    for (records, method), results in groups.items():
        done = _exact(results) == records
        took, ours = _training_s(results), groups[records, OURS]
        bound = "" if done else "> "
        rows.append(
            (
                str(records),
                method,
                str(len(results)),
                spread(took, 2) if done else f"> {median(took):.1f}, exact {_exact(results)}/{records}",
                spread(_of(results, "seconds"), 2) if method == OURS else "-",
                spread(_of(results, "steps"), 0),
                f"{_exact(results)}/{records}",
                f"{min(result['min_prob'] for result in results):.3f}",
                f"{median(result['parameters'] for result in results):,.0f}",
                f"{median(result['source_bits_per_parameter'] for result in results):.4f}",
                spread(_of(results, "peak_memory_mb"), 0),
                f"{bound}{median(took) / median(_training_s(ours)):.1f}",
                f"{bound}{median(took) / median(_of(ours, 'seconds')):.1f}" if method != OURS else "-",
            )
        )
    columns = (
        *("records", "method", "seeds", "training seconds to every record exact", "whole write s", "steps", "exact"),
        *("lowest p", "parameters", "source bits/parameter", "peak MB", "times our training", "times our whole write"),
    )
    return Table(columns, tuple(rows), _notes([line for line in lines if not line["cell"]["tuning"]]))


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Training seconds by method, and those of our whole write; a colour per number of records."""
    if not (groups := _groups(lines)):
        return ()
    bars: dict[tuple[int, str], tuple[list[float], bool]] = {}
    for (size, method), results in groups.items():
        bars[size, method] = _training_s(results), _exact(results) < size
        if method == OURS:
            bars[size, WHOLE] = _of(results, "seconds"), False
    methods = tuple(dict.fromkeys(method for _, method in bars))
    series = tuple(
        Series(
            f"{size:,} records",
            tuple(
                point(methods.index(method), seconds, stopped)
                for (records, method), (seconds, stopped) in bars.items()
                if records == size
            ),
        )
        for size in dict.fromkeys(records for records, _ in groups)
    )
    return (
        Plot(
            name="seconds",
            title="Training until every record is exact",
            kind="bar",
            x=Axis("method"),
            y=Axis("seconds (log scale)", log=True),
            series=series,
            names=methods,
            note="Medians, and the range over seeds; a hatched bar was stopped before every record was exact. The "
            "whole write is from planning to commit, every record proved as saved.",
        ),
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Median (lowest–highest) of a number over seeds."""
    middle = f"{median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def _of(results: Sequence[Result], name: str) -> list[float]:
    return [result[name] for result in results]


def _training_s(results: Sequence[Result]) -> list[float]:
    """Of the others nothing but training is on the clock."""
    return [result["training_s"] if "training_s" in result else result["seconds"] for result in results]


def _groups(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], list[Result]]:
    """The results, without the tuning's, by number of records and method; the smallest number first."""
    groups: dict[tuple[int, str], list[Result]] = {}
    for line in lines:
        if not line["cell"]["tuning"]:
            groups.setdefault((line["cell"]["records"], _label(line)), []).append(line["result"])
    return dict(sorted(groups.items(), key=lambda group: group[0][0]))


def _label(line: Mapping[str, Any]) -> str:
    method: str = line["cell"]["method"]
    return f"{method}, bfloat16" if method in RATES and line["result"]["bfloat16"] else method


def _exact(results: Sequence[Result]) -> int:
    return int(min(result["exact"] for result in results))


def _notes(measured: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    said = {
        OURS: f"{OURS}: the whole write is from planning to commit, every record proved as saved in every dtype "
        "that is served; frozen passes that are made once are in it, and not in its training."
    }
    for line in measured:
        cell, result = line["cell"], line["result"]
        if cell["method"] in RATES:
            said[cell["method"]] = (
                f"{cell['method']}: rate {result['learning_rate']:g}, batch {result['batch']}; decoding after every "
                "epoch is not counted."
            )
        elif cell["method"] == PAPER:
            said[PAPER] = (
                f"{PAPER}: rank {result['rank']}, float32 A and B; the seconds are of its fixed schedule "
                f"({result['steps']:,} of {result['planned_steps']:,} steps), which does not look whether it is done."
            )
    return tuple(said.values())
