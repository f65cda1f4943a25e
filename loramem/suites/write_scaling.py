"""Whether writing stays linear in the number of records: seconds per record and peak memory from 100 to 4,000."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loramem.suites import write_speed
from loramem.suites.figures import Axis, Plot, Series, point
from loramem.suites.runner import Known, Result, SuiteOptions, Table

OPTIONS = ("records", "model")


def cells(request: SuiteOptions, _: Known) -> Iterator[write_speed.Cell]:
    """One write per number of records."""
    for records in request.records or ((5, 10) if request.quick else (100, 1000, 4000)):
        for seed in range(request.seeds or 1):
            yield write_speed.Cell(write_speed.OURS, records, seed, request.model, request.device, request.quick)


def run(cell: write_speed.Cell) -> Result:
    """Write the cell's records into a fresh store."""
    return write_speed.run(cell)


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per write."""
    columns = (
        *("records", "seed", "seconds", "ms/record", "steps", "visits/record", "adapters", "rank", "parameters"),
        *("exact", "lowest p", "loaded MB", "peak MB"),
    )
    rows = []
    for line in lines:
        result = line["result"]
        rows.append(
            (
                str(result["records"]),
                str(line["cell"]["seed"]),
                f"{result['seconds']:.2f}",
                f"{1000 * result['seconds'] / result['records']:.1f}",
                f"{result['steps']:,}",
                f"{result['visits_per_record']:.1f}",
                str(result["adapters"]),
                str(result["rank"]),
                f"{result['parameters']:,}",
                f"{result['exact']}/{result['records']}",
                f"{result['min_prob']:.3f}",
                f"{result['loaded_memory_mb']:,.0f}",
                f"{result['peak_memory_mb']:,.0f}",
            )
        )
    return Table(columns, tuple(rows))


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Time per record and memory over the number of records, where there are several numbers."""
    sizes: dict[int, list[Result]] = {}
    for line in sorted(lines, key=lambda line: int(line["result"]["records"])):
        sizes.setdefault(line["result"]["records"], []).append(line["result"])
    if len(sizes) < 2:
        return ()

    def series(name: str, measure: Callable[[Result], float]) -> Series:
        return Series(name, tuple(point(size, list(map(measure, results))) for size, results in sizes.items()))

    records, note = Axis("records (log scale)", log=True), "Medians, and the range over seeds."
    return (
        Plot(
            name="time",
            title="Time per record",
            kind="line",
            x=records,
            y=Axis("milliseconds per record"),
            series=(series("whole write", lambda result: 1000 * result["seconds"] / result["records"]),),
            note=note,
        ),
        Plot(
            name="memory",
            title="Peak memory of the process",
            kind="line",
            x=records,
            y=Axis("MiB"),
            series=(
                series("at its peak", lambda result: result["peak_memory_mb"]),
                series("base model loaded, before the write", lambda result: result["loaded_memory_mb"]),
            ),
            note=note,
        ),
    )
