"""What the values of one adapter cost in bits: a prequential code length. No torch.

Each record is priced after those before it, so that what they share is paid once:

    cost = Σ over answer tokens of max(0, −log2 p − 1)

1. One bit less than the code length per token, since p > 0.5 is all that greedy decoding needs.
2. p is a mixture of experts. One is the base model. The others start as the base model and count what followed the
   same context so far: (n_token + p_base) / (n + 1), the predictive probability under a Dirichlet prior centred on it.
   Contexts are the place in the value (common format), and the last one and two tokens (common parts).
3. Experts are weighted by how well they did, with a small share handed back to all after every token, so that data
   that change can change the expert.

Natural text is cheap because the base model knows it, random strings are not, and a common format is paid by the
first few records. It is an upper bound of what an adapter must hold only as far as these experts see what the values
share.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

ANY = -1
"""No token: what counts all of them, since to add them up each time would take most of the time."""
SHARE = 1e-3
"""Of the experts' weights, handed back to all equally after each token: 1.4 bits per 1,000 tokens."""


def costs_bits(values: Sequence[Sequence[int]], base_probs: Sequence[Sequence[float]]) -> list[float]:
    """Cost of each value in bits, in the order in which they are written.

    Args:
        values: Answer tokens of each record, end tokens not among them.
        base_probs: Probability of each of these under the base model, each record on its own (teacher forcing).

    >>> costs_bits([[5, 6], [5, 6]], [[0.25, 0.125], [0.25, 0.125]])[0]
    3.0
    """
    counts: defaultdict[Hashable, Counter[int]] = defaultdict(Counter)
    weights = [0.25] * 4
    return [_price(value, probs, counts, weights) for value, probs in zip(values, base_probs, strict=True)]


def _price(
    value: Sequence[int], probs: Sequence[float], counts: defaultdict[Hashable, Counter[int]], weights: list[float]
) -> float:
    cost, last, before = 0.0, -1, -1
    for place, (token, prob) in enumerate(zip(value, probs, strict=True)):
        contexts = [("place", place), ("after", last), ("after", before, last)]
        experts = [max(prob, 1e-30)]
        for context in contexts:
            seen = counts[context]
            experts.append((seen[token] + experts[0]) / (seen[ANY] + 1))
            seen[token] += 1
            seen[ANY] += 1
        joint = [weight * expert for weight, expert in zip(weights, experts, strict=True)]
        mixed = sum(joint)
        weights[:] = [(1 - SHARE) * part / mixed + SHARE / len(joint) for part in joint]
        cost += max(0.0, -math.log2(mixed) - 1)
        before, last = last, token
    return cost
