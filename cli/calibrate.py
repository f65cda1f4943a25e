"""loramem calibrate: the runs that the memory law is fitted to."""

import math
from pathlib import Path

import click

from loramem.planning.runs import KINDS, Run
from loramem.training.settings import OBJECTIVES, ObjectiveName

from . import options
from .law import show
from .output import note
from .workers import WorkerOptions, waited_workers_options


@click.command("calibrate")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    help="Phone numbers; or one long text, as it is, with 20, 40 (mixed), 60, 80 % or only random tokens.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Records of your own, in place of a kind.",
)
@click.option("--ranks", type=options.Numbers(), help="In place of 1,2,3,4,6.")
@click.option(
    "--lengths", type=options.Numbers(), help="Answer tokens; chosen by the size of the placement unless given."
)
@click.option(
    "--modules", help="Linear modules that carry the adapter, such as down_proj; the store's default unless given."
)
@click.option("--layers", help="Their decoder layers, counted from 0, such as 4 or 4,5.")
@click.option("--budget-minutes", type=click.FloatRange(0, min_open=True), help="Begin no run that would end later.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="In place of 0.06; 0.2 for one module.")
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="sft",
    show_default=True,
    help="sft: cross-entropy to convergence, for the law. Otherwise writes at a fixed rank, for the success boundary.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--save", type=options.OutputPath(path_type=Path, dir_okay=False), help="Where to keep what was learnt; your cache."
)
@options.input_options
@options.runs_option
@options.model_options
@waited_workers_options
def command(
    kind: str | None,
    data: Path | None,
    ranks: tuple[int, ...] | None,
    lengths: tuple[int, ...] | None,
    modules: str | None,
    layers: str | None,
    budget_minutes: float | None,
    learning_rate: float | None,
    objective: ObjectiveName,
    seed: int,
    save: Path | None,
    runs: Path | None,
    model: str | None,
    device: str,
    as_json: bool,
    fields: options.InputOptions,
    workers: WorkerOptions,
) -> None:
    """Train adapters of several ranks on answers of several lengths, and fit the memory law to them.

    Without options of its own it makes what a first write makes, in about a minute: phone numbers and random tokens
    where writes begin. With any of them, the grid that they name. Every run is kept as it is done; running again goes
    on where it stopped. What the runs say of the base model is kept too, and plans use it. Workers make the runs of a
    length each.
    """
    from loramem import embedded
    from loramem.models.adapters import AdaptedModel
    from loramem.models.base_model import load_base_model
    from loramem.planning.base_calibration import BUDGET_S, calibrate_base
    from loramem.planning.calibrate import (
        RANKS,
        CalibrationGrid,
        bare_calibration,
        calibrate,
        default_lengths,
        default_rate,
    )
    from loramem.planning.calibrate_elsewhere import calibrate_base_there, calibrate_there
    from loramem.planning.calibration import cached, summarise
    from loramem.planning.runs import LAW_OBJECTIVE, by_kind, default_file, read_runs, shipped_file
    from loramem.training.jobs import JobBase

    base = load_base_model(model or embedded.NAME, device=device)
    if not any((kind, data, ranks, lengths, modules, layers, learning_rate, seed, save)) and objective == LAW_OBJECTIVE:
        most_s = 60 * budget_minutes if budget_minutes else BUDGET_S
        with workers.executor() as executor:
            if executor is None:
                calibrate_base(AdaptedModel(base), runs, budget_s=most_s)
            else:
                calibrate_base_there(JobBase.of(base, device), runs, executor, budget_s=most_s)
        mine = [run for run in read_runs(runs or default_file()) if run.conditions["base_model"] == base.id]
        show(by_kind([run for run in mine if run.over_features]), as_json=as_json)
        return
    kind = kind or "phonebook"
    place, records = options.placement(base.model, modules, layers), []
    if data is not None:
        kind = data.name
        records = fields.read(data)
    grid = CalibrationGrid(
        kind,
        place,
        lengths or default_lengths(base, kind, place, objective, records),
        ranks or RANKS,
        seed,
        learning_rate or default_rate(place),
        objective,
        tuple(records),
    )
    path = runs or default_file()
    most_s = 60 * budget_minutes if budget_minutes else math.inf

    def tell(run: Run, left_s: float) -> None:
        note(
            f"rank {run.rank}, {run.length} tokens: {run.base_loss:.3f} → {run.final_loss:.3f} nats per token "
            f"({run.steps} steps, {run.elapsed_s:.0f} s; the others at most {left_s / 60:.0f} min)"
        )

    with workers.executor() as executor:
        if executor is None:
            made = calibrate(base, grid, path, budget_s=most_s, progress=tell)
        else:
            made = calibrate_there(JobBase.of(base, device), grid, path, executor, budget_s=most_s, progress=tell)
    # What replaces the shipped calibration must hold what that one holds; a file of its own says what its runs say.
    ours = [] if save else read_runs(shipped_file())
    known = summarise(bare_calibration(base), {run.identity: run for run in [*ours, *read_runs(path)]}.values())
    known.save(save or cached(known.base_weights))
    show(by_kind(made), as_json=as_json)
