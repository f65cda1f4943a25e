"""What merging does to recall: adapters routed one at a time, beside the same ones merged into the base's weights.

A merge adds every adapter to the same weights, so that each answers through the sum of all; and weights in bfloat16
round what is added to them. Counted are records decoded exactly, greedily and free-running, end token included.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem.suites.runner import Known, Request, Result, Table, public_name

if TYPE_CHECKING:
    from loramem.prompts import EncodedRecord
    from loramem.suites.scoring import Score

OPTIONS = ("records", "model")
KIND = "phonebook"
ADAPTERS, RECORDS, SEEDS = (1, 2, 4, 8), (50,), 2
"""How many are merged together, and records of each."""
QUICK_ADAPTERS, QUICK_RECORDS = (1, 2), (3,)
SINGLE, HALF = "float32", "bfloat16"
WAYS = (
    ("routed", SINGLE, SINGLE),
    ("merged", SINGLE, SINGLE),
    ("routed", HALF, HALF),
    ("merged", SINGLE, HALF),
    ("merged", HALF, HALF),
)
"""What is done, the dtype it is done in, and that of the weights that answer."""


@dataclass(frozen=True)
class Cell:
    """Adapters of so many records each, merged by one, by two…"""

    kind: str
    records: int
    """Of each adapter."""
    adapters: tuple[int, ...]
    seed: int
    """Of the records and the training."""
    model: str
    device: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "adapters": list(self.adapters), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"up to {max(self.adapters)} adapters of {self.records} records, seed {self.seed}"


def cells(request: Request, _: Known) -> Iterator[Cell]:
    """One per number of records and seed."""
    adapters = QUICK_ADAPTERS if request.quick else ADAPTERS
    for records in request.records or (QUICK_RECORDS if request.quick else RECORDS):
        for seed in range(request.seeds or (1 if request.quick else SEEDS)):
            yield Cell(KIND, records, adapters, seed, request.model, request.device)


def run(cell: Cell) -> Result:
    """Write the largest number of adapters once; then decode their records in every way, of the first one, two…"""
    from loramem import MemoryStore
    from loramem.generators import generate
    from loramem.prompts import encode_records
    from loramem.settings import WriterSettings
    from loramem.suites.timing import conditions

    drawn, settings = generate(cell.kind, cell.records * max(cell.adapters), cell.seed), WriterSettings(seed=cell.seed)
    with TemporaryDirectory() as scratch, MemoryStore(Path(scratch) / "m", cell.model, device=cell.device) as store:
        base, groups = store.base, []
        for start in range(0, len(drawn), cell.records):
            records = drawn[start : start + cell.records]
            report = store.write(records, settings=settings)
            encoded = encode_records(records, base.tokenizer, base.template, base.max_tokens)
            groups.append((report.adapters, report.rank, encoded))
        checked = {
            dtype: {one.adapter: one for one in store.check((), dtype=dtype).certificates} for dtype in (SINGLE, HALF)
        }
        counts = []
        for many in cell.adapters:
            ids = [adapter for adapters, _, _ in groups[:many] for adapter in adapters]
            encoded = [one for _, _, group in groups[:many] for one in group]
            for way, dtype, answers in WAYS:
                if way == "routed":
                    checks = [checked[answers][adapter] for adapter in ids]
                    exact, lowest = sum(one.exact for one in checks), min(one.min_prob or 0.0 for one in checks)
                else:
                    folders = [store.path / "adapters" / adapter for adapter in ids]
                    found = merged(cell, folders, encoded, dtype, answers)
                    exact, lowest = found.exact, found.min_prob
                done = {"adapters": len(ids), "way": way, "done_in": dtype, "answers_in": answers}
                counts.append({**done, "records": len(encoded), "exact": exact, "min_prob": round(lowest, 4)})
        return {"ranks": sorted({rank for _, rank, _ in groups}), "counts": counts, "base": conditions(base)}


def merged(
    cell: Cell, folders: Sequence[Path], records: Sequence["EncodedRecord"], dtype: str, answers: str
) -> "Score":
    """Load the base in ``dtype``, merge the adapters as PEFT does, cast the sum to ``answers``, decode the records."""
    from peft import PeftModel

    from loramem.base_model import DTYPES, load_base_model
    from loramem.suites.scoring import score

    base = load_base_model(cell.model, device=cell.device, dtype=dtype)
    peft = PeftModel.from_pretrained(base.model, folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        peft.load_adapter(str(folder), adapter_name=str(number))
    names = [str(number) for number in range(len(folders))]
    base.model = peft.merge_and_unload(adapter_names=names).to(DTYPES[answers])
    return score(base, records)


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per number of adapters: records exact over all seeds, and the lowest p among them."""
    rows = []
    for records in sorted({line["cell"]["records"] for line in lines}):
        results = [line["result"] for line in lines if line["cell"]["records"] == records]
        counts = [count for result in results for count in result["counts"]]
        for adapters in sorted({count["adapters"] for count in counts}):
            same = [count for count in counts if count["adapters"] == adapters]
            rows.append((str(adapters), f"{records:,}", *(_cell(same, way) for way in WAYS)))
    columns = ("adapters", "records of each", *map(_name, WAYS))
    ranks = sorted({rank for line in lines for rank in line["result"]["ranks"]})
    note = (
        f"Records decoded exactly, of all seeds (lowest p). Ranks {', '.join(map(str, ranks))}. Routed: each "
        "adapter active alone, for its own records. Merged: all of them in the weights at once."
    )
    return Table(columns, tuple(rows), (note,))


def plots(_: Sequence[Mapping[str, Any]]) -> tuple[()]:
    """None: the table shows it."""
    return ()


def _cell(counts: Sequence[Mapping[str, Any]], way: tuple[str, str, str]) -> str:
    found = [count for count in counts if (count["way"], count["done_in"], count["answers_in"]) == way]
    exact, records = sum(count["exact"] for count in found), sum(count["records"] for count in found)
    return f"{exact:,}/{records:,} ({min(count['min_prob'] for count in found):.3f})"


def _name(way: tuple[str, str, str]) -> str:
    done, dtype, answers = way
    return f"{done}, {dtype}" if dtype == answers else f"{done} in {dtype}, cast to {answers}"
