"""The success boundary: how likely a write certifies every token at its first try. No torch.

    P / (1 − P) = (r / (κ · r_law))^s,   r_law = r₀ · (ℓ / p₁)^γ

r: the first rank; r₀: where the law predicts 0.69 nats for as various tokens (`loramem.planning.rank_law`); ℓ: answer
tokens of the shard; p₁: parameters of a rank; γ: `CROWDED`; κ: how many times r_law certifies as often as not; s: how
sharp the boundary is.

1. The law predicts mean losses above 0.69; a certified write is below it. So the step from there on is learnt from
   outcomes alone: certified or not.
2. Crowding comes in here, not in the law: the same variety in more positions leaves the mean loss that a rank reaches
   nearly what it was, and its worst token worse.
3. It is logistic regression on one number: ln odds = s·ln(r / r_law) − s·ln κ. More rank never hurts (s > 0).
4. A weak prior on ln κ and ln s (a ridge) keeps both finite when the outcomes are separable, or all alike.

Only fitting needs numpy and scipy.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from loramem.errors import BoundaryError
from loramem.records.outcome import check_numbers

MIN_TRIALS = 5
"""Two numbers are fitted; with no more trials than these one would read the prior."""
LEAST_LAW_RANK = 0.1
"""The least that is counted: a base model that orders the values already makes the law's rank nothing."""
CROWDED = 0.15
"""γ: fitted beside κ and s it is 0.14 over loramem-tiny's outcomes and 0.20 over SmolLM2-135M's: docs/law.md."""
SOFT = 1.0  # a boundary less steep than this takes an 80-fold of rank from 10 % to 90 %

# (mean, standard deviation), from loramem-tiny and SmolLM2-135M: docs/law.md.
PRIOR_LOG_NEED = (math.log(2.4), 0.3)
PRIOR_LOG_STEEPNESS = (math.log(8), 0.8)


def crowded(law_rank: float, tokens: int, parameters_per_rank: float) -> float:
    """The law's rank for a shard of so many answer tokens where a rank has so many parameters: r₀ · (ℓ / p₁)^γ.

    >>> crowded(3.0, 1000, 1000), round(crowded(3.0, 250, 1000), 2)
    (3.0, 2.44)
    """
    return float(law_rank * (tokens / parameters_per_rank) ** CROWDED)


@dataclass(frozen=True)
class Trial:
    """What came of a write at its first rank.

    Raises:
        BoundaryError: The share is not a positive number.
    """

    share: float
    """Its rank by the law's."""
    certified: bool

    def __post_init__(self) -> None:
        check_numbers(share=self.share)

    @classmethod
    def of(cls, rank: float, law_rank: float, certified: bool) -> "Trial":
        return cls(rank / max(law_rank, LEAST_LAW_RANK), certified)


