"""The success boundary: how likely a write certifies every token at its first try. No torch.

    P / (1 − P) = (parameters / needed)^s        needed = ρ · κ · cost · (ℓ / 1000)^τ

ρ: parameters per bit at even odds; κ: how many times as many a kind of data needs, 1 for an unknown one; s: how sharp
the boundary is; τ: how much longer texts need more per bit.

1. The law (`loramem.planning.law`) predicts mean losses above 0.69; a certified write is below it. So the boundary is
   learnt from outcomes of writes alone: certified or not.
2. It is logistic regression: ln odds = s·ln(parameters / cost) − s·τ·ln(ℓ / 1000) − s·ln ρκ. Parameters per bit of
   the values' cost is the natural covariate, since bits per parameter is what capacities are stated in.
3. More parameters never hurt (s > 0) and longer is never easier (τ >= 0), whatever chance did in a few outcomes.
4. A weak prior on ln ρ, ln κ, τ and ln s (a ridge) keeps all of them finite when the outcomes are separable, or all
   alike. That on ln κ draws a kind of which little is known to what the others need.

Only fitting needs numpy and scipy.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from loramem.errors import BoundaryError
from loramem.records.outcome import Outcome, check_numbers

MIN_OUTCOMES = 5
"""Three numbers are fitted; with no more outcomes than these one would read the prior."""
LENGTH = 1000.0
"""Answer tokens at which ρ is stated: the prior on ρ is about a text of this length."""
MIN_COST_BITS = 1.0
"""A base model that knows the values already makes them cost nothing; a bit is the least that is counted."""
SOFT = 1.0  # a boundary less steep than this takes an 80-fold of parameters from 10 % to 90 %

# (mean, standard deviation). Published densities are 0.4 to 2 bits per parameter (arXiv 2605.30260, 2404.05405), so
# even odds at 1, within a factor of 4.5 either way; from 10 % to 90 % within 1.6 to 12-fold of parameters.
PRIOR_LOG_NEED = (0.0, 1.5)
PRIOR_KIND = (0.0, 0.5)
PRIOR_LENGTH = (0.0, 0.5)
PRIOR_LOG_STEEPNESS = (math.log(4), 0.8)


@dataclass(frozen=True)
class SuccessBoundary:
    """A fitted boundary.

    >>> sizes = (200, 500, 900, 1500, 2500, 6000)
    >>> boundary = fit([Outcome("random", 1, 1000, size, 1000.0, size > 1000) for size in sizes])
    >>> round(boundary.probability(4000, 1000.0, 1000), 3), boundary.rank_for_success(1000, 1000.0, 500)
    (0.999, 4)
    """

    parameters_per_bit: float
    """ρ: even odds at 1000 answer tokens."""
    length_exponent: float
    """τ."""
    steepness: float
    """s: the slope of the log odds in ln parameters."""
    kind_needs: dict[str, float]
    """κ of every kind there were outcomes of."""
    outcomes: int
    certified: int
    density_range: tuple[float, float]
    """Least and most parameters per bit among the outcomes."""
    length_range: tuple[float, float]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(parameters_per_bit=self.parameters_per_bit, steepness=self.steepness)
        check_numbers(least=0.0, length_exponent=self.length_exponent)
        for need in self.kind_needs.values():
            check_numbers(kind_need=need)

    def probability(self, parameters: float, cost_bits: float, length: float, kind: str | None = None) -> float:
        """That a write certifies every token at its first try: 1 / (1 + (needed / parameters)^s).

        Args:
            parameters: Of the adapter.
            cost_bits: Of the values, see `Outcome`.
            length: Answer tokens.
            kind: Of the data; one without outcomes counts as needing what the others do on average.

        Raises:
            BoundaryError: Parameters or length not positive, or a negative cost.
        """
        return _sigmoid(self._log_odds(parameters, cost_bits, length, kind))

    def parameters_for(self, probability: float, cost_bits: float, length: float, kind: str | None = None) -> float:
        """The real-valued parameters at which this is the probability: needed · (P / (1 − P))^(1/s).

        Raises:
            BoundaryError: The probability is not between 0 and 1, or out of reach; otherwise as `probability`.
        """
        if not 0 < probability < 1:
            raise BoundaryError(f"The probability must lie between 0 and 1, not {probability}.")
        log_odds = math.log(probability / (1 - probability))
        log_parameters = self._log_need(cost_bits, length, kind) + log_odds / self.steepness
        if abs(log_parameters) > 700:  # e^709 is the largest float
            raise BoundaryError(f"A probability of {probability} would take e^{log_parameters:.0f} parameters.")
        return math.exp(log_parameters)

    def rank_for_success(
        self,
        length: float,
        cost_bits: float,
        parameters_per_rank: float,
        probability: float = 0.9,
        kind: str | None = None,
    ) -> int:
        """The least rank at which the probability is reached, at least 1.

        Raises:
            BoundaryError: As `parameters_for`; or parameters_per_rank is not positive.
        """
        check_numbers(parameters_per_rank=parameters_per_rank)
        return math.ceil(self.parameters_for(probability, cost_bits, length, kind) / parameters_per_rank)

    def extrapolates(self, parameters: float, cost_bits: float, length: float) -> bool:
        """Whether no outcome had so few or so many parameters per bit, or so short or long an answer."""
        density = parameters / max(cost_bits, MIN_COST_BITS)
        inside = self.density_range[0] <= density <= self.density_range[1]
        return not (inside and self.length_range[0] <= length <= self.length_range[1])

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, content: str) -> "SuccessBoundary":
        """The boundary that `to_json` saved, every float exactly.

        Raises:
            BoundaryError: Not JSON, a field missing or unknown, or numbers that make no boundary.
        """
        try:
            fields = json.loads(content)
            for name in ("density_range", "length_range", "warnings"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except BoundaryError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise BoundaryError(f"This is not a saved boundary ({error}).") from None

    def _log_need(self, cost_bits: float, length: float, kind: str | None) -> float:
        check_numbers(length=length)
        check_numbers(least=0.0, cost_bits=cost_bits)
        each = self.parameters_per_bit * (self.kind_needs.get(kind, 1.0) if kind else 1.0)
        return math.log(each * max(cost_bits, MIN_COST_BITS)) + self.length_exponent * math.log(length / LENGTH)

    def _log_odds(self, parameters: float, cost_bits: float, length: float, kind: str | None) -> float:
        check_numbers(parameters=parameters)
        return self.steepness * (math.log(parameters) - self._log_need(cost_bits, length, kind))


def fit(outcomes: Sequence[Outcome]) -> SuccessBoundary:
    """The boundary that maximises the outcomes' likelihood times the prior.

    Args:
        outcomes: Of any kinds: their costs make them comparable, and what is left is κ.

    Raises:
        BoundaryError: Fewer than five outcomes.
    """
    if len(outcomes) < MIN_OUTCOMES:
        raise BoundaryError(f"{len(outcomes)} outcomes are too few for a boundary. Write at least {MIN_OUTCOMES}.")
    log_need, length_exponent, log_steepness, log_kind_needs = _most_probable(outcomes)
    densities = [outcome.parameters / max(outcome.cost_bits, MIN_COST_BITS) for outcome in outcomes]
    lengths = [float(outcome.length) for outcome in outcomes]
    certified = sum(outcome.certified for outcome in outcomes)
    warnings = []
    if certified == len(outcomes):
        warnings.append("Every outcome was certified: where writes begin to fail is mostly the prior's guess.")
    if certified == 0:
        warnings.append("No outcome was certified: how much more writes need is mostly the prior's guess.")
    if min(densities) == max(densities):
        warnings.append("All outcomes have as many parameters per bit: the steepness is the prior's guess.")
    elif math.exp(log_steepness) < SOFT:
        warnings.append("More parameters hardly helped in these outcomes: something else decided. Treat kinds apart.")
    return SuccessBoundary(
        math.exp(log_need),
        length_exponent,
        math.exp(log_steepness),
        kind_needs={kind: math.exp(need) for kind, need in log_kind_needs.items()},
        outcomes=len(outcomes),
        certified=certified,
        density_range=(min(densities), max(densities)),
        length_range=(min(lengths), max(lengths)),
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class Bin:
    """The outcomes whose held-out probability lay in low <= P < high (P <= 1 in the last bin)."""

    low: float
    high: float
    count: int
    predicted: float
    """Mean probability."""
    observed: float
    """Share that was certified."""


@dataclass(frozen=True)
class Reliability:
    """How far held-out probabilities can be believed."""

    bins: tuple[Bin, ...]
    """Those that are not empty."""
    log_loss: float
    """Mean −ln of the probability given to what happened."""
    brier: float
    """Mean squared difference between probability and outcome; 0.25 is a coin."""


def reliability(outcomes: Sequence[Outcome], *, bins: int = 5, folds: int = 10) -> Reliability:
    """Cross-validate: each outcome judged by a boundary that was fitted without its fold.

    Repeats of a write (same kind, rank, length and parameters) stay in one fold: one would give the other away.

    Raises:
        BoundaryError: Fewer than two different writes, or as `fit` of all but one fold.
    """
    groups = sorted({_group(outcome) for outcome in outcomes})
    fold = {group: index % folds for index, group in enumerate(groups)}
    if bins < 1 or min(folds, len(groups)) < 2:
        raise BoundaryError("Cross-validation needs a bin, two folds and two different writes.")
    judged: list[tuple[float, bool]] = []
    for index in range(min(folds, len(groups))):
        inside = [outcome for outcome in outcomes if fold[_group(outcome)] == index]
        boundary = fit([outcome for outcome in outcomes if fold[_group(outcome)] != index])
        judged += [(boundary._log_odds(o.parameters, o.cost_bits, o.length, o.kind), o.certified) for o in inside]
    rows = []
    for low, high in pairwise(edge / bins for edge in range(bins + 1)):
        found = [(p, y) for odds, y in judged if low <= (p := _sigmoid(odds)) and (p < high or high == 1)]
        if found:
            means = (sum(column) / len(found) for column in zip(*found, strict=True))
            rows.append(Bin(low, high, len(found), *means))
    return Reliability(
        tuple(rows),
        log_loss=sum(_surprise(odds if y else -odds) for odds, y in judged) / len(judged),
        brier=sum((_sigmoid(odds) - y) ** 2 for odds, y in judged) / len(judged),
    )


def _group(outcome: Outcome) -> tuple[str, int, int, float]:
    return outcome.kind, outcome.rank, outcome.length, outcome.parameters


def _most_probable(outcomes: Sequence[Outcome]) -> tuple[float, float, float, dict[str, float]]:
    """ln ρ, τ, ln s and every kind's ln κ."""
    import numpy as np
    from scipy.optimize import minimize

    kinds = sorted({outcome.kind for outcome in outcomes})
    density = np.log([o.parameters / max(o.cost_bits, MIN_COST_BITS) for o in outcomes])
    length = np.log([o.length / LENGTH for o in outcomes])
    of_kind = np.array([[float(o.kind == kind) for kind in kinds] for o in outcomes])
    sign = np.array([1.0 if o.certified else -1.0 for o in outcomes])
    mean, spread = np.array([PRIOR_LOG_NEED, PRIOR_LENGTH, PRIOR_LOG_STEEPNESS, *[PRIOR_KIND] * len(kinds)]).T

    def loss(at: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "tuple[float, object]":
        steepness, prior = np.exp(at[2]), (at - mean) / spread
        odds = steepness * (density - at[0] - at[1] * length - of_kind @ at[3:])
        pull = -sign * np.exp(-np.logaddexp(0, sign * odds))
        slopes = [-steepness * pull.sum(), -steepness * (pull @ length), pull @ odds, *(-steepness * (pull @ of_kind))]
        return np.logaddexp(0, -sign * odds).sum() + (prior @ prior) / 2, np.array(slopes) + prior / spread

    bounds = [(None, None), (0, None), (-3, 5), *[(None, None)] * len(kinds)]
    # Not convex in ln s, but in 800 drawn sets of outcomes soft and sharp starts ended where the prior's mean does.
    log_need, length_exponent, log_steepness, *needs = minimize(
        loss, mean, jac=True, method="L-BFGS-B", bounds=bounds, tol=1e-12
    ).x
    return (
        float(log_need),
        float(length_exponent),
        float(log_steepness),
        dict(zip(kinds, map(float, needs), strict=True)),
    )


def _surprise(odds: float) -> float:
    """−ln of the probability with these log odds, without overflow."""
    return math.log1p(math.exp(-abs(odds))) + max(0.0, -odds)


def _sigmoid(odds: float) -> float:
    return math.exp(-_surprise(odds))
