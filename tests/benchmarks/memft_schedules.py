"""What of a published method is its loss, what its schedule, what its curriculum.

PhoneBook's rows differ in all three at once: SFT and MemFT-OT take 200 passes in batches of 4, MemFT-SW takes 260
passes in batches of 10, which is half as many steps, through a curriculum. Here losses are crossed with schedules, on
the records and at the unit of the phone-book suite, which has the published rows.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from loramem.planning.samples import generate
from loramem.suites.paper_schedule import Schedule
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

OPTIONS = ("records", "ranks", "model")
RATE = 1e-2
CURRICULUM = (20, 40, 60, 80)
SCHEDULES = {
    "300 passes, batches of 10": Schedule(RATE, 300, 10),
    "300 passes, batches of 10, idle ones skipped": Schedule(RATE, 300, 10, (0, 0, 0, 0, 300)),
    "curriculum, 200 passes, batches of 4": Schedule(RATE, 240, 4, (*CURRICULUM, 240)),
}
ROWS = (
    ("memft-ot", "300 passes, batches of 10"),
    ("memft-sw", "curriculum, 200 passes, batches of 4"),
    ("sft", "300 passes, batches of 10"),
    ("memft-sw", "300 passes, batches of 10, idle ones skipped"),
)
"""MemFT-OT with the batches of MemFT-SW; that with the steps and passes of the others; SFT with its batches; and
MemFT-SW without its curriculum. What is left between the last and the first: a batch without a stubborn token is no
step of MemFT-SW, and one of plain SFT for MemFT-OT."""


@dataclass(frozen=True)
class Cell:
    """One training, and all of its records decoded."""

    method: str
    schedule: str
    records: int
    rank: int
    seed: int
    model: str
    device: str
    cut: int
    """Epochs are divided by it; 1 but for quick runs."""

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{self.method}, {self.schedule}, {self.records} records, rank {self.rank}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Every row at every seed; the numbers of records are to be divided by 20."""
    for records in request.records or (20 if request.quick else 100,):
        for rank in request.ranks or (16,):
            for seed in range(request.seeds or 1):
                for method, schedule in ROWS:
                    where = request.model, request.device
                    yield Cell(method, schedule, records, rank, seed, *where, 100 if request.quick else 1)


def run(cell: Cell) -> Result:
    """Train to the end of the schedule and decode every record."""
    from loramem.models.base_model import load_base_model
    from loramem.records.prompts import encode_records
    from loramem.suites.methods import trained_adapter
    from loramem.suites.scoring import score
    from loramem.suites.timing import conditions

    base = load_base_model(cell.model, device=cell.device)
    records = encode_records(
        generate("phonebook", cell.records, cell.seed),
        *(base.tokenizer, base.template, base.max_tokens, base.unreachable),
    )
    schedule = SCHEDULES[cell.schedule].shortened(cell.cut)
    with trained_adapter(
        base, records, cell.method, cell.rank, schedule, seed=cell.seed, unit="branch", layer=None
    ) as taken:
        scored = score(base, records)
    return {**asdict(scored), **asdict(taken), "records": len(records), "base": conditions(base)}


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per loss and schedule, means over the seeds."""
    groups: dict[tuple[str, int, int, str, str], list[Result]] = {}
    for line in lines:
        cell = line["cell"]
        key = (cell["model"], cell["records"], cell["rank"], cell["method"], cell["schedule"])
        groups.setdefault(key, []).append(line["result"])
    columns = (
        *("base", "records", "rank", "method", "schedule", "seeds", "steps", "decoded exactly, %", "tokens right, %"),
        "mean loss",
    )
    return Table(columns, tuple(_row(key, results) for key, results in groups.items()))


def _row(key: tuple[str, int, int, str, str], results: Sequence[Result]) -> tuple[str, ...]:
    exact = [100 * one["exact"] / one["records"] for one in results]
    between = f" ({min(exact):.0f}–{max(exact):.0f})" if min(exact) < max(exact) else ""
    return (
        *map(str, key),
        str(len(results)),
        f"{results[0]['steps']:,}",
        f"{mean(exact):.1f}{between}",
        f"{100 * mean(one['token_accuracy'] for one in results):.1f}",
        f"{mean(one['loss'] for one in results):.3f}",
    )


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[()]:
    """None: the table says it."""
    return ()


if __name__ == "__main__":
    from .command import command

    sys.exit(command("tests.benchmarks.memft_schedules", "memft-schedules.jsonl")())
