"""The life of a large store: growth in writes of a thousand, updates, deletions, compaction, erased values, opening it.

An erased value is asked for as a thief would who has the adapter that its neighbours were written anew into: among 99
fresh values of its form, ordered by how likely that adapter makes each for the erased key, its place must be any.
"""

import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem._util.files import size_bytes
from loramem.planning.samples import generate
from loramem.records.record import Record
from loramem.suites.figures import Axis, Plot, Series, point
from loramem.suites.runner import Known, Result, SuiteOptions, Table, peak_memory_mb, public_name

if TYPE_CHECKING:
    from loramem import MemoryStore

OPTIONS = ("records", "model")
RECORDS, QUICK_RECORDS = (10_000,), (40,)
WRITES = 10
"""Of as many records each, in which the store grows."""
ERASED, FRESH = 100, 99
OPENINGS, WARM, LOOKUPS = 3, 100, 1000
"""New processes of either kind, in turn; recalls from a loaded adapter; keys looked up."""
OPENING = """
import sys, time; started = time.monotonic()
from loramem import MemoryStore
store = MemoryStore(sys.argv[1], create=False, device=sys.argv[2])
store.recall(sys.argv[3])
print(time.monotonic() - started)
"""
PLAIN = """
import sys, time; started = time.monotonic()
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(sys.argv[2]), sys.argv[3])
prompt = tokenizer(sys.argv[4], return_tensors="pt").to(sys.argv[2])
model.generate(**prompt, do_sample=False, max_new_tokens=16)
print(time.monotonic() - started)
"""


@dataclass(frozen=True)
class Cell:
    """One store."""

    records: int
    """Phone numbers; a tenth of them are updated, another tenth deleted."""
    seed: int
    model: str
    device: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{self.records:,} records, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """One life per number of records and seed."""
    for records in request.records or (QUICK_RECORDS if request.quick else RECORDS):
        for seed in range(request.seeds or 1):
            yield Cell(records, seed, request.model, request.device)


