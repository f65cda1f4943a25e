"""How many different tokens answers ask for. No torch.

Behind the last attention every position has an input of its own, so an adapter of rank r can move each of them to any
point of an r-dimensional space, however many there are (up to the width of the module). What r has to be is then a
matter of how many tokens have to be told apart in that space, not of how many positions ask for them: docs/law.md.
"""

import math
from collections import Counter
from collections.abc import Iterable


def effective_vocabulary(tokens: Iterable[int]) -> float:
    """The perplexity e^H of the tokens' frequencies: as many equally frequent ones are as various.

    >>> effective_vocabulary([1, 2, 3, 3, 2, 1]), round(effective_vocabulary([1, 1, 1, 2]), 2)
    (3.0, 1.75)
    """
    counts = Counter(tokens)
    total = counts.total()
    return round(math.exp(-sum(count / total * math.log(count / total) for count in counts.values())), 6)
