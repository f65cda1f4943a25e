"""The law of random tokens, asked for the rank of anything. No torch.

    r_law = ((L₀ − 0.69 − b) · V^β / C)^(1/α)

L₀: what random tokens cost the base model without an adapter, nats per token of the longest text of them; V: the
answers' effective vocabulary (`loramem.planning.variety`); C, α, β and b: of the law of random tokens where writes
begin, fitted to ΔL = L₀ − final loss. What a text of ten of them costs is chance, and where it ends does not go by it.

A text of ℓ random tokens asks for nearly ℓ different ones, so its length is its vocabulary. Within a shard it is the
vocabulary that decides: ten thousand phone numbers ask for eleven tokens, and take the rank of eleven random ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from loramem.errors import OutOfReach
from loramem.planning.law import MemoryLaw
from loramem.planning.law_fit import SATURATED

WIDEST = 1024  # times the law's rank: the end of the search for its interval


@dataclass(frozen=True)
class LawRank:
    """Where the law predicts a mean loss of 0.69 nats."""

    rank: float
    low: float | None
    """Where the upper end of the law's 90 % interval reaches it; None if at no rank near."""
    high: float | None
    extrapolated: bool
    """Whether no run had such a rank or so many different tokens."""


@dataclass(frozen=True)
class Sample:
    """What ``length`` answer tokens of a kind are to the base model."""

    length: int
    base_loss: float
    """Nats per answer token."""
    cost_bits: float
    vocabulary: float = 1.0
    """Effective, of answer and end tokens."""


@dataclass(frozen=True)
class KindSamples:
    """A kind of data at several lengths."""

    kind: str
    samples: tuple[Sample, ...]
    """By length, upwards."""

    def at(self, length: float) -> Sample:
        """A sample of any length: base loss and vocabulary linear between the measured ones in ln ℓ, cost in ℓ.

        Outside them loss and vocabulary are those of the nearest, and so is the cost per token.
        """
        first, last = self.samples[0], self.samples[-1]
        whole = round(length)
        for end, outside in ((first, length <= first.length), (last, length >= last.length)):
            if outside:
                return Sample(whole, end.base_loss, end.cost_bits * length / end.length, end.vocabulary)
        low, high = next((a, b) for a, b in pairwise(self.samples) if a.length <= length <= b.length)
        share = math.log(length / low.length) / math.log(high.length / low.length)
        linear = (length - low.length) / (high.length - low.length)
        return Sample(
            whole,
            low.base_loss + share * (high.base_loss - low.base_loss),
            low.cost_bits + linear * (high.cost_bits - low.cost_bits),
            low.vocabulary + share * (high.vocabulary - low.vocabulary),
        )


@dataclass(frozen=True)
class RankLaw:
    """The law of random tokens at one placement."""

    law: MemoryLaw
    base_loss: float
    """L₀."""

    def rank(self, vocabulary: float) -> LawRank:
        """The rank at which random tokens of which as many are different end at 0.69 nats, with its 90 % interval."""
        if not (rank := self.rank_alone(vocabulary)):
            return LawRank(0.0, None, None, extrapolated=True)
        target = self.base_loss - SATURATED
        low, high = (_reaches(self.law, target, rank, vocabulary, end, by) for end, by in ((1, 0.5), (0, 2.0)))
        return LawRank(rank, low, high, self.law.extrapolates(rank, vocabulary))

    def rank_alone(self, vocabulary: float) -> float:
        """The same without the interval, which takes a hundred times longer; 0 where any rank does."""
        try:
            return self.law.rank_for(self.base_loss - SATURATED, vocabulary)
        except OutOfReach:  # below b
            return 0.0


def _reaches(law: MemoryLaw, target: float, rank: float, length: float, end: int, factor: float) -> float | None:
    """The first rank, from the law's upwards or downwards, at which this end of the interval is at the target."""

    def beyond(at: float) -> bool:
        value = law.predict_interval(at, length)[end]
        return value >= target if factor > 1 else value <= target

    # Far off the interval is wide and its lower end falls again: the search begins at the law's rank.
    near = far = rank
    while not beyond(far := near * factor):
        near = far
        if not 1 / WIDEST < far / rank < WIDEST:
            return None
    return _bisected(beyond, near, far)


def _bisected(beyond: Callable[[float], bool], near: float, far: float) -> float:
    while max(far / near, near / far) > 1.0001:
        middle = math.sqrt(near * far)
        near, far = (near, middle) if beyond(middle) else (middle, far)
    return far
