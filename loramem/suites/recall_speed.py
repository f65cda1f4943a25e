"""Reading back: verify, recall and recall_many, against one ``model.generate`` per record on the same adapters.

All in one process on one store, decoded greedily with the same settings. The call per record is what the published
evaluation does; its seconds leave out loading adapters and looking up keys.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem.planning.samples import generate
from loramem.suites.figures import Axis, Plot, Series, point
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    from loramem import MemoryStore
    from loramem.index.rows import StoredRecord

OPTIONS = ("records", "model", "store", "every_record")
SAMPLE, QUICK_SAMPLE = 100, 5
VERIFY, MANY, GENERATE = "verify", "recall_many", "model.generate per record"
LOADED, ON_DISK = "recall, adapter loaded", "recall, adapter on disk"


@dataclass(frozen=True)
class Cell:
    """One store, read in every way."""

    records: int | None
    """Of the store to build; None when one is given."""
    seed: int
    model: str
    device: str
    store: str | None
    sample: int | None
    """Records recalled one at a time; None for all."""

    @property
    def identity(self) -> Mapping[str, Any]:
        store = None if self.store is None else public_name(self.store)
        return {**asdict(self), "model": public_name(self.model), "store": store}

    @property
    def title(self) -> str:
        return f"{self.store or f'a store of {self.records} records'}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """One per size and seed, or one for the store given."""
    sample = None if request.every_record else QUICK_SAMPLE if request.quick else SAMPLE
    sizes: Sequence[int | None] = request.records or ((10,) if request.quick else (1000,))
    store = None if request.store is None else str(request.store.resolve())
    for records in [None] if store else sizes:
        for seed in range(request.seeds or 1):
            yield Cell(records, seed, request.model, request.device, store, sample)


def run(cell: Cell) -> Result:
    """Build the store unless there is one, open it afresh, and time every way of reading it."""
    from loramem import MemoryStore
    from loramem.suites.timing import clock, conditions, warm_up

    with ExitStack() as stack:
        if cell.store is None:
            place = Path(stack.enter_context(TemporaryDirectory())) / "memory"
            assert cell.records
            with MemoryStore(place, cell.model, device=cell.device) as built:
                build_s: float | None = built.write(generate("phonebook", cell.records, cell.seed)).elapsed_s
        else:
            place, build_s = Path(cell.store), None
        store = stack.enter_context(MemoryStore(place, device=cell.device, create=False))
        warm_up(store.base)
        everything = list(store.records(None))
        count = len(everything) if cell.sample is None else min(cell.sample, len(everything))
        chosen = sorted(random.Random(cell.seed).sample(everything, count), key=lambda record: record.adapter)
        cold_s, warm_s = _recall_one_by_one(store, chosen)
        started = clock(store.base.device)
        recalled = sum(1 for namespace in {r.namespace for r in everything} for _ in store.recall_many(None, namespace))
        recall_many_s = clock(store.base.device) - started
        generate_s, generated_exact = _generate_one_by_one(store, chosen)
        verified = store.verify()
        return {
            "records": len(everything),
            "adapters": len(store.adapters()),
            "sample": count,
            "build_s": build_s,
            "verify_s": verified.elapsed_s,
            "exact": verified.exact,
            "generate_s": sum(generate_s) * len(everything) / count,
            "generate_call_s": generate_s,
            "generate_exact": generated_exact,
            "recall_many_s": recall_many_s,
            "recall_many_exact": recalled,
            "cold_s": cold_s,
            "warm_s": warm_s,
            "base": conditions(store.base),
        }


def _recall_one_by_one(store: "MemoryStore", records: Sequence["StoredRecord"]) -> tuple[list[float], list[float]]:
    """Seconds of each recall, grouped by adapter: the first of each loads and hashes it, the others find it there."""
    from loramem.suites.timing import clock

    cold: list[float] = []
    warm: list[float] = []
    for previous, record in zip([None, *records], records, strict=False):
        started = clock(store.base.device)
        store.recall(record.key, record.namespace)
        seconds = clock(store.base.device) - started
        (warm if previous and previous.adapter == record.adapter else cold).append(seconds)
    return cold, warm


def _generate_one_by_one(store: "MemoryStore", records: Sequence["StoredRecord"]) -> tuple[list[float], int]:
    """Seconds of one greedy ``generate`` per record, batch of one, adapter active already; and how many were exact."""
    from loramem.models.decoding import greedy_decode
    from loramem.records.prompts import decode_answer
    from loramem.suites.timing import clock

    seconds, exact = [], 0
    for record in records:
        model, prompt = store.load(record.key, record.namespace)
        started = clock(store.base.device)
        (ids,) = greedy_decode(model, [prompt], record.answer_tokens + 2, store.base.template.end_id)
        seconds.append(clock(store.base.device) - started)
        exact += record.holds(decode_answer(store.base.tokenizer, ids))
    return seconds, exact


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per way of reading, in the seconds that all records of the store take."""
    columns = ("store", "read by", "seconds", "records/s", "median ms", "p95 ms", "exact", "times verify")
    rows, notes = [], []
    for line in lines:
        result = line["result"]
        records, sample, verify_s = result["records"], result["sample"], result["verify_s"]
        of = _store(result)

        def row(
            way: str, seconds: float | None, exact: str, each: Sequence[float] = (), of: str = of, result: Any = result
        ) -> tuple[str, ...]:
            whole = ("-", "-", "-") if seconds is None else _whole(seconds, result)
            return (of, way, *whole[:2], *_milliseconds(each), exact, whole[2])

        rows += [
            row(VERIFY, verify_s, f"{result['exact']}/{records}"),
            row(MANY, result["recall_many_s"], f"{result['recall_many_exact']}/{records}"),
            row(
                GENERATE,
                result["generate_s"],
                f"{result['generate_exact']}/{sample}",
                result["generate_call_s"],
            ),
            row(LOADED, None, f"{len(result['warm_s'])}/{len(result['warm_s'])}", result["warm_s"]),
            row(ON_DISK, None, f"{len(result['cold_s'])}/{len(result['cold_s'])}", result["cold_s"]),
        ]
        if sample < records:
            notes.append(f"{of}: model.generate was called on {sample} of them; its seconds are scaled to all.")
    return Table(columns, tuple(rows), tuple(notes))


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Records per second by way of reading, a colour per store."""
    stores: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        ways = stores.setdefault(_store(line["result"]), {})
        for way, rate in _rates(line["result"]).items():
            ways.setdefault(way, []).append(rate)
    names = (VERIFY, MANY, GENERATE, LOADED, ON_DISK)
    return (
        Plot(
            name="rate",
            title="Reading back",
            kind="bar",
            x=Axis("read by"),
            y=Axis("records per second"),
            series=tuple(
                Series(store, tuple(point(names.index(way), rates) for way, rates in ways.items()))
                for store, ways in stores.items()
            ),
            names=names,
            note="One at a time (recall): by the median call. Of several seeds: their median and range.",
        ),
    )


def _store(result: Result) -> str:
    return f"{result['records']:,} records, adapters: {result['adapters']}"


def _rates(result: Result) -> dict[str, float]:
    """Records per second by every way of reading that was timed."""
    whole = {VERIFY: result["verify_s"], MANY: result["recall_many_s"], GENERATE: result["generate_s"]}
    each = {LOADED: result["warm_s"], ON_DISK: result["cold_s"]}
    return {
        **{way: result["records"] / seconds for way, seconds in whole.items()},
        **{way: 1 / median(seconds) for way, seconds in each.items() if seconds},
    }


def _whole(seconds: float, result: Result) -> tuple[str, str, str]:
    return f"{seconds:.2f}", f"{result['records'] / seconds:.0f}", f"{seconds / result['verify_s']:.1f}"


def _milliseconds(each: Sequence[float]) -> tuple[str, str]:
    if not each:
        return "-", "-"
    high = quantiles(each, n=20)[-1] if len(each) > 1 else each[0]
    return f"{1000 * median(each):.1f}", f"{1000 * high:.1f}"
