"""Writes of every kind of value from the defaults, beside the engine that trains through the network.

Cells: a hundred records of four kinds, the eight domains of the scenarios suite, ``examples/values.jsonl`` and a text
of 1,000 tokens under one key (shorter where the context is), each written whole, twice. Through the network means a
store whose adapters begin at the last step of the ladder of placements, as all did once, proved in one dtype; it is
stopped after 1.5 times the seconds of the defaults. Where these leave a record, it is given ten minutes.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem.planning.samples import KINDS, generate
from loramem.records.input_files import read_records
from loramem.records.record import Record
from loramem.suites import scenarios
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    from loramem.models.base_model import BaseModel

OPTIONS = ("records", "model")
VALUES = Path(__file__).parents[2] / "examples" / "values.jsonl"
TEXT_TOKENS, FRAME_TOKENS = 1000, 24
"""Of the text, and of what else its context holds: the key, the template and the end token."""
DEFAULTS, NETWORK = "defaults", "through the network"
TIMES, CAP_S = 1.5, 600.0


@dataclass(frozen=True)
class Cell:
    """One write."""

    data: str
    """A kind of value, a domain of the scenarios, "values" or "text"."""
    records: int | None
    """None for all there are."""
    engine: str
    seed: int
    model: str
    device: str
    cap_s: float = CAP_S
    cpu_cap_s: float = CAP_S

    @property
    def identity(self) -> Mapping[str, Any]:
        """All but the caps, which follow from another cell's seconds."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("cap_s", "cpu_cap_s")}
        return {**fields, "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{public_name(self.model)}, {self.data}, {self.engine}, seed {self.seed} (at most {self.cap_s:.1f} s)"


def cells(request: SuiteOptions, known: Known) -> Iterator[Cell]:
    """Of each data the defaults first: the other engine's cap is a multiple of their seconds."""
    kinds = [(kind, size) for size in request.records or (100,) for kind in KINDS]
    data = [*kinds, *((domain, None) for domain in scenarios.DOMAINS), ("values", None), ("text", TEXT_TOKENS)]
    for name, records in [("phonebook", 3), ("text", 20)] if request.quick else data:
        for seed in range(request.seeds or 1):
            ours = Cell(name, records, DEFAULTS, seed, request.model, request.device)
            yield ours
            result = known(ours)
            caps = {"cap_s": TIMES * result["seconds"], "cpu_cap_s": TIMES * result["cpu_s"]}
            yield replace(ours, engine=NETWORK, **({} if result["failed"] else caps))


def records_of(cell: Cell, base: "BaseModel") -> list[Record]:
    """What a cell writes."""
    if cell.data == "text":
        from loramem.planning.long_text import long_text

        assert cell.records
        tokens = min(cell.records, base.max_tokens - FRAME_TOKENS)
        return [Record("text", long_text(base.tokenizer, tokens, 0.0, cell.seed))]
    if cell.data in KINDS:
        assert cell.records
        return generate(cell.data, cell.records, cell.seed)
    every = read_records(VALUES) if cell.data == "values" else scenarios.domain_records(cell.data)
    return every[: cell.records]


def run(cell: Cell) -> Result:
    """Write a cell's records, and decode them from the store opened anew."""
    from loramem import MemoryStore, WriterSettings

    from .whole_write import held, make_deep, timed_write

    with TemporaryDirectory() as scratch:
        place = Path(scratch) / "memory"
        if cell.engine == NETWORK:
            make_deep(place, cell.model, cell.device)
        with MemoryStore(place, cell.model, device=cell.device) as store:
            records, settings = records_of(cell, store.base), WriterSettings(seed=cell.seed)
            result = timed_write(store, records, cell.cap_s, settings, cpu_cap_s=cell.cpu_cap_s)
        return {**result, **held(place, cell.device)} if result["written"] else result


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per base model, data and seed, both engines side by side; what is not as it should be is named below."""
    columns = (
        *("base", "data", "seed", "certified", "exact", "lowest p", *TIMED, "steps", "rank", "adapters", "placement"),
        *("parameters", "through the network: certified", *TIMED, "steps", "times s", "times CPU s"),
    )
    pairs: dict[tuple[str, str, int], dict[str, Result]] = {}
    for line in lines:
        cell = line["cell"]
        pairs.setdefault((cell["model"], cell["data"], cell["seed"]), {})[cell["engine"]] = line["result"]
    whole = {name: pair for name, pair in pairs.items() if DEFAULTS in pair}
    rows = tuple((*map(str, name), *_ours(pair[DEFAULTS]), *_theirs(pair)) for name, pair in whole.items())
    notes = (
        "s: the whole write, the proof in every dtype included; the other engine proves in one. Times: what that takes "
        "over what the defaults take.",
        *(f"{', '.join(map(str, name))}: {note}." for name, pair in whole.items() for note in _remarks(pair)),
    )
    return Table(columns, rows, notes)


TIMED = ("s", "CPU s", "of it training")


def plots(_: Sequence[Mapping[str, Any]]) -> tuple[()]:
    """None: the table shows it better."""
    return ()


def _timed(result: Result) -> tuple[str, ...]:
    return tuple(f"{result[name]:.2f}" for name in ("seconds", "cpu_s", "training_cpu_s"))


def _certified(result: Result) -> str:
    return f"{result['written']}/{result['records'] - len(result['refused'])}"


def _ours(result: Result) -> tuple[str, ...]:
    from .whole_write import placed, span

    if not result["written"]:
        return (_certified(result), "0/0", "-", *_timed(result), *["-"] * 5)
    return (
        _certified(result),
        f"{result['exact']}/{result['written']}",
        ", ".join(f"{value:.3f}" for value in result["min_prob"].values()),
        *_timed(result),
        str(result["steps"]),
        span(result["ranks"]),
        str(result["adapters"]),
        placed(result),
        f"{result['parameters']:,}",
    )


def _theirs(pair: Mapping[str, Result]) -> tuple[str, ...]:
    ours, theirs = pair[DEFAULTS], pair.get(NETWORK)
    if theirs is None:
        return ("-",) * 7
    more = "" if theirs["written"] else "> "
    times = (f"{more}{theirs[name] / ours[name]:.1f}" for name in ("seconds", "cpu_s"))
    return (_certified(theirs), *_timed(theirs), str(theirs.get("steps", "-")), *times)


def _remarks(pair: Mapping[str, Result]) -> Iterator[str]:
    ours, theirs = pair[DEFAULTS], pair.get(NETWORK)
    if ours["refused"]:
        reasons = sorted(set(ours["refused"].values()))
        yield f"{len(ours['refused'])} of {ours['records']} records refused ({', '.join(reasons)})"
    if ours["error"]:
        yield f"nothing committed ({ours['error']})"
    elif ours["failed"]:
        yield f"not certified: {', '.join(map(repr, ours['failed']))}"
    if ours["written"] and ours["exact"] != ours["written"]:
        yield f"decoded exactly: {ours['exact']} of {ours['written']}"
    if theirs and theirs["written"] >= max(ours["written"], 1):
        for name, unit in (("seconds", "s"), ("cpu_s", "CPU s")):
            if theirs[name] < ours[name]:
                yield f"through the network it took {theirs[name]:.2f} {unit}, less than {ours[name]:.2f}"


if __name__ == "__main__":
    from .command import command

    sys.exit(command("tests.benchmarks.write_grid", "write-grid.jsonl")())
