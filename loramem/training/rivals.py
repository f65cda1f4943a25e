"""A softmax over the few tokens that compete, and over all others together as one more.

Of a vocabulary of 50,000 some hundred tokens ever come near a target. All others are one more competitor of each
position, with the mass they had when the whole vocabulary was last looked at: a softmax over few alone is blind to a
mass that is spread thin.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loramem.models.ending import Ending, Head
from loramem.models.rounded_inputs import rounded

SMALL_VOCABULARY = 1024
"""Tokens that compete all together: of small bases the mass is spread so thin that no few of them stand for it."""
LEAST_REST = 1e-6
"""Share of a softmax below which what the others weigh is rounding."""


class Unembedding:
    """The head of a model, over its whole vocabulary or over the tokens that compete.

    Args:
        weight, bias: (V, d) and (V,) or None.
        products: Dtype of products that are to be quick; the weight's own if None.
        eight_bits: Hidden states come in rounded to eight bits; gradients pass as if they did not.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, products: torch.dtype | None = None, *, eight_bits: bool = False
    ) -> None:
        dtype = products or weight.dtype
        self.rounds = dtype != weight.dtype
        self._eight_bits, self._all = eight_bits, (weight, bias)
        self._rounded = weight.to(dtype), None if bias is None else bias.to(dtype)

    def choose(self, tokens: Tensor) -> None:
        """Which tokens compete, in which order."""
        weight, bias = self._all
        self._few = weight[tokens], None if bias is None else bias[tokens]

    def few(self, hidden: Tensor) -> Tensor:
        """In the place of the model's head: logits of the competing tokens."""
        return linear(self._entering(hidden), *self._few)

    def all(self, hidden: Tensor) -> Tensor:
        """In the place of the model's head: logits of the whole vocabulary."""
        return linear(self._entering(hidden), *self._all)

    def all_rounded(self, hidden: Tensor) -> Tensor:
        """The same with products in the dtype that is quick."""
        weight, bias = self._rounded
        return linear(self._entering(hidden).to(weight.dtype), weight, bias)

    def _entering(self, hidden: Tensor) -> Tensor:
        return hidden + (rounded(hidden.detach()) - hidden.detach()) if self._eight_bits else hidden


class Rivals:
    """The tokens that compete for all of N positions.

    Args:
        head: The unembedding.
        targets: (N,) tokens that compete from the beginning.
        products: See `Unembedding`.
        eight_bits: Weights (V, d) of the unembedding that inputs of eight bits meet, where there are any.
    """

    def __init__(
        self,
        head: nn.Module,
        targets: Tensor,
        products: torch.dtype | None = None,
        eight_bits: Tensor | None = None,
    ) -> None:
        parameters = {name: parameter.detach() for name, parameter in head.named_parameters()}
        weight, bias = parameters["weight"], parameters.get("bias")
        self.head = Unembedding(weight, bias, products)
        self.eight_bits = None if eight_bits is None else Unembedding(eight_bits, bias, products, eight_bits=True)
        self.vocabulary = len(weight)
        self._place = torch.full((self.vocabulary,), -1, device=targets.device)
        self._ids = targets.new_empty(0)
        self._all_targets = targets
        self._rest = torch.full((len(targets),), -math.inf, device=targets.device)
        self.add(targets)
        if self.vocabulary <= SMALL_VOCABULARY:
            self.add(torch.arange(self.vocabulary, device=targets.device))

    def add(self, tokens: Tensor) -> None:
        """Let more tokens compete."""
        new = tokens.unique()
        new = new[self._place[new] < 0]
        self._place[new] = torch.arange(len(self._ids), len(self._ids) + len(new), device=new.device)
        self._ids = torch.cat([self._ids, new])
        for head in (self.head, *([] if self.eight_bits is None else [self.eight_bits])):
            head.choose(self._ids)
        self.targets = self._place[self._all_targets]
        """(N,) places of the targets among the competing tokens."""

    def head_of(self, ending: Ending) -> Unembedding:
        """The unembedding after an end of the model."""
        return self.eight_bits if ending.eight_bits and self.eight_bits is not None else self.head

    def few_of(self, in_eight_bits: Tensor) -> Head:
        """In the place of the model's head: logits of the competing tokens, at some positions in eight bits.

        Args:
            in_eight_bits: (n,) which of them.
        """
        head, other = self.head, self.eight_bits
        if other is None:
            return head.few

        def few(hidden: Tensor) -> Tensor:
            which = in_eight_bits.reshape(-1, *(1 for _ in hidden.shape[1:]))
            return torch.where(which, other.few(hidden), head.few(hidden))

        return few

    def with_rest(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """Logits (n, few) of the competing tokens, at some positions, with those of all others as one more column."""
        return torch.cat([logits, self._rest[rows, None]], 1)

    def look_at_rest(self, logits: Tensor, total: Tensor, rows: slice | Tensor) -> None:
        """Take down what the others weigh at some positions.

        Args:
            logits: (n, V).
            total: (n,) log Σ exp of them.
        """
        few = logits[:, self._ids].logsumexp(1)
        share = (1 - (few - total).exp()).clamp(min=LEAST_REST)
        self._rest[rows] = total + share.log()
