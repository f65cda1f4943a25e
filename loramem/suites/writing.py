"""How the defaults of a write were chosen: ``python -m loramem.suites.writing SUITE``.

Every cell trains one adapter on the embedded base, is proved as a write is (saved form, greedy decoding), and becomes
one line of the results file; a cell that stands there already is not run again. The table is printed from the file.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from loramem import embedded
from loramem.adapters import AdaptedModel, serialize
from loramem.base_model import BaseModel, load_base_model
from loramem.errors import RecallError
from loramem.files import write_directory
from loramem.generators import KINDS, generate
from loramem.layers import decoder_layers
from loramem.placement import Placement
from loramem.processes import usable_cores
from loramem.prompts import encode_records
from loramem.recall import answer_probabilities, decode_records
from loramem.settings import WriterSettings
from loramem.writer import WriteProgress, train_adapter

MLP = ("down_proj", "gate_proj", "up_proj")
ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
BUDGET = 18_688  # parameters: rank 2 on all linear modules of the last two layers of loramem-tiny


@dataclass(frozen=True)
class Cell:
    """One adapter to be trained."""

    suite: str
    name: str
    kind: str
    records: int
    rank: int
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    settings: WriterSettings
    max_visits: int
    """Visits per record after which the cell is stopped and scored as it is."""

    @property
    def id(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class _Stopped(Exception):
    """The cell has used its visits."""


def placement_cells(base: BaseModel) -> Iterator[Cell]:
    """A hundred phone numbers in about the same number of parameters, placed differently."""
    layers = len(decoder_layers(base.model))
    places = {
        "all linear, last layer": (MLP + ATTENTION, (layers - 1,)),
        "all linear, last two layers": (MLP + ATTENTION, (layers - 2, layers - 1)),
        "all linear, last three layers": (MLP + ATTENTION, tuple(range(layers - 3, layers))),
        "all linear, all layers": (MLP + ATTENTION, tuple(range(layers))),
        "MLP, last two layers": (MLP, (layers - 2, layers - 1)),
        "attention, last two layers": (ATTENTION, (layers - 2, layers - 1)),
        "q and v, all layers": (("q_proj", "v_proj"), tuple(range(layers))),
        "down_proj, last two layers": (("down_proj",), (layers - 2, layers - 1)),
        "down_proj, layer 4 of 6 (the paper's depth)": (("down_proj",), (layers * 2 // 3,)),
    }
    for name, (modules, where) in places.items():
        per_rank = Placement(modules, where).parameters_per_rank(base.model)
        rank = max(1, round(BUDGET / per_rank))
        yield Cell("placement", name, "phonebook", 100, rank, modules, where, WriterSettings(batch_records=50), 120)


def default_cell(base: BaseModel, suite: str, name: str, kind: str, records: int, rank: int, **settings: Any) -> Cell:
    placement = Placement.default(base.model)
    return Cell(suite, name, kind, records, rank, placement.modules, placement.layers, WriterSettings(**settings), 200)


def objective_cells(base: BaseModel) -> Iterator[Cell]:
    """What the objective, its threshold and its curriculum are worth, at a low and a high density."""
    variants: dict[str, dict[str, Any]] = {
        "memft-sw, trained to 0.9 (default)": {},
        "memft-sw with curriculum": {"curriculum": True},
        "memft-sw, trained to 0.6": {"train_threshold": 0.6},
        "memft-ot, trained to 0.9": {"objective": "memft-ot"},
        "sft (plain cross-entropy)": {"objective": "sft"},
    }
    for seed in range(2):
        for name, settings in variants.items():
            yield default_cell(base, "objective", f"{name}, rank 16", "phonebook", 100, 16, seed=seed, **settings)
    for name, settings in variants.items():
        yield default_cell(base, "objective", f"{name}, rank 2", "phonebook", 200, 2, batch_records=50, **settings)


def kinds_cells(base: BaseModel) -> Iterator[Cell]:
    """Two hundred values of four kinds in the same 18,688 parameters: what the base does for writing."""
    for kind in KINDS:
        yield default_cell(base, "kinds", kind, kind, 200, 2, batch_records=50)


def start_cells(base: BaseModel) -> Iterator[Cell]:
    """What the start along the data's gradient and bfloat16 products are worth, for four kinds of value."""
    variants: dict[str, dict[str, Any]] = {
        "gradient, bfloat16 (default)": {"precision": "bfloat16"},
        "gradient, float32": {"precision": "float32"},
        "random, bfloat16": {"start": "random", "precision": "bfloat16"},
        "random, float32": {"start": "random", "precision": "float32"},
    }
    for kind in KINDS:
        for name, settings in variants.items():
            yield default_cell(base, "start", f"100 {kind}, {name}", kind, 100, 16, **settings)
    for name, settings in variants.items():
        yield default_cell(base, "start", f"200 phonebook, {name}", "phonebook", 200, 32, **settings)


