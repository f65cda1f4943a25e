"""Laws where writes begin: by kind and base model, what they say of lengths and ranks that were left out, and whether
parameters in place of ranks put two base models on one law. Runs are made by ``loramem calibrate``; none is made here.

    loramem calibrate --kind KIND --modules down_proj --layers LAST --lengths … --ranks … \
        --runs docs/results/laws-last-layer.jsonl
    python -m tests.benchmarks.last_layer_laws [--figure docs/figures/laws-last-layer.png]
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy
from loramem_cli.output import print_markdown
from scipy.optimize import least_squares

from loramem.errors import LawError
from loramem.planning.law import Point
from loramem.planning.law_fit import fit, held_out, means_agreement, unsaturated
from loramem.planning.runs import KINDS, MIXTURES, Run, read_runs
from loramem.suites.figures import Axis, Plot, Series, draw, point
from loramem.suites.memory_law import PUBLISHED

RUNS = Path("docs/results/laws-last-layer.jsonl")
NOTHING = "-"
Group = dict[tuple[str, str], list[Run]]
"""Runs by kind and base model."""


def groups(runs: Sequence[Run]) -> Group:
    """In the order of the kinds."""
    found: Group = {}
    for run in sorted({run.identity: run for run in runs}.values(), key=lambda run: KINDS.index(run.kind)):
        found.setdefault((run.kind, str(run.conditions["base_model"])), []).append(run)
    return found


def law_row(kind: str, base: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """A law, with what it says of the longer half of the lengths and of the highest rank when it was fitted without
    them; of several texts the means."""
    points = [run.point for run in runs]
    try:
        law = fit(points)
    except LawError:
        kept = unsaturated(points)
        ranks = ", ".join(str(rank) for rank in sorted({int(one.rank) for one in kept}))
        counts = (str(len(kept)), str(len(points) - len(kept)))
        return (kind, base, *[NOTHING] * 8, *counts, f"above 0.69 nats at rank {ranks} only")
    half, top = law.length_range[1] / 2, law.rank_range[1]
    means, published = means_agreement(law, points), PUBLISHED.get(kind, ())
    remarks = [] if means is None else [f"means of texts: R² {means.r_squared:.4f}, MAPE {means.mape:.1f}"]
    remarks += ["paper: " + "; ".join(f"{r2:.3f}, {mape:.1f}" for r2, mape in published)] if published else []
    return (
        *(kind, base, f"{law.C:.1f}", f"{law.alpha:.3f}", f"{law.beta:.3f}", f"{law.b:.2f}"),
        *(f"{law.r_squared:.4f}", f"{law.mape:.1f}"),
        *(_beyond(points, lambda one: one.length <= half), _beyond(points, lambda one: one.rank < top)),
        *(str(law.points), str(law.dropped), "; ".join(remarks)),
    )


def _beyond(points: Sequence[Point], keep: Callable[[Point], bool]) -> str:
    try:
        return f"{held_out(points, keep).mape:.1f}"
    except LawError:
        return NOTHING


def joint_rows(found: Group) -> list[tuple[str, ...]]:
    """What one law makes of a kind on several base models, by what stands for its r and whether b is each base's."""
    rows = []
    for kind in KINDS:
        bases = {base: unsaturated_runs(runs) for (one, base), runs in found.items() if one == kind}
        bases = {base: runs for base, runs in bases.items() if len(runs) > 4 and len({run.rank for run in runs}) > 1}
        if len(bases) < 2:
            continue
        numbers = [_joint(list(bases.values()), size, own) for own in (False, True) for size in (_rank, _parameters)]
        rows.append((kind, *numbers, _worth(*list(bases.values())[:2])))
    return rows


def combined_rows(found: Group) -> list[tuple[str, ...]]:
    """What one law makes of all long texts of a base model, with one b and with b by kind."""
    rows = []
    for base in dict.fromkeys(base for _, base in found):
        mixtures = [unsaturated_runs(runs) for (kind, one), runs in found.items() if one == base and kind in MIXTURES]
        if len(mixtures) > 1:
            numbers = [_joint(mixtures, _rank, own) for own in (False, True)]
            rows.append((base, str(sum(map(len, mixtures))), *numbers))
    return rows


def unsaturated_runs(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if not run.saturated]


def _rank(run: Run) -> float:
    return run.rank


def _parameters(run: Run) -> float:
    return run.parameters / 1000


