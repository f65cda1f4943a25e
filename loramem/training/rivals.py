"""A softmax over the few tokens that compete, and over all others together as one more.

Of a vocabulary of 50,000 some hundred tokens ever come near a target. All others are one more competitor of each
position, with the mass they had when the whole vocabulary was last looked at: a softmax over few alone is blind to a
mass that is spread thin.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SMALL_VOCABULARY = 1024
"""Tokens that compete all together: of small bases the mass is spread so thin that no few of them stand for it."""
LEAST_REST = 1e-6
"""Share of a softmax below which what the others weigh is rounding."""


class Rivals:
    """The tokens that compete for all of N positions.

    Args:
        head: The unembedding.
        targets: (N,) tokens that compete from the beginning.
        products: Dtype of products with the whole unembedding; the unembedding's own if None.
    """

    def __init__(self, head: nn.Module, targets: Tensor, products: torch.dtype | None = None) -> None:
        parameters = {name: parameter.detach() for name, parameter in head.named_parameters()}
        self._weight, self._bias = parameters["weight"], parameters.get("bias")
        dtype = products or self._weight.dtype
        self.rounds = dtype != self._weight.dtype
        self._rounded = self._weight.to(dtype), None if self._bias is None else self._bias.to(dtype)
        self.vocabulary = len(self._weight)
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
        self._few = self._weight[self._ids], None if self._bias is None else self._bias[self._ids]
        self.targets = self._place[self._all_targets]
        """(N,) places of the targets among the competing tokens."""

    def few(self, hidden: Tensor) -> Tensor:
        """In the place of the model's head: logits of the competing tokens."""
        return linear(hidden, *self._few)

    def all(self, hidden: Tensor) -> Tensor:
        """In the place of the model's head: logits of the whole vocabulary."""
        return linear(hidden, self._weight, self._bias)

    def all_rounded(self, hidden: Tensor) -> Tensor:
        """The same with products in the dtype that is quick."""
        weight, bias = self._rounded
        return linear(hidden.to(weight.dtype), weight, bias)

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