@dataclass(frozen=True)
class SuccessBoundary:
    """A fitted boundary.

    >>> boundary = fit([Trial(share, share > 1.5) for share in (0.5, 0.8, 1.2, 1.4, 1.6, 2.0, 3.0)])
    >>> round(boundary.probability(8, law_rank=4.0), 2), round(boundary.rank_for(0.9, law_rank=4.0), 2)
    (0.92, 7.81)
    """

    need: float
    """κ."""
    steepness: float
    """s: the slope of the log odds in ln r."""
    trials: int
    certified: int
    share_range: tuple[float, float]
    """Least and most of r / r_law among the trials."""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(need=self.need, steepness=self.steepness)

    def probability(self, rank: float, law_rank: float) -> float:
        """That a write certifies every token at its first try: 1 / (1 + (κ · r_law / r)^s).

        Raises:
            BoundaryError: The rank is not positive, or the law's is negative.
        """
        return _sigmoid(self._log_odds(rank, law_rank))

    def rank_for(self, probability: float, law_rank: float) -> float:
        """The rank, a real number, at which this is the probability: κ · r_law · (P / (1 − P))^(1/s).

        Raises:
            BoundaryError: The probability is not between 0 and 1, or out of reach; otherwise as `probability`.
        """
        check_numbers(least=0.0, law_rank=law_rank)
        if not 0 < probability < 1:
            raise BoundaryError(f"The probability must lie between 0 and 1, not {probability}.")
        log_odds = math.log(probability / (1 - probability))
        log_rank = math.log(self.need * max(law_rank, LEAST_LAW_RANK)) + log_odds / self.steepness
        if log_rank > 40:
            raise BoundaryError(f"A probability of {probability} would take a rank of e^{log_rank:.0f}.")
        return math.exp(log_rank)

    def extrapolates(self, rank: float, law_rank: float) -> bool:
        """Whether no trial had so low or so high a rank beside the law's."""
        return not self.share_range[0] <= Trial.of(rank, law_rank, True).share <= self.share_range[1]

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
            for name in ("share_range", "warnings"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except BoundaryError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise BoundaryError(f"This is not a saved boundary ({error}).") from None

    def _log_odds(self, rank: float, law_rank: float) -> float:
        check_numbers(rank=rank)
        check_numbers(least=0.0, law_rank=law_rank)
        return self.steepness * math.log(Trial.of(rank, law_rank, True).share / self.need)


def fit(trials: Sequence[Trial]) -> SuccessBoundary:
    """The boundary that maximises the trials' likelihood times the prior.

    Raises:
        BoundaryError: Fewer than five trials.
    """
    if len(trials) < MIN_TRIALS:
        raise BoundaryError(f"{len(trials)} outcomes are too few for a boundary. Write at least {MIN_TRIALS}.")
    log_need, log_steepness = _most_probable(trials)
    shares = [trial.share for trial in trials]
    certified = sum(trial.certified for trial in trials)
    warnings = []
    if certified == len(trials):
        warnings.append("Every outcome was certified: where writes begin to fail is mostly the prior's guess.")
    if certified == 0:
        warnings.append("No outcome was certified: how much more rank writes need is mostly the prior's guess.")
    if min(shares) == max(shares):
        warnings.append("All outcomes have the same rank beside the law's: the steepness is the prior's guess.")
    elif math.exp(log_steepness) < SOFT:
        warnings.append("More rank hardly helped in these outcomes: something else decided.")
    return SuccessBoundary(
        math.exp(log_need),
        math.exp(log_steepness),
        trials=len(trials),
        certified=certified,
        share_range=(min(shares), max(shares)),
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class Bin:
    """The trials whose held-out probability lay in low <= P < high (P <= 1 in the last bin)."""

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


def reliability(trials: Sequence[Trial], *, bins: int = 5, folds: int = 10) -> Reliability:
    """Cross-validate: each trial judged by a boundary that was fitted without its fold.

    Repeats of a write (the same rank beside the law's) stay in one fold: one would give the other away.

    Raises:
        BoundaryError: Fewer than two different writes, or as `fit` of all but one fold.
    """
    groups = sorted({trial.share for trial in trials})
    fold = {group: index % folds for index, group in enumerate(groups)}
    if bins < 1 or min(folds, len(groups)) < 2:
        raise BoundaryError("Cross-validation needs a bin, two folds and two different writes.")
    judged: list[tuple[float, bool]] = []
    for index in range(min(folds, len(groups))):
        inside = [trial for trial in trials if fold[trial.share] == index]
        boundary = fit([trial for trial in trials if fold[trial.share] != index])
        judged += [(boundary._log_odds(trial.share, 1.0), trial.certified) for trial in inside]
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


def _most_probable(trials: Sequence[Trial]) -> tuple[float, float]:
    """ln κ and ln s."""
    import numpy as np
    from scipy.optimize import minimize

    share = np.log([trial.share for trial in trials])
    sign = np.array([1.0 if trial.certified else -1.0 for trial in trials])
    mean, spread = np.array([PRIOR_LOG_NEED, PRIOR_LOG_STEEPNESS]).T

    def loss(at: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "tuple[float, object]":
        steepness, prior = np.exp(at[1]), (at - mean) / spread
        odds = steepness * (share - at[0])
        pull = -sign * np.exp(-np.logaddexp(0, sign * odds))
        slopes = np.array([-steepness * pull.sum(), pull @ odds])
        return np.logaddexp(0, -sign * odds).sum() + (prior @ prior) / 2, slopes + prior / spread

    log_need, log_steepness = minimize(
        loss, mean, jac=True, method="L-BFGS-B", bounds=[(None, None), (-3, 5)], tol=1e-12
    ).x
    return float(log_need), float(log_steepness)


def _surprise(odds: float) -> float:
    """−ln of the probability with these log odds, without overflow."""
    return math.log1p(math.exp(-abs(odds))) + max(0.0, -odds)


def _sigmoid(odds: float) -> float:
    return math.exp(-_surprise(odds))