def rate_cells(base: BaseModel) -> Iterator[Cell]:
    """Whether one relative rate serves every rank: a hundred phone numbers, for any base model."""
    for rank in (8, 16, 64):
        for rate in (0.02, 0.06, 0.18):
            yield default_cell(base, "rate", f"rank {rank}, rate {rate:g}", "phonebook", 100, rank, learning_rate=rate)


def width_cells(base: BaseModel) -> Iterator[Cell]:
    """What ranks near the width of the adapted modules are worth, where cost alone would plan one: on narrow bases."""
    placement = Placement.default(base.model)
    modules = len(placement.modules) * len(placement.layers)
    width = placement.parameters_per_rank(base.model) // (2 * modules)
    for records, seeds in ((100, 2), (200, 1)):
        for rank in (width // 4, width // 2, width):
            for seed in range(seeds):
                yield default_cell(
                    base, "width", f"{records} records, rank {rank}", "phonebook", records, rank, seed=seed
                )


def density_cells(base: BaseModel) -> Iterator[Cell]:
    """How rank, optimiser, objective, rate and batch trade seconds for parameters."""
    for rank in (32, 16, 8, 4, 2):
        for optimizer in ("adamw", "muon"):
            yield default_cell(
                base, "density", f"100 records, rank {rank}, {optimizer}", "phonebook", 100, rank, optimizer=optimizer
            )
    for rate in (0.03, 0.12):
        yield default_cell(base, "density", f"100 records, lr {rate:g}", "phonebook", 100, 16, learning_rate=rate)
    for batch in (5, 10, 50):
        yield default_cell(base, "density", f"100 records, batch {batch}", "phonebook", 100, 16, batch_records=batch)
    dense: dict[str, dict[str, Any]] = {
        "": {},
        ", batch 50": {"batch_records": 50},
        ", muon": {"optimizer": "muon"},
        ", sft": {"objective": "sft"},
        ", random start": {"start": "random"},
    }
    for name, settings in dense.items():
        yield default_cell(base, "density", f"400 records, rank 2{name}", "phonebook", 400, 2, **settings)
    yield default_cell(base, "density", "500 records, rank 2", "phonebook", 500, 2)
    yield default_cell(base, "density", "600 records, rank 2", "phonebook", 600, 2)


SUITES = {
    "placement": placement_cells,
    "objective": objective_cells,
    "kinds": kinds_cells,
    "start": start_cells,
    "density": density_cells,
    "rate": rate_cells,
    "width": width_cells,
}


def run_cell(base: BaseModel, cell: Cell) -> dict[str, Any]:
    """Train, save, reload, decode; the rank stays what the cell says."""
    records = encode_records(generate(cell.kind, cell.records), base.tokenizer, base.template, base.max_tokens)
    adapted, placement = AdaptedModel(base), Placement(tuple(sorted(cell.modules)), cell.layers)
    last: list[WriteProgress] = []

    def watch(progress: WriteProgress) -> None:
        last[:] = [progress]
        if progress.step * cell.settings.batch_records >= cell.max_visits * cell.records:
            raise _Stopped

    with adapted.disabled():
        base_probs = dict(answer_probabilities(base.model, records))
    cost_bits = sum(float((-probs[:-1].log2() - 1).clamp(min=0).sum()) for probs in base_probs.values())
    started = time.monotonic()
    with contextlib.suppress(_Stopped):
        train_adapter(adapted, "cell", records, cell.rank, placement, replace(cell.settings, max_rank=cell.rank), watch)
    training_s = time.monotonic() - started
    parameters = sum(tensor.numel() for tensor in adapted.weights("cell").values())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        write_directory(folder, serialize(adapted.weights("cell"), base, placement))
        adapted.remove("cell")
        adapted.load("saved", folder)
        probs = dict(answer_probabilities(base.model, records))
        groups = [list(range(start, min(start + 50, len(records)))) for start in range(0, len(records), 50)]
        decoded = dict(decode_records(base.model, records, groups))
    adapted.remove("saved")
    certified = [float(probs[i].min()) >= cell.settings.certify_threshold for i in range(len(records))]
    exact = [tuple(decoded[i]) == records[i].answer_ids[:-1] for i in range(len(records))]
    if not all(right for right, certain in zip(exact, certified, strict=True) if certain):
        raise RecallError(f"Cell {cell.name}: a certified record was not decoded.", key="", adapter="saved")
    return {
        "suite": cell.suite,
        "name": cell.name,
        "certified": sum(certified),
        "exact": sum(exact),
        "records": len(records),
        "ordered_tokens": round(
            sum(int((p > 0.5).sum()) for p in probs.values()) / sum(len(p) for p in probs.values()), 4
        ),
        "steps": last[0].step,
        "visits_per_record": round(last[0].step * cell.settings.batch_records / len(records), 1),
        "training_s": round(training_s, 1),
        "parameters": parameters,
        "cost_bits": round(cost_bits),
        "conditions": {
            "dtype": base.dtype,
            "device": base.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "base": base.fingerprint.weights[:12],
            "base_model": base.id,
        },
        "cell": cell.id,
    }


@click.command()
@click.argument("suite", type=click.Choice(list(SUITES)))
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("docs/results/writing.jsonl"), show_default=True
)
@click.option("--threads", type=int, default=usable_cores, show_default="all cores")
@click.option("--model", help="Base model: a Hub id or a local folder, in place of loramem-tiny.")
@click.option("--no-run", is_flag=True, help="Only print what is in the results file.")
def main(suite: str, results: Path, threads: int, model: str | None, no_run: bool) -> None:
    """Run the cells of SUITE that are not in the results file yet, and print the table."""
    torch.set_num_threads(threads)
    base = load_base_model(model or embedded.NAME)
    lines = map(json.loads, results.open()) if results.exists() else ()
    weights = base.fingerprint.weights[:12]
    done = {line["cell"]: line for line in lines if line["conditions"]["base"] == weights}
    cells = list(SUITES[suite](base))
    for cell in cells:
        if cell.id not in done and not no_run:
            done[cell.id] = run_cell(base, cell)
            with results.open("a") as file:
                file.write(json.dumps(done[cell.id]) + "\n")
            click.echo(json.dumps({k: v for k, v in done[cell.id].items() if k != "cell"}), err=True)
    click.echo("| cell | seed | rank | parameters | certified | exact | ordered tokens | steps | visits/record | s |")
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    for cell in (cell for cell in cells if cell.id in done):
        line = done[cell.id]
        click.echo(
            f"| {cell.name} | {cell.settings.seed} | {cell.rank} | {line['parameters']:,} "
            f"| {line['certified']}/{line['records']} | {line['exact']}/{line['records']} "
            f"| {line['ordered_tokens']:.1%} | {line['steps']} | {line['visits_per_record']} | {line['training_s']} |"
        )


if __name__ == "__main__":
    main()