def run(cell: Cell) -> Result:
    """Grow, change and compact a store, and hold every answer against what was written."""
    from loramem import MemoryStore
    from loramem.suites.timing import clock, conditions, warm_up

    rng = random.Random(cell.seed)
    drawn = generate("phonebook", cell.records + cell.records // 10, cell.seed)
    records, spare = drawn[: cell.records], [record.value for record in drawn[cell.records :]]
    with TemporaryDirectory() as folder:
        place = Path(folder) / "memory"
        with MemoryStore(place, cell.model, device=cell.device) as store:
            warm_up(store.base)
            growth = list(_grow(store, records))
            live = {record.key: record.value for record in records}
            chosen = rng.sample(sorted(live), 2 * (cell.records // 10))
            updated, deleted = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
            fresh = dict(zip(updated, spare, strict=False))
            started = clock(store.base.device)
            store.write([Record(key, value) for key, value in fresh.items()], on_conflict="replace")
            update_s = clock(store.base.device) - started
            started = clock(store.base.device)
            store.delete(deleted)
            delete_s = clock(store.base.device) - started
            lost = {key: live.pop(key) for key in deleted}
            live.update(fresh)
            before_mb = size_bytes(place) / 2**20
            compacted = store.compact(which="all")
            store.gc(grace_s=0)
            recalled = {recall.key: recall.value for recall in store.recall_many()}
            verified = store.verify()
            erased = rng.sample(sorted(lost), min(ERASED, len(lost)))
            others = [record.value for record in generate("phonebook", FRESH * len(erased), cell.seed + 1)]
            ranks = _ranks(store, records, {key: lost[key] for key in erased}, others)
            return {
                "growth": growth,
                "update_s": update_s,
                "delete_s": delete_s,
                "compact_s": compacted.elapsed_s,
                "adapters": len(store.adapters()),
                "before_compaction_mb": before_mb,
                "size_mb": size_bytes(place) / 2**20,
                "live": len(live),
                "exact": sum(recalled.get(key) == value for key, value in live.items()),
                "wrong": sum(live.get(key) != value for key, value in recalled.items()),
                "deleted_known": sum(key in store or key in recalled for key in deleted),
                "verified": verified.exact,
                "damaged": len(verified.damaged),
                "erased_ranks": ranks,
                **_opening(store, sorted(live), cell.device, rng),
                "base": conditions(store.base),
            }


def _grow(store: "MemoryStore", records: Sequence[Record]) -> Iterator[Result]:
    """`WRITES` of as many records each."""
    from loramem.suites.timing import clock

    step = max(1, len(records) // WRITES)
    for first in range(0, len(records), step):
        some = records[first : first + step]
        started = clock(store.base.device)
        report = store.write(some)
        seconds = clock(store.base.device) - started
        yield {
            "records": store.stats().records,
            "seconds": seconds,
            "visits": report.visits,
            "size_mb": size_bytes(store.path) / 2**20,
            "peak_memory_mb": peak_memory_mb(),
        }


def _ranks(
    store: "MemoryStore", records: Sequence[Record], erased: Mapping[str, str], fresh: Sequence[str]
) -> list[int]:
    """Place of each erased value, from 1, among itself and fresh ones, by the likelihood of its whole answer.

    The adapter is the one that now holds the record that was written next to it. Each is held against `FRESH` values
    of its own: an adapter likes some values better than others whatever the key, so that places among the same ones
    would hang together, and no test of uniformity would hold.
    """
    from loramem.models.decoding import answer_probabilities
    from loramem.records.prompts import encode_record

    held, keys = {record.key: record.adapter for record in store.records()}, [record.key for record in records]
    ranks = []
    for number, (key, value) in enumerate(erased.items()):
        place = keys.index(key)
        neighbour = next(other for other in [*keys[place + 1 :], *reversed(keys[:place])] if other in held)
        model, _ = store.load(neighbour)
        template = store.manifest.template()
        values = value, *fresh[number * FRESH : (number + 1) * FRESH]
        encoded = [encode_record(Record(key, each), store.base.tokenizer, template) for each in values]
        scores = {index: float(probs.log().sum()) for index, probs in answer_probabilities(model, encoded)}
        ranks.append(1 + sum(scores[index] > scores[0] for index in range(1, len(encoded))))
    return ranks


def _opening(store: "MemoryStore", keys: Sequence[str], device: str, rng: random.Random) -> Result:
    """Seconds of one recall in a new process beside plain PEFT, of warm recalls, and of looking a key up."""
    from loramem.suites.timing import clock

    key = rng.choice(keys)
    adapter = store.path / "adapters" / next(record.adapter for record in store.records() if record.key == key)
    where = str(store.base.device)
    ours, plain = [], []
    for _ in range(OPENINGS):
        ours.append(_seconds(OPENING, str(store.path), device, key))
        plain.append(_seconds(PLAIN, str(store.base.folder), where, str(adapter), key))
    store.recall(key)
    warm, lookups = [], []
    for _ in range(WARM):
        started = clock(store.base.device)
        store.recall(key)
        warm.append(clock(store.base.device) - started)
    for other in rng.choices(keys, k=LOOKUPS):
        started = clock(store.base.device)
        assert other in store
        lookups.append(clock(store.base.device) - started)
    return {
        "open_s": median(ours),
        "plain_s": median(plain),
        "warm_recall_ms": 1000 * median(warm),
        "lookup_ms": 1000 * median(lookups),
    }


def _seconds(program: str, *arguments: str) -> float:
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per write of the growth; the rest as notes."""
    from scipy.stats import kstest

    columns = ("store", "records", "ms/record", "visits/record", "disk bytes/record", "peak MB")
    rows, notes = [], []
    for line in lines:
        result, records = line["result"], line["cell"]["records"]
        before = 0
        for write in result["growth"]:
            new = write["records"] - before
            rows.append(
                (
                    f"{records:,}, seed {line['cell']['seed']}",
                    f"{write['records']:,}",
                    f"{1000 * write['seconds'] / new:.1f}",
                    f"{write['visits'] / new:.1f}",
                    f"{write['size_mb'] * 2**20 / write['records']:,.0f}",
                    f"{write['peak_memory_mb']:,.0f}",
                )
            )
            before = write["records"]
        changed = records // 10
        notes.append(
            f"{changed:,} updates took {result['update_s']:.1f} s, {changed:,} deletions {result['delete_s']:.2f} s, "
            f"compaction of all {result['live']:,} live records {result['compact_s']:.0f} s "
            f"({result['before_compaction_mb']:.1f} MB before, {result['size_mb']:.1f} MB after; {result['adapters']} "
            f"adapters). Then {result['exact']:,} of {result['live']:,} live records exact, {result['wrong']} wrong, "
            f"{result['deleted_known']} of {changed:,} deleted ones known, {result['damaged']} files or rows damaged."
        )
        ranks = result["erased_ranks"]
        # Places are whole numbers: a draw within each makes them continuous, as the test wants them.
        rng = random.Random(0)
        uniform = kstest([(rank - rng.random()) / (FRESH + 1) for rank in ranks], "uniform")
        notes.append(
            f"Places of {len(ranks)} erased values among {FRESH} fresh ones each: mean "
            f"{sum(ranks) / len(ranks):.1f} (uniform: {(FRESH + 2) / 2:.1f}), {ranks.count(1)} first; "
            f"Kolmogorov-Smirnov against uniform: D = {uniform.statistic:.3f}, p = {uniform.pvalue:.2f}."
        )
        notes.append(
            f"One recall in a new process {result['open_s']:.2f} s, plain transformers and PEFT "
            f"{result['plain_s']:.2f} s (medians of {OPENINGS}); warm {result['warm_recall_ms']:.1f} ms; a key looked "
            f"up in {result['lookup_ms']:.3f} ms."
        )
    return Table(columns, tuple(rows), tuple(notes))


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Time per record as stores grow."""
    times: dict[int, list[float]] = {}
    for line in lines:
        before = 0
        for write in line["result"]["growth"]:
            times.setdefault(write["records"], []).append(1000 * write["seconds"] / (write["records"] - before))
            before = write["records"]
    return (
        Plot(
            name="growth",
            title="Time per record as a store grows",
            kind="line",
            x=Axis("records in the store"),
            y=Axis("milliseconds per record"),
            series=(Series("a write of a tenth", tuple(point(size, some) for size, some in sorted(times.items()))),),
            note="Medians, and the range over stores.",
        ),
    )
