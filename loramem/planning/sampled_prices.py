"""Prices of many shards from those of some: the base model is asked about a sample, as long as answers look alike.

What answers look like is seen in their tokens alone: how many a record has, how many different ones, and whether others
had them before. The vocabulary, by which ranks go where a law is known, is each shard's own in any case; what is
estimated is what its values cost and the base's loss on them. A wrong estimate costs time, not correctness.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

from loramem.planning.plan import Price
from loramem.planning.pricing import Priced, price_of
from loramem.planning.variety import effective_vocabulary
from loramem.records.prompts import EncodedRecord

SAMPLE = 1_000
"""Records, the first of a write, that are always asked about. Their price tells the kind of all."""
EVERY = 16
"""Of the shards after them at least one in so many is asked about: what the base knows of them may change unseen."""
ALIKE = 1.25
"""Answers look alike whose tokens per record, and vocabularies, differ by no larger factor."""
KNOWN = 0.8
"""Share of a shard's tokens that those asked about had, too."""

Range = tuple[int, int]


@dataclass(frozen=True)
class _Look:
    """What the answers of some records look like."""

    tokens: Mapping[int, int]
    """How often each is among them, end tokens too."""
    records: int
    vocabulary: float

    @classmethod
    def of(cls, records: Sequence[EncodedRecord]) -> "_Look":
        tokens = Counter(chain.from_iterable(entry.answer_ids for entry in records))
        return cls(tokens, len(records), effective_vocabulary(tokens.elements()))

    @property
    def per_record(self) -> float:
        return sum(self.tokens.values()) / self.records

    def alike(self, other: "_Look") -> bool:
        pairs = (self.per_record, other.per_record), (self.vocabulary, other.vocabulary)
        return all(max(pair) <= ALIKE * min(pair) for pair in pairs)

    def known(self, tokens: Mapping[int, int]) -> float:
        return sum(count for token, count in self.tokens.items() if token in tokens) / sum(self.tokens.values())


def priced_by(encoded: Sequence[EncodedRecord], ranges: Sequence[Range]) -> list[int]:
    """For each range of records the one that tells its price: itself, where the base model has to be asked about it."""
    chosen, seen, asked = list[int](), Counter[int](), dict[int, _Look]()
    for number, (first, last) in enumerate(ranges):
        look = _Look.of(encoded[first:last])
        found = next((other for other in reversed(asked) if look.alike(asked[other])), number)
        if first < SAMPLE or number - next(reversed(asked)) >= EVERY or look.known(seen) < KNOWN:
            found = number
        if found == number:
            asked[number] = look
            seen.update(look.tokens)
        chosen.append(found)
    return chosen


class Prices:
    """Of any range of records.

    Args:
        ranges: Those of `priced_by`, and what it gave for them.
        priced: Of each range that the base model was asked about.
    """

    def __init__(
        self,
        encoded: Sequence[EncodedRecord],
        ranges: Sequence[Range],
        chosen: Sequence[int],
        priced: Mapping[int, Priced],
    ) -> None:
        self._encoded, self._ranges, self._chosen = encoded, ranges, chosen
        self._known = {ranges[number]: part.price for number, part in priced.items()}
        self._probs = {
            place: probs
            for number, part in priced.items()
            for place, probs in enumerate(part.probs, start=ranges[number][0])
        }
        self._starts = [first for first, _ in ranges]
        self._beginning = cache(self._priced)

    def __call__(self, first: int, last: int) -> Price:
        """Of the records ``first`` to ``last`` (exclusive) in one adapter."""
        if (known := self._known.get((first, last))) is not None:
            return known
        if all(place in self._probs for place in range(first, last)):
            return self._priced(first, last)
        start, end = self._ranges[self._chosen[bisect_right(self._starts, first) - 1]]
        until = start + last - first  # as many: what they share is paid once in each shard
        if end - start <= ALIKE * (last - first):
            until = end
        told, times = self._beginning(start, until), self._length(first, last) / self._length(start, until)
        tokens = chain.from_iterable(entry.answer_ids for entry in self._encoded[first:last])
        return replace(told, cost_bits=told.cost_bits * times, vocabulary=effective_vocabulary(tokens))

    def _priced(self, first: int, last: int) -> Price:
        return price_of(self._encoded[first:last], [self._probs[place] for place in range(first, last)])

    def _length(self, first: int, last: int) -> int:
        return sum(entry.length for entry in self._encoded[first:last])
