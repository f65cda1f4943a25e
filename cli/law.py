"""loramem law: what the calibration runs say."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .output import note, print_json, print_markdown

if TYPE_CHECKING:
    from loramem.calibrate import Run
    from loramem.law import Point


@click.command("law")
@options.runs_option
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def command(runs: Path | None, as_json: bool) -> None:
    """Show the memory laws that the calibration runs give, and how they predict lengths that were left out."""
    from loramem.calibrate import default_file, read_runs

    path = runs or default_file()
    found = read_runs(path)
    if not found:
        raise click.UsageError(f"{path} holds no calibration runs. Make some with loramem calibrate.")
    show(found, as_json)


def _within(length: float, point: "Point") -> bool:
    return point.length <= length


def show(runs: "list[Run]", as_json: bool) -> None:
    """The law of every base model, placement and kind among the runs."""
    from loramem.calibrate import by_kind
    from loramem.errors import LawError
    from loramem.law_fit import fit, held_out

    rows, laws = [], []
    for name, members in by_kind(runs):
        points = [run.point for run in members]
        try:
            fitted = fit(points)
        except LawError as error:
            note(f"{name}: {error}")
            continue
        try:
            unseen = f"{held_out(points, partial(_within, max(fitted.length_range) / 2)).mape:.1f}"
        except LawError:
            unseen = "-"
        laws.append({"name": name, "law": fitted.to_json(), "held_out_mape": unseen})
        rows.append(
            (
                name,
                f"{fitted.C:.4g}",
                f"{fitted.alpha:.3f}",
                f"{fitted.beta:.3f}",
                f"{fitted.b:.3f}",
                f"{fitted.r_squared:.4f}",
                f"{fitted.mape:.1f}",
                unseen,
                str(fitted.points),
                str(fitted.dropped),
            )
        )
        for warning in fitted.warnings:
            note(f"{name}: {warning}")
    if as_json:
        print_json(laws)
        return
    columns = ("runs", "C", "α", "β", "b", "R²", "MAPE %", "MAPE % beyond half the lengths", "points", "saturated")
    print_markdown(columns, rows)
