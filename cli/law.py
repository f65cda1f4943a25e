"""loramem law: what the calibration runs say, and what writes taught."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .output import note, print_json, print_markdown, print_text

if TYPE_CHECKING:
    from loramem.planning.law import MemoryLaw
    from loramem.planning.law_tables import FittedRuns
    from loramem.planning.plan import PlanInputs
    from loramem.planning.runs import Run
    from loramem.records.outcome import Outcome

LAST_WRITES = 10


@click.command("law")
@click.option("--kind", help="Only this kind of data.")
@click.option("--modules", help="Only this placement, such as down_proj.")
@click.option("--layers", help="Only these decoder layers, such as 4,5.")
@click.option("--model", envvar="LORAMEM_MODEL", show_envvar=True, help="Only this base model.")
@click.option("--points", is_flag=True, help="Also every point with its residual.")
@click.option("--plot", type=options.OutputPath(path_type=Path), help="Draw the one law chosen: .png, .svg or .pdf.")
@options.runs_option
@options.store_option
@options.json_option
def command(
    kind: str | None,
    modules: str | None,
    layers: str | None,
    model: str | None,
    points: bool,
    plot: Path | None,
    runs: Path | None,
    store: Path,
    as_json: bool,
) -> None:
    """Show the memory laws that the calibration runs give, and how they predict lengths that were left out.

    Runs are those that ship with loramem-tiny and yours. Then: what writes came to, which is what the success boundary
    is fitted to, with those of the store (./memory unless named).
    """
    from loramem.planning.runs import by_kind, default_file, read_runs, shipped_file

    paths = [runs] if runs else [shipped_file(), default_file()]
    found = [
        run
        for path in paths
        for run in read_runs(path)
        if (kind in (None, run.kind) and model in (None, run.conditions["base_model"]))
        and (modules is None or tuple(sorted(modules.split(","))) == run.modules)
        and (layers is None or layers == ",".join(map(str, run.layers)))
    ]
    if not found:
        raise click.UsageError(
            f"{' and '.join(map(str, paths))} hold no such calibration runs. Make some with loramem calibrate."
        )
    laws = show(by_kind(found), as_json=as_json, points=points)
    if plot is not None:
        from loramem.planning.plots import draw_law

        if len(laws) != 1:
            raise click.UsageError(f"--plot draws one law, not {len(laws)}: choose by --kind, --modules, --layers.")
        (one,) = laws
        draw_law(one.runs, one.law, one.name, plot)
    if not as_json:
        _show_boundaries(found)
        if (store / "store.json").exists():
            _show_writes(store)


def show(groups: "Iterable[tuple[str, list[Run]]]", *, as_json: bool, points: bool = False) -> "list[FittedRuns]":
    """The law of every group of runs; returns those that could be fitted."""
    from loramem.planning.law_tables import LAW_COLUMNS, fit_groups

    fitted, remarks = fit_groups(groups)
    for remark in remarks:
        note(remark)
    if as_json:
        print_json([_as_json(one) for one in fitted])
        return fitted
    print_markdown(LAW_COLUMNS, [one.row for one in fitted])
    for one in fitted if points else ():
        print_text(f"\n{one.name}\n")
        print_markdown(
            ("rank", "tokens", "base loss", "final loss", "ΔL", "ΔL of the law", "residual", "ordered %"),
            [_point_row(run, one.law) for run in sorted(one.runs, key=lambda run: (run.length, run.rank))],
        )
    return fitted


def _as_json(one: "FittedRuns") -> dict[str, object]:
    means = {"of_means": asdict(one.of_means)} if one.of_means else {}
    return {"name": one.name, "law": one.law.to_json(), "held_out_mape": one.held_out_mape, **means}


def _point_row(run: "Run", law: "MemoryLaw") -> tuple[str, ...]:
    measured, predicted = run.base_loss - run.final_loss, law.predict(run.rank, run.length)
    return (
        str(run.rank),
        f"{run.length:,}",
        f"{run.base_loss:.3f}",
        f"{run.final_loss:.3f}",
        f"{measured:.3f}",
        f"{predicted:.3f}",
        "saturated" if run.saturated else f"{measured - predicted:+.3f}",
        f"{100 * run.ordered:.1f}",
    )


def _show_boundaries(runs: "list[Run]") -> None:
    """The success boundary of every base model and placement with a law of random tokens, and how far it can be
    believed."""
    from loramem.errors import BoundaryError
    from loramem.planning import success
    from loramem.planning.calibration import outcomes_of, rank_law_of, trials_of
    from loramem.planning.runs import place_name

    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(place_name(run), []).append(run)
    rows, bins = [], []
    for name, members in groups.items():
        law = rank_law_of(members)
        if law is None:
            continue
        trials = trials_of([outcome for run in members for outcome in outcomes_of(run)], law)
        try:
            fitted, tested = success.fit(trials), success.reliability(trials)
        except BoundaryError as error:
            note(f"{name}: {error}")
            continue
        at_nine = fitted.rank_for(0.9, 1000.0) / 1000
        numbers = (f"{fitted.need:.2f}", f"{at_nine:.2f}", f"{fitted.steepness:.1f}", f"{tested.brier:.3f}")
        rows.append((name, str(fitted.trials), str(fitted.certified), *numbers))
        bins += [
            (name, f"{one.low:.1f}–{one.high:.1f}", str(one.count), f"{one.predicted:.2f}", f"{one.observed:.2f}")
            for one in tested.bins
        ]
    if rows:
        print_text("\nSuccess boundary: times the law's rank\n")
        columns = ("writes", "outcomes", "certified", "even odds", "nine of ten", "steepness", "Brier score")
        print_markdown(columns, rows)
        print_text("\nIts reliability, each outcome judged by a boundary fitted without it\n")
        print_markdown(("writes", "predicted", "outcomes", "mean predicted", "certified"), bins)


def _show_writes(store: Path) -> None:
    """The last writes of a store, and where they move its success boundary."""
    from loramem.planning import calibration

    with options.StoreOptions(store, None, "auto").open() as opened:
        outcomes, manifest = opened.outcomes(), opened.manifest
    if not outcomes:
        return
    known = calibration.load(manifest.fingerprint["weights"][:12])
    place = tuple(manifest.placement["modules"]), tuple(manifest.placement["layers"])
    before = calibration.plan_inputs(known, place, 1)
    after = calibration.plan_inputs(known, place, 1, outcomes=outcomes).boundary
    print_text(f"\nThe last writes of {store}\n")
    columns = ("rank", "tokens", "different", "cost in bits", "law's rank", "certified at this rank", "expected")
    print_markdown(columns, [_write_row(one, before) for one in outcomes[-LAST_WRITES:]])
    if before.boundary and after:
        print_text(
            f"\n{len(outcomes)} outcomes of this store move even odds from {before.boundary.need:.2f} to "
            f"{after.need:.2f} times the law's rank."
        )


def _write_row(one: "Outcome", inputs: "PlanInputs") -> tuple[str, ...]:
    from loramem.planning.success import crowded

    law_rank = inputs.law.rank(one.vocabulary).rank if inputs.law and one.vocabulary else None
    expected = None
    if inputs.boundary and law_rank is not None:
        in_shard = crowded(law_rank, one.length, one.parameters / one.rank)
        expected = inputs.boundary.probability(one.rank, in_shard)
    return (
        str(one.rank),
        f"{one.length:,}",
        "-" if one.vocabulary is None else f"{one.vocabulary:,.0f}",
        f"{one.cost_bits:,.0f}",
        "-" if law_rank is None else f"{law_rank:.2g}",
        "yes" if one.certified else "no",
        "-" if expected is None else f"{expected:.0%}",
    )
