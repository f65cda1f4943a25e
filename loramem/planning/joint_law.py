"""One law for several kinds of data: C, α and β shared, an offset b for each kind. No torch.

    ΔL_kind(r, ℓ) = C · r^α · ℓ^(−β) + b_kind

Kinds differ in what any rank gives at any length (random tokens: no longer expecting text, some nats per token), which
no single b can say. Whether the rest of the law is one for all is a question about the base model and placement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramem.errors import DegeneratePoints
from loramem.planning.law import Point
from loramem.planning.law_fit import MAX_EXPONENT, fit, unsaturated

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class JointLaw:
    """A fitted joint law."""

    C: float
    alpha: float
    beta: float
    b: dict[str, float]
    """Nats per token, by kind."""
    r_squared: float
    """In ΔL, over the points of all kinds."""
    mape: float
    """Percent."""
    one_offset: float
    """R² with one b for all kinds, for comparison."""
    points: int


def fit_joint(kinds: Mapping[str, Sequence[Point]]) -> JointLaw:
    """Fit the joint law to the unsaturated points of each kind by least squares in ΔL.

    Raises:
        DegeneratePoints: Fewer than two kinds have unsaturated points, or together they determine no law.
    """
    import numpy as np
    from scipy.optimize import least_squares

    kept = {kind: found for kind, points in kinds.items() if (found := unsaturated(points))}
    every = [point for points in kept.values() for point in points]
    if len(kept) < 2:
        raise DegeneratePoints(
            f"A joint law needs two kinds of data with unsaturated points, not {len(kept)}.",
            points=len(every),
            dropped=sum(map(len, kinds.values())) - len(every),
        )
    single = fit(every)
    x, z = np.log([(point.rank, point.length) for point in every]).T
    x0, z0 = x.mean(), z.mean()
    y = np.array([point.loss_reduction for point in every])
    member = np.repeat(np.eye(len(kept)), [len(points) for points in kept.values()], axis=0)

    def design(exponents: "Array") -> "Array":
        """Given the exponents, ΔL is linear in C and the offsets."""
        return np.column_stack([np.exp(exponents[0] * (x - x0) - exponents[1] * (z - z0)), member])

    def linear(exponents: "Array") -> "Array":
        found: Array = np.linalg.lstsq(design(exponents), y, rcond=None)[0]
        return found

    def residuals(exponents: "Array") -> "Array":
        left: Array = design(exponents) @ linear(exponents) - y
        return left

    starts = ((0.3, 0.3), (1.0, 1.0), (single.alpha, single.beta))
    runs = [least_squares(residuals, np.clip(start, 1e-3, 2.9), bounds=(0, MAX_EXPONENT)) for start in starts]
    best = min(runs, key=lambda run: run.cost)
    (alpha, beta), (power, *offsets) = best.x, linear(best.x)
    return JointLaw(
        C=float(power * np.exp(-alpha * x0 + beta * z0)),
        alpha=float(alpha),
        beta=float(beta),
        b={kind: float(offset) for kind, offset in zip(kept, offsets, strict=True)},
        r_squared=float(1 - 2 * best.cost / ((y - y.mean()) ** 2).sum()),
        mape=float(100 * np.mean(np.abs(residuals(best.x) / y))),
        one_offset=single.r_squared,
        points=len(every),
    )
