"""Whether planned ranks are right: written at the planned rank, and how low a rank would have done.

Every job is new to the calibration: its lengths lie between calibrated ones, and its seed is another. It is written
with ``--goal small`` at the planned rank, not allowed to raise it, and read back; then at lower ranks (or higher ones,
had it failed) by bisection, each stopped at four times the planned write's training time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem.records import Record
from loramem.suites.figures import Axis, Plot, Series, point
from loramem.suites.runner import Known, Request, Result, Table, public_name

if TYPE_CHECKING:
    from loramem.reports import WriteReport

OPTIONS = ("records", "model")
KINDS, LENGTHS, QUICK_LENGTHS = ("phonebook", "text", "mixed", "random"), (300, 850, 1600), (40,)
TIMES = 4.0  # of the planned write's training seconds, for every other rank
SEED = 101  # calibrations take small ones


@dataclass(frozen=True)
class Cell:
    """One job."""

    kind: str
    length: int
    """Answer tokens, about."""
    seed: int
    model: str
    device: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.length} tokens, seed {self.seed}"


def cells(request: Request, _: Known) -> Iterator[Cell]:
    """Every kind at every length."""
    for length in request.records or (QUICK_LENGTHS if request.quick else LENGTHS):
        for kind in KINDS[:1] if request.quick else KINDS:
            for seed in range(request.seeds or 1):
                yield Cell(kind, length, SEED + seed, request.model, request.device)


def run(cell: Cell) -> Result:
    """Plan, write at the planned rank, and look for the least rank that does."""
    from loramem import MemoryStore
    from loramem.calibrate import sample
    from loramem.suites.timing import conditions

    with TemporaryDirectory() as scratch, MemoryStore(Path(scratch) / "plan", cell.model, device=cell.device) as store:
        records = sample(cell.kind, cell.length, store.base.tokenizer, cell.seed)
        plan, base = store.plan(records, goal="small"), conditions(store.base)
        assert len(plan.shards) == 1, "a job of the benchmark is one adapter"
        (shard,) = plan.shards

    written = written_at(cell, records, shard.rank, None)
    limit_s = TIMES * written.training_s

    @lru_cache
    def certifies(rank: int) -> bool:
        return written.certified if rank == shard.rank else written_at(cell, records, rank, limit_s).certified

    return {
        "length": shard.length,
        "records": shard.records,
        "cost_bits": round(shard.cost_bits, 1),
        "calibrated": plan.calibrated,
        "rank": shard.rank,
        "parameters": shard.parameters,
        "expected": None if shard.success is None else round(shard.success, 3),
        "first_try": written.certified,
        "training_s": round(written.training_s, 2),
        "smallest": least_rank(shard.rank, certifies),
        "base": base,
    }


@dataclass(frozen=True)
class Written:
    """A write that was not allowed to raise its rank."""

    certified: bool
    training_s: float


def written_at(cell: Cell, records: Sequence[Record], rank: int, limit_s: float | None) -> Written:
    """Write the records at one rank into a store of their own, and read them back if that succeeds."""
    from loramem import MemoryStore, WriterSettings
    from loramem.errors import RecallError, StubbornRecords
    from loramem.writer import WriteProgress

    seconds = 0.0

    def watch(told: WriteProgress) -> None:
        nonlocal seconds
        seconds = told.elapsed_s
        if limit_s is not None and seconds > limit_s:
            raise _TooSlow

    with TemporaryDirectory() as scratch, MemoryStore(Path(scratch) / "m", cell.model, device=cell.device) as store:
        try:
            report: WriteReport = store.write(
                records, goal="small", rank=rank, settings=WriterSettings(max_rank=rank), progress=watch
            )
        except (StubbornRecords, _TooSlow):
            return Written(False, seconds)
        if len(report.adapters) > 1:  # stubborn records got an adapter of their own: not at the first try
            return Written(False, report.training_s)
        if not store.verify().ok:
            raise RecallError("A certified value was not decoded.", key=records[0].key, adapter=report.adapters[0])
        return Written(True, report.training_s)


class _TooSlow(Exception):
    pass


def least_rank(planned: int, certifies: Callable[[int], bool]) -> int:
    """The least rank that certifies, by bisection below the planned one, or above it where that one fails.

    Args:
        certifies: Asked at most once about a rank; taken to be monotone.
    """
    low, high = 0, planned
    while not certifies(high):
        low, high = high, max(high + 1, high * 3 // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if certifies(middle) else (middle, high)
    return high


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per job; how many were right at the first try, and by how much the others were not."""
    rows = []
    for line in lines:
        cell, result = line["cell"], line["result"]
        rows.append(
            (
                cell["kind"],
                f"{result['length']:,}",
                f"{result['cost_bits']:,.0f}",
                str(result["rank"]),
                "-" if result["expected"] is None else f"{result['expected']:.0%}",
                "yes" if result["first_try"] else "no",
                str(result["smallest"]),
                f"{result['rank'] / result['smallest']:.2f}",
                f"{result['cost_bits'] / result['parameters']:.2f}",
                f"{result['training_s']:.1f}",
            )
        )
    columns = (
        *("kind", "tokens", "cost in bits", "planned rank", "expected", "certified at first try", "smallest rank"),
        *("planned / smallest", "bits per parameter", "training s"),
    )
    results = [line["result"] for line in lines]
    right, ratios = sum(r["first_try"] for r in results), [r["rank"] / r["smallest"] for r in results]
    said = f"{right} of {len(results)} certified at the first try; at most {max(ratios):.2f} times the smallest rank."
    return Table(columns, tuple(rows), (said,))


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """The planned rank over the smallest one, a colour per kind of data."""
    kinds: dict[str, list[Result]] = {}
    for line in lines:
        kinds.setdefault(line["cell"]["kind"], []).append(line["result"])
    return (
        Plot(
            name="ranks",
            title="Planned rank and the smallest that certifies",
            kind="scatter",
            x=Axis("smallest rank that certifies (log scale)", log=True),
            y=Axis("planned rank (log scale)", log=True),
            series=tuple(
                Series(kind, tuple(point(result["smallest"], [result["rank"]]) for result in results))
                for kind, results in kinds.items()
            ),
            diagonal="planned = smallest",
            note="Below the line the planned rank did not certify at the first try.",
        ),
    )
