"""Fitting the Parametric Memory Law to converged runs, and how well it predicts runs that it has not seen.

See `loramem.planning.law` for the law, the rule by which points are dropped, and the bounds. No torch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramem.errors import DegeneratePoints, LawError
from loramem.planning.law import CONSTANTS, MemoryLaw, Point

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SATURATED = 0.69
"""Nats per token: points that end lower are not fitted (arXiv 2605.30260; ln 2 rounded: p = 0.5 on average)."""
MAX_EXPONENT = 3.0
NAMES = ("C", "alpha", "beta", "b")
# Where b starts, as shares of the way from min ΔL to its bound. On 500 drawn sets of points no start ended in another
# minimum, but near a bound some were still far from it when the solver gave up: the best of three is kept.
OFFSET_STARTS = (0.03, 0.3, 0.9)


def unsaturated(points: Iterable[Point]) -> list[Point]:
    """The points that the law is about: final loss at least 0.69 (`SATURATED`)."""
    return [point for point in points if point.final_loss >= SATURATED]


def fit(points: Sequence[Point]) -> MemoryLaw:
    """Fit the law to the unsaturated points by bounded least squares in ΔL.

    Args:
        points: Converged runs; saturated ones are dropped and counted.

    Raises:
        DegeneratePoints: Fewer points left than constants and one more (the one by which the residual variance is
            known), fewer different (r, ℓ) than constants, one rank, one length, both changing together, or one ΔL.
    """
    kept = unsaturated(points)
    cells = [(point.rank, point.length) for point in kept]
    measured = [point.loss_reduction for point in kept]
    _check_spread(cells, measured, len(points) - len(kept))
    (c, alpha, beta, b), covariance, hit = _least_squares(cells, measured)
    ranks, lengths = zip(*cells, strict=True)
    predicted = [c * r**alpha * n**-beta + b for r, n in cells]
    squares = sum((p - m) ** 2 for p, m in zip(predicted, measured, strict=True))
    return MemoryLaw(
        C=c,
        alpha=alpha,
        beta=beta,
        b=b,
        r_squared=_r_squared(predicted, measured),
        mape=_mape(predicted, measured),
        covariance=covariance,
        sigma=math.sqrt(squares / (len(kept) - CONSTANTS)),
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
    for point in points:
        cells.setdefault((point.rank, point.length), []).append(point)
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


def held_out(points: Sequence[Point], keep: Callable[[Point], bool]) -> HeldOut:
    """Fit to the points that ``keep`` is true of and predict the other unsaturated ones.

    Raises:
        LawError: As `fit`; or no unsaturated point is held out.
    """
    law = fit([point for point in points if keep(point)])
    others = tuple(point for point in unsaturated(points) if not keep(point))
    if not others:
        raise LawError("No unsaturated point is held out, so there is nothing to predict.")
    return HeldOut(law, others, tuple(law.predict(point.rank, point.length) for point in others))


def _check_spread(cells: list[tuple[float, float]], measured: list[float], dropped: int) -> None:
    """Refuse points that leave a constant undetermined."""
    ranks, lengths = {cell[0] for cell in cells}, {cell[1] for cell in cells}
    needed = CONSTANTS + 1
    lost = f" after {dropped} with a final loss below {SATURATED} were dropped" if dropped else ""
    if len(cells) < needed:
        problem = f"{len(cells)} points are left{lost}, and the fit needs {needed}. Measure lower ranks or more tokens."
    elif len(ranks) == 1:
        problem = f"All points{lost} have the same rank, {cells[0][0]}. Measure at least two."
    elif len(lengths) == 1:
        problem = f"All points{lost} have the same length, {cells[0][1]}. Measure at least two."
    elif len(set(cells)) < CONSTANTS:
        problem = f"The points{lost} are only {len(set(cells))} different runs, for {CONSTANTS} constants."
    elif _change_together(cells):
        problem = f"The rank and the length change together{lost}. Measure two lengths at one rank."
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
    cells: list[tuple[float, float]], measured: list[float]
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
    low, high = np.array([1e-9, 0, 0, -1]), np.array([np.inf, MAX_EXPONENT, MAX_EXPONENT, 1])

    def jacobian(at: "Array") -> "Array":
        power = np.exp(at[1] * x - at[2] * z)
        return np.stack([power, at[0] * power * x, -at[0] * power * z, np.ones_like(y)], axis=1)

    def residuals(at: "Array") -> "Array":
        left: Array = at[0] * np.exp(at[1] * x - at[2] * z) + at[3] - y
        return left

    def start(offset: float) -> "Array":
        """Once b is given, log(ΔL − b) is linear in log r and log ℓ."""
        design = np.stack([np.ones_like(x), x, -z], axis=1)
        k, alpha, beta = np.linalg.lstsq(design, np.log(np.maximum(y - offset, 1e-3)), rcond=None)[0]
        inside: Array = np.clip([np.exp(k), alpha, beta, offset], low + 1e-3, high - 1e-3)
        return inside

    offsets = [y.min() - share * (y.min() + 1) for share in OFFSET_STARTS]
    bounds, exact = (low, high), {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12}
    runs = [least_squares(residuals, start(offset), jacobian, bounds=bounds, **exact) for offset in offsets]
    best = min(runs, key=lambda run: run.cost)

    # The solver stays strictly inside: what it left within a millionth of a bound belongs on it.
    at = best.x
    bound = np.where(at - low < [1e-9, 1e-6, 1e-6, 1e-6], low, np.where(high - at < 1e-6, high, np.nan))
    at = np.where(np.isnan(bound), at, bound)
    inner = np.flatnonzero(np.isnan(bound))
    c = at[0] * unit * np.exp(-at[1] * x0 + at[2] * z0)
    inverse = np.linalg.pinv(jacobian(at)[:, inner])
    covariance = np.zeros((4, 4))
    covariance[np.ix_(inner, inner)] = inverse @ inverse.T * (2 * best.cost / (len(y) - CONSTANTS))
    to_constants = np.diag([c / at[0], 1.0, 1.0, unit])
    to_constants[0, 1:3] = -c * x0, c * z0
    covariance = to_constants @ covariance @ to_constants.T
    hit = [NAMES[index] for index in np.flatnonzero(~np.isnan(bound))]
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
