"""Source bits per parameter against seconds: phone numbers written for few parameters, and at fixed ranks.

Each cell is a whole write, proved in every dtype that is served. A fixed rank neither grows nor is left to the plan;
what it cannot hold where a write begins goes on at the same rank further up the ladder of placements.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loramem.planning.samples import generate
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name
from loramem.suites.write_speed import SOURCE_BITS

OPTIONS = ("records", "ranks", "model")
RANKS = {100: (2, 3, 4, 8), 400: (4, 8, 16)}
"""By number of records, about 0.25 to 1.5 bits per parameter on loramem-tiny."""
CAP_S = 600.0


@dataclass(frozen=True)
class Cell:
    """One write."""

    records: int
    rank: int | None
    """None for what ``goal="small"`` plans."""
    seed: int
    model: str
    device: str
    cap_s: float = CAP_S

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{public_name(self.model)}, {self.records} records, {chosen(self.rank)}, seed {self.seed}"


def chosen(rank: int | None) -> str:
    """How a rank came about."""
    return "planned" if rank is None else f"rank {rank}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Of each size the planned rank first."""
    for size in request.records or ((2,) if request.quick else (100, 400)):
        ranks = request.ranks or ((8,) if request.quick else RANKS.get(size, ()))
        for rank in (None, *ranks):
            for seed in range(request.seeds or 1):
                yield Cell(size, rank, seed, request.model, request.device)


def run(cell: Cell) -> Result:
    """Write for few parameters, and decode from the store opened anew."""
    from loramem import MemoryStore, WriterSettings
    from loramem.training.settings import MAX_RANK

    from .whole_write import held, timed_write

    settings = WriterSettings(seed=cell.seed, max_rank=cell.rank or MAX_RANK)
    with TemporaryDirectory() as scratch:
        place = Path(scratch) / "memory"
        records = generate("phonebook", cell.records, cell.seed)
        with MemoryStore(place, cell.model, device=cell.device) as store:
            result = timed_write(
                store, records, cell.cap_s, settings, cpu_cap_s=cell.cap_s, goal="small", rank=cell.rank
            )
        if not result["written"]:
            return result
        found = held(place, cell.device)
        bits = SOURCE_BITS * found["exact"] / found["parameters"]
        return {**result, **found, "source_bits_per_parameter": round(bits, 4)}


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per write, the densest of each base model and size last."""
    columns = (
        *("base", "records", "chosen", "seed", "certified", "exact", "lowest p", "source bits/parameter", "parameters"),
        *("rank", "adapters", "placement", "s", "of it training", "CPU s", "of it training", "steps"),
    )

    def order(line: Mapping[str, Any]) -> tuple[Any, ...]:
        return names.index(line["cell"]["model"]), line["cell"]["records"], line["result"].get(DENSITY, 0.0)

    names = list(dict.fromkeys(line["cell"]["model"] for line in lines))
    notes = tuple(
        f"{line['cell']['model']}, {line['cell']['records']} records, {chosen(line['cell']['rank'])}: "
        f"{line['result']['error'] or str(len(line['result']['failed'])) + ' records not certified'}."
        for line in lines
        if line["result"]["failed"]
    )
    return Table(columns, tuple(_row(line["cell"], line["result"]) for line in sorted(lines, key=order)), notes)


DENSITY = "source_bits_per_parameter"


def plots(_: Sequence[Mapping[str, Any]]) -> tuple[()]:
    """None: the table shows it better."""
    return ()


def _row(cell: Mapping[str, Any], result: Result) -> tuple[str, ...]:
    from .whole_write import placed, span

    start = (cell["model"], str(cell["records"]), chosen(cell["rank"]), str(cell["seed"]))
    certified = f"{result['written']}/{result['records']}"
    if not result["written"]:
        seconds = (f"{result['seconds']:.2f}", "-", f"{result['cpu_s']:.2f}", f"{result['training_cpu_s']:.2f}")
        return (*start, certified, *["-"] * 7, *seconds, "-")
    return (
        *start,
        certified,
        f"{result['exact']}/{result['written']}",
        ", ".join(f"{value:.3f}" for value in result["min_prob"].values()),
        f"{result[DENSITY]:.3f}",
        f"{result['parameters']:,}",
        span(result["ranks"]),
        str(result["adapters"]),
        placed(result),
        f"{result['seconds']:.2f}",
        f"{result['training_s']:.2f}",
        f"{result['cpu_s']:.2f}",
        f"{result['training_cpu_s']:.2f}",
        str(result["steps"]),
    )


if __name__ == "__main__":
    from .command import command

    sys.exit(command("tests.benchmarks.density", "density.jsonl")())