def _joint(groups: Sequence[Sequence[Run]], size: Callable[[Run], float], own: bool) -> str:
    """R² and MAPE of ΔL = C·s^α·ℓ^(−β) + b over all groups, b one for all or each group's own."""
    runs = [(number if own else 0, run) for number, group in enumerate(groups) for run in group]
    which = numpy.array([number for number, _ in runs])
    s, n, measured = (
        numpy.array([of(run) for _, run in runs], float)
        for of in (size, lambda run: run.length, lambda run: run.point.loss_reduction)
    )

    def predicted(at: numpy.ndarray) -> numpy.ndarray:
        return numpy.exp(at[0]) * s ** at[1] * n ** -at[2] + at[3:][which]

    start = [numpy.log(measured.max()), 0.4, 0.2, *[0.0] * (1 + which.max())]
    low, high = [-20, 0, 0, *[-measured.max()] * (1 + which.max())], [20, 3, 3, *[measured.max()] * (1 + which.max())]
    best = least_squares(lambda at: predicted(at) - measured, start, bounds=(low, high), max_nfev=5000).x
    left = predicted(best) - measured
    r_squared = 1 - (left**2).sum() / ((measured - measured.mean()) ** 2).sum()
    return f"{r_squared:.3f}, {100 * numpy.abs(left / measured).mean():.1f}"


def _worth(one: Sequence[Run], other: Sequence[Run]) -> str:
    """How many ranks of one base model a rank of the other is worth, left free in a law with the same C, α and β for
    both and b by base: with its 90 % interval, and R²."""
    runs = [*one, *other]
    second = numpy.array([False] * len(one) + [True] * len(other))
    r, n, measured = (
        numpy.array([of(run) for run in runs], float)
        for of in (_rank, lambda run: run.length, lambda run: run.point.loss_reduction)
    )

    def left(at: numpy.ndarray) -> numpy.ndarray:
        size = r * numpy.where(second, numpy.exp(at[5]), 1.0)
        return numpy.exp(at[0]) * size ** at[1] * n ** -at[2] + numpy.where(second, at[4], at[3]) - measured

    most = measured.max()
    bounds = ([-20, 0, 0, -most, -most, -3], [20, 3, 3, most, most, 3])
    starts = ([numpy.log(most), 0.4, 0.2, 0.0, 0.0, numpy.log(worth)] for worth in (0.5, 1, 2, 4))
    best = min((least_squares(left, start, bounds=bounds, max_nfev=5000) for start in starts), key=lambda fit: fit.cost)
    variance = 2 * best.cost / (len(runs) - len(best.x))
    half = 1.645 * numpy.sqrt(variance * numpy.linalg.pinv(best.jac.T @ best.jac)[5, 5])
    low, middle, high = numpy.exp(best.x[5] + numpy.array([-half, 0.0, half]))
    r_squared = 1 - 2 * best.cost / ((measured - measured.mean()) ** 2).sum()
    return f"{middle:.1f} ({low:.1f}–{high:.1f}), {r_squared:.3f}"


def figure(found: Group) -> Plot:
    """Predicted against measured, a colour per kind, all base models."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (kind, _), runs in found.items():
        try:
            law = fit([run.point for run in runs])
        except LawError:
            continue
        for run in unsaturated_runs(runs):
            points.setdefault(kind, []).append((run.point.loss_reduction, law.predict(run.rank, run.length)))
    return Plot(
        name="laws-last-layer",
        title="The law in down_proj of the last layer",
        kind="scatter",
        x=Axis("measured ΔL, nats per token"),
        y=Axis("ΔL of the law, nats per token"),
        series=tuple(Series(kind, tuple(point(x, [y]) for x, y in found)) for kind, found in points.items()),
        diagonal="predicted = measured",
    )


@click.command(help=__doc__)
@click.option("--runs", type=click.Path(path_type=Path, exists=True), default=RUNS, show_default=True)
@click.option("--figure", "drawn", type=click.Path(path_type=Path), help="Draw predicted against measured there.")
def main(runs: Path, drawn: Path | None) -> None:
    found = groups(read_runs(runs))
    columns = (
        *("kind", "base", "C", "α", "β", "b", "R²", "MAPE %", "MAPE % beyond half the lengths"),
        *("MAPE % at the highest rank", "points", "saturated", "remarks"),
    )
    print_markdown(columns, [law_row(kind, base, each) for (kind, base), each in found.items()])
    click.echo("\nR² and MAPE % of one law for all base models\n")
    columns = ("kind", "one b: r", "one b: parameters", "b by base: r", "b by base: parameters", "a rank is worth")
    print_markdown(columns, joint_rows(found))
    click.echo("\nR² and MAPE % of one law for all long texts of a base model\n")
    print_markdown(("base", "points", "one b", "b by kind"), combined_rows(found))
    if drawn is not None:
        bases = ", ".join(dict.fromkeys(base for _, base in found))
        drawn.write_bytes(draw(figure(found), bases, "png"))


if __name__ == "__main__":
    main()
