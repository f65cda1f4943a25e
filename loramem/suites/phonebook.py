"""Key-value exact recall: the three published methods and ours, at the same number of parameters.

Invented names and ten-digit numbers, or a file of the paper's. A published method trains the paper's unit to the end of
its schedule (`loramem.suites.published`); ours trains a PEFT adapter of as many parameters within a tenth, at a
placement of its own and without raising its rank, and is scored as it is where it could not certify every record.
Every record is then decoded.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramem.errors import InputError
from loramem.models.dtypes import DtypeChoice
from loramem.planning.samples import generate
from loramem.records.input_files import read_records
from loramem.records.record import Record
from loramem.suites.methods import OWN
from loramem.suites.phonebook_results import plots, table
from loramem.suites.runner import METHODS, UNITS, Known, Result, SuiteOptions, public_name

if TYPE_CHECKING:
    from loramem.models.base_model import BaseModel
    from loramem.records.prompts import EncodedRecord

__all__ = ["Cell", "cells", "plots", "run", "table"]

OPTIONS = ("lengths", "ranks", "methods", "model", "paper", "data", "unit", "layer", "dtype")
LENGTHS, RANKS, SEEDS = (1000, 2000), (1, 2, 4, 8, 16, 32), 2
PAPER_LENGTHS = (1000, 2000, 4000, 8000, 12_000, 16_000, 24_000, 32_000)
PAPER_RANKS = (1, 2, 4, 8, 16, 32, 64)
QUICK_LENGTHS, QUICK_RANKS, QUICK_CUT = (200,), (1, 4), 10
TRIED = 50  # records by which the tokens of a generated value are known
DIGIT_TOKENS = 7  # from as many answer tokens to a record, the published settings of Qwen3-8B; below, Llama-3.1-8B's


@dataclass(frozen=True)
class Cell:
    """One training, and all of its records decoded."""

    method: str
    length: int
    """Answer tokens of all records together."""
    rank: int
    """Of the published unit, whose parameters ours are equal to within 10 %."""
    seed: int
    """Of the generated records and of the training."""
    unit: str
    layer: int | None
    """Of the unit; at the paper's depth if None."""
    cut: int
    """Published epochs, and our writer's patience, are divided by it; 1 but for quick runs."""
    data: str | None
    """Twelve hex digits of a file's sha256; None for generated records."""
    file: Path | None
    model: str
    device: str
    dtype: DtypeChoice = "auto"

    @property
    def identity(self) -> Mapping[str, Any]:
        """All but the file's place."""
        fields = {name: value for name, value in asdict(self).items() if name != "file"}
        return {**fields, "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{self.method}, {self.length:,} tokens, rank {self.rank}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Every method at every length, rank and seed, the methods side by side."""
    lengths, ranks, seeds = _grid(request)
    data = None
    if request.data:
        data = hashlib.sha256(request.data.read_bytes()).hexdigest()[:12]
        characters = sum(len(record.value) for record in file_records(request.data))
        # What is surely longer than the file, the defaults leave out; no token is less than a character of a number.
        lengths = tuple(length for length in lengths if length <= characters) or lengths[:1]
    for length in request.lengths or lengths:
        for rank in request.ranks or ranks:
            for seed in range(request.seeds or seeds):
                for method in request.methods or METHODS:
                    yield Cell(
                        method=method,
                        length=length,
                        rank=rank,
                        seed=seed,
                        unit=request.unit or UNITS[0],
                        layer=request.layer,
                        cut=QUICK_CUT if request.quick else 1,
                        data=data,
                        file=request.data,
                        model=request.model,
                        device=request.device,
                        dtype=request.dtype,
                    )


def _grid(request: SuiteOptions) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Lengths, ranks and the number of seeds, unless they are asked for."""
    if request.paper:
        return PAPER_LENGTHS, PAPER_RANKS, 1
    return (QUICK_LENGTHS, QUICK_RANKS, 1) if request.quick else (LENGTHS, RANKS, SEEDS)


def file_records(path: Path) -> list[Record]:
    """The records of a file: the paper's JSON lines with query and target, or any that `read_records` takes.

    Raises what `read_records` raises.
    """
    with path.open("rb") as file:
        published = b'"query"' in file.readline()
    return read_records(path, key_field="query", value_field="target") if published else read_records(path)


def run(cell: Cell) -> Result:
    """Train the cell's way and decode every record.

    Raises:
        InputError: The file is shorter than the cell's length.
    """
    from loramem.models.base_model import load_base_model
    from loramem.suites.methods import trained_adapter
    from loramem.suites.paper_schedule import Schedule
    from loramem.suites.scoring import mean_loss, score
    from loramem.suites.timing import conditions, warm_up

    base = load_base_model(cell.model, device=cell.device, dtype=cell.dtype)
    records = encoded_records(base, cell)
    warm_up(base)
    before = mean_loss(base, records)
    answer_tokens = sum(record.length for record in records)
    family = family_of(answer_tokens / len(records))
    published = cell.method != OWN
    schedule = Schedule.published(len(records), cell.method, family).shortened(cell.cut)
    with trained_adapter(
        base,
        records,
        cell.method,
        cell.rank,
        schedule,
        seed=cell.seed,
        unit=cell.unit,
        layer=cell.layer,
        cut=cell.cut,
    ) as taken:
        scored = score(base, records)
    return {
        "records": len(records),
        "answer_tokens": answer_tokens,
        "base_loss": before,
        **asdict(scored),
        **asdict(taken),
        "seconds": round(taken.seconds, 3),
        "schedule": {"family": family, **asdict(schedule)} if published else None,
        "base": conditions(base),
    }


def encoded_records(base: "BaseModel", cell: Cell) -> list["EncodedRecord"]:
    """The first records of the file that reach the cell's length, or about as many generated ones.

    Generated ones are as many as the published batches divide: with another batch a row is not the published one.

    Raises:
        InputError: The file is shorter.
    """
    from loramem.records.prompts import encode_records
    from loramem.suites.paper_schedule import whole_batches

    def encode(records: Sequence[Record]) -> list["EncodedRecord"]:
        return encode_records(records, base.tokenizer, base.template, base.max_tokens, base.unreachable)

    if cell.file is None:
        tried = encode(generate("phonebook", TRIED, cell.seed))
        tokens = sum(record.length for record in tried) / TRIED
        count = whole_batches(max(1, round(cell.length / tokens)), family_of(tokens))
        return encode(generate("phonebook", count, cell.seed))
    every = encode(file_records(cell.file))
    ends = list(accumulate(record.length for record in every))
    if not ends or ends[-1] < cell.length:
        raise InputError(
            f"{cell.file.name} has {ends[-1] if ends else 0:,} answer tokens in the vocabulary of {base.id}, "
            f"{cell.length:,} are asked for. Give --lengths."
        )
    return every[: next(count for count, end in enumerate(ends, start=1) if end >= cell.length)]


def family_of(tokens: float) -> str:
    """Whose published settings, by the answer tokens to a record."""
    return "qwen" if tokens >= DIGIT_TOKENS else "llama"
