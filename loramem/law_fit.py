"""Fitting the Parametric Memory Law to converged runs, and how well forms of it predict runs that they have not seen.

See `loramem.law` for the law, the rule by which points are dropped, and the bounds. No torch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramem.errors import DegeneratePoints, LawError
from loramem.law import FORMS, ROUNDING, Form, MemoryLaw, Point

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SATURATED = 0.69
"""Nats per token: points that end lower are not fitted (arXiv 2605.30260; ln 2 rounded: p = 0.5 on average)."""
MAX_EXPONENT = 3.0
CONSTANTS = ("C", "alpha", "beta", "b")
# Where b starts, as shares of the way from min ΔL to its bound. On 500 drawn sets of points no start ended in another
# minimum, but near a bound some were still far from it when the solver gave up: the best of three is kept.
OFFSET_STARTS = (0.03, 0.3, 0.9)


def unsaturated(points: Iterable[Point]) -> list[Point]:
    """The points that the law is about: final loss at least 0.69 (`SATURATED`)."""
    return [point for point in points if point.final_loss >= SATURATED]


def fit(points: Sequence[Point], *, form: str = "paper") -> MemoryLaw:
    """Fit a form of the law to the unsaturated points by bounded least squares in ΔL.

    Args:
        points: Converged runs; saturated ones are dropped and counted.
        form: A key of `FORMS`.

    Raises:
        DegeneratePoints: Fewer points left than constants and one more (the one by which the residual variance is
            known), fewer different (r, ℓ) than constants, one rank, one length, both changing together, or one ΔL.
        LawError: Unknown form, or a point lacks what it needs.
    """
    if form not in FORMS:
        raise LawError(f"The form must be one of {', '.join(FORMS)}, not {form!r}.")
    shape, kept = FORMS[form], unsaturated(points)
    cells = [(getattr(point, shape.rank), getattr(point, shape.length)) for point in kept]
    if any(None in cell for cell in cells):
        raise LawError(f"The form {form!r} needs the {shape.rank} and {shape.length} of every point.")
    measured = [point.loss_reduction for point in kept]
    _check_spread(cells, measured, shape, len(points) - len(kept))
    (c, alpha, beta, b), covariance, hit = _least_squares(cells, measured, shape)
    ranks, lengths = zip(*cells, strict=True)
    predicted = [c * r**alpha * n**-beta + b for r, n in cells]
    squares = sum((p - m) ** 2 for p, m in zip(predicted, measured, strict=True))
    return MemoryLaw(
        C=c,
        alpha=alpha,
        beta=beta,
        b=b,
        form=form,
        r_squared=_r_squared(predicted, measured),
        mape=_mape(predicted, measured),
        covariance=covariance,
        sigma=math.sqrt(squares / (len(kept) - shape.constants)),
        points=len(kept),
        dropped=len(points) - len(kept),
        rank_range=(float(min(ranks)), float(max(ranks))),
        length_range=(float(min(lengths)), float(max(lengths))),
        reduction_range=(min(measured), max(measured)),
        warnings=tuple(
            f"{name} ended at its bound: the points do not have this form or do not reach far enough, and intervals "
            f"take {name} as known. Measure more ranks and lengths."
            for name in hit
        ),
    )


@dataclass(frozen=True)
class Agreement:
    """How well a law says what was measured."""

    r_squared: float
    mape: float
    """Percent."""
    cells: int
    """Ranks and lengths."""


def means_agreement(law: MemoryLaw, points: Iterable[Point]) -> Agreement | None:
    """A law of points that repeat each (r, ℓ) on other data, beside the mean ΔL of each.

    Least squares gives the same constants for the points as for their means, weighted by how many there are; what
    differs is what is left. One text can be easier than another at every rank, and only the mean over texts is about
    the length. A cell counts if it has several points and none of them is saturated: one that is would pull the mean.

    Returns:
        None where fewer than two cells have several points, or their means do not differ.
    """
    cells: dict[tuple[float, float], list[Point]] = {}
    shape = FORMS[law.form]
    for point in points:
        cells.setdefault((getattr(point, shape.rank), getattr(point, shape.length)), []).append(point)
    repeated = {
        cell: sum(point.loss_reduction for point in found) / len(found)
        for cell, found in cells.items()
        if len(found) > 1 and len(unsaturated(found)) == len(found)
    }
    if len(set(repeated.values())) < 2:
        return None
    predicted, measured = [law.predict(*cell) for cell in repeated], list(repeated.values())
    return Agreement(_r_squared(predicted, measured), _mape(predicted, measured), len(repeated))


@dataclass(frozen=True)
class HeldOut:
    """What a law fitted without some points says of them."""

    law: MemoryLaw
    points: tuple[Point, ...]
    predicted: tuple[float, ...]
    """ΔL of each, nats per token."""

    @property
    def mape(self) -> float:
        """Percent."""
        return _mape(self.predicted, [point.loss_reduction for point in self.points])

    @property
    def of_means(self) -> Agreement | None:
        """As `means_agreement`, of the points that were held out."""
        return means_agreement(self.law, self.points)


def held_out(points: Sequence[Point], keep: Callable[[Point], bool], *, form: str = "paper") -> HeldOut:
    """Fit to the points that ``keep`` is true of and predict the other unsaturated ones.

    Raises:
        LawError: As `fit`; or no unsaturated point is held out.
    """
    law, shape = fit([point for point in points if keep(point)], form=form), FORMS[form]
    others = tuple(point for point in unsaturated(points) if not keep(point))
    if not others:
        raise LawError("No unsaturated point is held out, so there is nothing to predict.")
    return HeldOut(law, others, tuple(law.predict(getattr(p, shape.rank), getattr(p, shape.length)) for p in others))


@dataclass(frozen=True)
class FormScore:
    """How well a form of the law fits, and how well it predicts whole ranks and whole lengths that it has not seen."""

    law: MemoryLaw
    """Fitted to all points."""
    rank_mape: float
    """Each rank predicted from all others: mean error, percent."""
    length_mape: float
    """Each length predicted from all others: mean error, percent."""

    @property
    def held_out_mape(self) -> float:
        """Percent."""
        return (self.rank_mape + self.length_mape) / 2


def compare_forms(points: Sequence[Point]) -> tuple[FormScore, ...]:
    """Every form of the law that the points have the quantities for, the least held-out error first.

    Whole ranks and whole lengths are left out, not single points: the neighbours of a single point would give it away.
    Equal errors keep the order of `FORMS`: parameters in proportion to rank are the paper's form in another unit.

    Raises:
        LawError: As `fit`; three ranks and three lengths are needed, so that two are left.
    """
    kept = unsaturated(points)
    ranks, lengths = {point.rank for point in kept}, {point.length for point in kept}
    if min(len(ranks), len(lengths)) < 3:
        raise LawError(
            f"Leaving out whole ranks and lengths needs three of each; these points have {len(ranks)} ranks and "
            f"{len(lengths)} lengths."
        )
    scores = [
        FormScore(fit(points, form=form), _left_out_mape(points, "rank", form), _left_out_mape(points, "length", form))
        for form, shape in FORMS.items()
        if all(None not in (getattr(point, shape.rank), getattr(point, shape.length)) for point in kept)
    ]
    return tuple(sorted(scores, key=lambda score: round(score.held_out_mape / ROUNDING)))


def _left_out_mape(points: Sequence[Point], name: str, form: str) -> float:
    """Every value of this attribute predicted from all others: mean error, percent."""

    def without(value: float) -> HeldOut:
        return held_out(points, lambda point: bool(getattr(point, name) != value), form=form)

    rounds = [without(value) for value in sorted({getattr(point, name) for point in unsaturated(points)})]
    predicted = [value for found in rounds for value in found.predicted]
    return _mape(predicted, [point.loss_reduction for found in rounds for point in found.points])


def _check_spread(cells: list[tuple[float, float]], measured: list[float], shape: Form, dropped: int) -> None:
    """Refuse points that leave a constant undetermined."""
    ranks, lengths = {cell[0] for cell in cells}, {cell[1] for cell in cells}
    needed = shape.constants + 1
    lost = f" after {dropped} with a final loss below {SATURATED} were dropped" if dropped else ""
    if len(cells) < needed:
        problem = f"{len(cells)} points are left{lost}, and the fit needs {needed}. Measure lower ranks or more tokens."
    elif len(ranks) == 1:
        problem = f"All points{lost} have the same {shape.rank}, {cells[0][0]}. Measure at least two."
    elif len(lengths) == 1:
        problem = f"All points{lost} have the same {shape.length}, {cells[0][1]}. Measure at least two."
    elif len(set(cells)) < shape.constants:
        problem = f"The points{lost} are only {len(set(cells))} different runs, for {shape.constants} constants."
    elif _change_together(cells):
        problem = f"The {shape.rank} and the {shape.length} change together{lost}. Measure two lengths at one rank."
    elif max(measured) - min(measured) <= 1e-12 * max(map(abs, measured)):
        problem = f"All points{lost} have the same loss reduction, {measured[0]:.4g} nats per token."
    else:
        return
    raise DegeneratePoints(problem, points=len(cells), dropped=dropped)


def _change_together(cells: list[tuple[float, float]]) -> bool:
    """Whether log ℓ is a linear function of log r: then α and β cannot be told apart."""
    import numpy as np

    return bool(abs(np.corrcoef(np.log(cells), rowvar=False)[0, 1]) > 1 - 1e-9)


def _least_squares(
    cells: list[tuple[float, float]], measured: list[float], shape: Form
) -> tuple[list[float], tuple[tuple[float, ...], ...], list[str]]:
    """The four constants, their covariance, and the names of those that ended at a bound.

    Solved for K = C·r₀^α·ℓ₀^(−β), r₀ and ℓ₀ the geometric means, with ΔL in units of its largest: these constants are
    near 1 and nearly independent, where C alone changes by orders of magnitude with β.
    """
    import numpy as np
    from scipy.optimize import least_squares

    logs = np.log(cells)
    x0, z0 = logs.mean(axis=0)
    x, z = (logs - (x0, z0)).T
    unit = max(map(abs, measured))
    y = np.array(measured) / unit
    free = shape.constants
    low, high = np.array([1e-9, 0, 0, -1]), np.array([np.inf, MAX_EXPONENT, MAX_EXPONENT, 1])

    def jacobian(at: "Array") -> "Array":
        power = np.exp(at[1] * x - at[2] * z)
        return np.stack([power, at[0] * power * x, -at[0] * power * z, np.ones_like(y)][:free], axis=1)

    def residuals(at: "Array") -> "Array":
        model: Array = at[0] * np.exp(at[1] * x - at[2] * z) - y
        return model + at[3] if shape.offset else model

    def start(offset: float) -> "Array":
        """Once b is given, log(ΔL − b) is linear in log r and log ℓ."""
        design = np.stack([np.ones_like(x), x, -z], axis=1)
        k, alpha, beta = np.linalg.lstsq(design, np.log(np.maximum(y - offset, 1e-3)), rcond=None)[0]
        inside: Array = np.clip([np.exp(k), alpha, beta, offset], low + 1e-3, high - 1e-3)
        return inside[:free]

    offsets = [y.min() - share * (y.min() + 1) for share in OFFSET_STARTS] if shape.offset else [0.0]
    bounds, exact = (low[:free], high[:free]), {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12}
    runs = [least_squares(residuals, start(offset), jacobian, bounds=bounds, **exact) for offset in offsets]
    best = min(runs, key=lambda run: run.cost)

    # The solver stays strictly inside: what it left within a millionth of a bound belongs on it.
    at = np.append(best.x, [0.0] * (4 - free))
    bound = np.where(at - low < [1e-9, 1e-6, 1e-6, 1e-6], low, np.where(high - at < 1e-6, high, np.nan))
    at = np.where(np.isnan(bound), at, bound)
    inner = np.flatnonzero(np.isnan(bound[:free]))
    c = at[0] * unit * np.exp(-at[1] * x0 + at[2] * z0)
    inverse = np.linalg.pinv(jacobian(at)[:, inner])
    covariance = np.zeros((4, 4))
    covariance[np.ix_(inner, inner)] = inverse @ inverse.T * (2 * best.cost / (len(y) - free))
    to_constants = np.diag([c / at[0], 1.0, 1.0, unit])
    to_constants[0, 1:3] = -c * x0, c * z0
    covariance = to_constants @ covariance @ to_constants.T
    hit = [CONSTANTS[index] for index in np.flatnonzero(~np.isnan(bound))]
    constants = [float(c), float(at[1]), float(at[2]), float(at[3] * unit)]
    return constants, tuple(tuple(map(float, row)) for row in covariance), hit


def _r_squared(predicted: Sequence[float], measured: Sequence[float]) -> float:
    mean = sum(measured) / len(measured)
    left = sum((p - m) ** 2 for p, m in zip(predicted, measured, strict=True))
    return 1 - left / sum((m - mean) ** 2 for m in measured)


def _mape(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Percent. A ΔL of zero counts as a billionth: an enormous error rather than none."""
    errors = [abs(p - m) / max(abs(m), 1e-9) for p, m in zip(predicted, measured, strict=True)]
    return 100 * sum(errors) / len(errors)
