"""The Parametric Memory Law: how far a LoRA of rank r lowers the loss on ℓ answer tokens. No torch.

    ΔL(r, ℓ) = C · r^α · ℓ^(−β) + b                                  nats per token (arXiv 2605.30260)

1. ΔL is the base model's mean loss on the answer tokens minus the adapter's after training to convergence.
2. A run that ended below 0.69 nats says only that the rank sufficed, not how much it could have held: its ΔL is the
   base loss whatever r and ℓ are. Such points are dropped, and no others (the paper's rule).
3. The fit minimises the squares of residuals in ΔL itself, the quantity of the paper's R² and MAPE. α and β are
   bounded because outside 0..3 the data are not of this form, b by the largest |ΔL| because a larger one means that
   the power law cannot be told from a logarithm; a constant at its bound is said in `MemoryLaw.warnings`.
4. "Every token certified" lies below 0.69 and so outside the law by construction: `loramem.planning.success` is about
that.

Fitting is `loramem.planning.law_fit`, which needs numpy and scipy (0.6 s to import); asking a fitted law needs neither.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache

from loramem.errors import LawError, OutOfReach

CONSTANTS = 4  # C, α, β and b
ROUNDING = 1e-6  # what the solver may leave: a smaller difference between two predictions or two errors is none


@dataclass(frozen=True)
class Point:
    """One converged training run.

    Raises:
        LawError: A number is not finite, or rank or length are not positive.
    """

    rank: float
    length: float
    """Answer tokens, of all records together."""
    base_loss: float
    """Nats per answer token before training."""
    final_loss: float
    """Nats per answer token after it."""

    def __post_init__(self) -> None:
        _check_positive(rank=self.rank, length=self.length)
        if not (math.isfinite(self.base_loss) and math.isfinite(self.final_loss)):
            raise LawError(f"A loss must be finite, not {self.base_loss} before and {self.final_loss} after training.")

    @property
    def loss_reduction(self) -> float:
        """ΔL, nats per answer token."""
        return self.base_loss - self.final_loss


@dataclass(frozen=True)
class MemoryLaw:
    """A fitted law: ΔL = C · r^α · ℓ^(−β) + b, and how well it is known.

    >>> from loramem.planning.law_fit import fit
    >>> points = [Point(r, n, 7.0, 6.5 - 4 * r**0.3 * n**-0.4) for r in (1, 2, 4) for n in (100, 400, 1600)]
    >>> law = fit(points)
    >>> round(law.predict(2, 800), 3), round(law.rank_for(law.predict(2, 800), 800), 3)
    (0.84, 2.0)
    """

    C: float
    """Nats per token at rank 1 and length 1, above b."""
    alpha: float
    beta: float
    b: float
    """Nats per token that any rank gives at any length."""
    r_squared: float
    """In ΔL, on the fitted points."""
    mape: float
    """Mean |predicted − measured| / |measured| of ΔL on the fitted points, percent."""
    covariance: tuple[tuple[float, ...], ...]
    """Of C, alpha, beta, b in this order; zero for a constant that is not free or ended at its bound."""
    sigma: float
    """Standard deviation of the residuals, nats per token."""
    points: int
    dropped: int
    """Points that were not fitted because they were saturated."""
    rank_range: tuple[float, float]
    length_range: tuple[float, float]
    reduction_range: tuple[float, float]
    """Least and greatest measured ΔL, nats per token."""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.C > 0 and min(self.alpha, self.beta) >= 0 and all(map(math.isfinite, self.constants))):
            raise LawError(f"A law needs C > 0, alpha >= 0, beta >= 0 and a finite b, not {self.constants}.")
        if [len(row) for row in self.covariance] != [4] * 4 or self.points <= CONSTANTS:
            raise LawError("A law needs a covariance of 4 by 4 and more points than constants.")

    @property
    def constants(self) -> tuple[float, float, float, float]:
        """C, alpha, beta, b."""
        return self.C, self.alpha, self.beta, self.b

    def predict(self, rank: float, length: float) -> float:
        """ΔL in nats per token.

        Raises:
            LawError: Rank or length is not a positive number.
        """
        _check_positive(rank=rank, length=length)
        return self.C * math.pow(rank, self.alpha) * math.pow(length, -self.beta) + self.b

    def rank_for(self, loss_reduction: float, length: float) -> float:
        """The real-valued rank at which ΔL is ``loss_reduction`` (nats per token): r = ((ΔL − b)·ℓ^β / C)^(1/α).

        Raises:
            OutOfReach: No rank gives it: not above b, or α is 0.
            LawError: The length is not a positive number.
        """
        _check_positive(length=length)
        return self._solve("rank", loss_reduction, self.alpha, -self.beta * math.log(length))

    def length_for(self, loss_reduction: float, rank: float) -> float:
        """The real-valued length at which ΔL is ``loss_reduction`` (nats per token): ℓ = (C·r^α / (ΔL − b))^(1/β).

        Raises:
            OutOfReach: No length gives it: not above b, or β is 0.
            LawError: The rank is not a positive number.
        """
        _check_positive(rank=rank)
        return self._solve("length", loss_reduction, -self.beta, self.alpha * math.log(rank))

    def _solve(self, what: str, loss_reduction: float, exponent: float, log_rest: float) -> float:
        excess = loss_reduction - self.b
        if not 0 < excess < math.inf:
            why = f"only finite ones above b = {self.b:.4g} are possible"
        elif exponent == 0:
            why = f"the law does not depend on the {what}"
        else:
            log_answer = (math.log(excess) - math.log(self.C) - log_rest) / exponent
            if abs(log_answer) < 700:  # e^709 is the largest float
                return math.exp(log_answer)
            why = f"it would be about e^{log_answer:.0f}"
        raise OutOfReach(
            f"No {what} gives a loss reduction of {loss_reduction:.4g} nats per token: {why}.",
            loss_reduction=loss_reduction,
        )

    def predict_interval(self, rank: float, length: float, confidence: float = 0.9) -> tuple[float, float]:
        """Where the ΔL of one new run lies with this probability, nats per token.

        Delta method: ΔL ± t·√(gᵀΣg + σ²), g the gradient by the constants, Σ their covariance, t Student's quantile
        at the fit's degrees of freedom.

        Raises:
            LawError: Rank or length is not a positive number, or the confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise LawError(f"The confidence must lie between 0 and 1, not {confidence}.")
        predicted = self.predict(rank, length)
        power = predicted - self.b
        gradient = (power / self.C, power * math.log(rank), -power * math.log(length), 1.0)
        variance = self.sigma**2 + sum(
            one * entry * other
            for one, row in zip(gradient, self.covariance, strict=True)
            for other, entry in zip(gradient, row, strict=True)
        )
        freedom = self.points - CONSTANTS
        half = _student_t(confidence, freedom) * math.sqrt(max(variance, 0.0))
        return predicted - half, predicted + half

    def half_widths(self, confidence: float = 0.9) -> tuple[float, float, float, float]:
        """Half the width of each constant's confidence interval, t·√Σᵢᵢ; 0 for one that ended at its bound.

        Raises:
            LawError: The confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise LawError(f"The confidence must lie between 0 and 1, not {confidence}.")
        t = _student_t(confidence, self.points - CONSTANTS)
        c, alpha, beta, b = (t * math.sqrt(max(self.covariance[i][i], 0.0)) for i in range(4))
        return c, alpha, beta, b

    def extrapolates(self, rank: float, length: float) -> bool:
        """Whether this lies outside what was measured: the ranks, the lengths, or (by 2 σ) the loss reductions.

        The last matters because dropping saturated points cuts high ranks at short lengths out of the grid.
        """
        predicted, (least, greatest) = self.predict(rank, length), self.reduction_range
        slack = max(2 * self.sigma, ROUNDING * (greatest - least))
        return not (
            self.rank_range[0] <= rank <= self.rank_range[1]
            and self.length_range[0] <= length <= self.length_range[1]
            and least - slack <= predicted <= greatest + slack
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, content: str) -> "MemoryLaw":
        """The law that `to_json` saved, every float exactly.

        Raises:
            LawError: Not JSON, a field missing or unknown, or constants that make no law.
        """
        try:
            fields = json.loads(content)
            if (form := fields.pop("form", "paper")) != "paper":  # there were others once
                raise LawError(f"A saved law of another form, {form!r}: fit its runs again.")
            fields["covariance"] = tuple(map(tuple, fields["covariance"]))
            for name in ("rank_range", "length_range", "reduction_range", "warnings"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except LawError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise LawError(f"This is not a saved law ({error}).") from None


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise LawError(f"The {name} must be a positive number, not {number}.")


@cache
def _student_t(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = confidence: Abramowitz & Stegun 26.7.3 and 26.7.4 by bisection over atan(t/√ν)."""
    odd, low, high = freedom % 2, 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        total, term = 0.0, math.cos(angle) if odd else 1.0
        for power in range(odd, freedom - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        inside = math.sin(angle) * total
        inside = (angle + inside) * 2 / math.pi if odd else inside
        low, high = (angle, high) if inside < confidence else (low, angle)
    return math.tan(low) * math.sqrt(freedom)
