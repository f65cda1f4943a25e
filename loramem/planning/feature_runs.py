"""Runs of the law behind the last attention: plain cross-entropy at a fixed rank over features, about a second each.

The same ending and whitened coordinates as a write over features (`loramem.training.feature_writer`). What differs is
what is asked: not that every token be certified, but the mean loss that a rank comes down to. So there are no
thresholds and no deviations between dtypes, and the rate falls to nothing over a fixed number of steps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from loramem.errors import TrainingDiverged
from loramem.models.adapters import AdaptedModel
from loramem.models.ending import Ending, Head
from loramem.models.features import Features
from loramem.models.placement import Placement
from loramem.training.whitening import STRONG_DAMPING, Site, WhitenedAdam, random_rows, whitening_factor

STEPS, RATE = 160, 0.4
"""Of a run, and the share of an adapter's entries that a step can change at first; measured in docs/law.md."""
CONSTANT = 0.3
"""Share of the steps at the full rate; from there it falls linearly."""
LOOKS = (0, 4, 12, 24, 48, 96)
"""Steps before which tokens join the competing ones."""
RIVALS, OTHERS = 64, 512
"""Tokens that join at a look, those with the most probability over a sample of positions; and how many of all others
stand for them in each step."""
TRAIN_ROWS, LOOK_ROWS = 4096, 1024
NAME = "calibration"  # of the adapter, inside the model only


def converged_losses(
    adapted: AdaptedModel, features: Features, rank: int, placement: Placement, *, steps: int = STEPS, seed: int = 0
) -> Tensor:
    """Cross-entropy (N,) in nats of every position over the whole vocabulary, once training has converged.

    The adapter is made for this and removed.

    Args:
        features: In the model's dtype.
        placement: Behind the last attention.

    Raises:
        TrainingDiverged: NaN or Inf.
        UnsupportedBaseModel: See `AdaptedModel.create`.
    """
    adapted.create(NAME, rank, placement, seed)
    try:
        return _converge(adapted, features, rank, steps, seed)
    finally:
        adapted.remove(NAME)


def _converge(adapted: AdaptedModel, features: Features, rank: int, steps: int, seed: int) -> Tensor:
    layers = adapted.lora_layers(NAME)
    ending, targets = Ending(adapted.model, features, layers), features.targets
    softmax = _SampledSoftmax(adapted.model.get_output_embeddings(), targets, seed)
    sites = []
    for layer in layers:
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        factor = whitening_factor(ending.moments(layer), STRONG_DAMPING)  # as the points that ship
        with torch.no_grad():
            a.copy_(random_rows(rank, factor, seed + rank))
        sites.append(Site(a, b, factor, ending.scale(layer) / layer.scaling[NAME]))
    optimizer = WhitenedAdam(sites, RATE)
    sample = slice(0, None, math.ceil(len(targets) / LOOK_ROWS))
    for step in range(steps):
        if step in LOOKS:
            softmax.look(_losses(ending, softmax.whole, targets, sample)[0])
        softmax.draw()
        for rows in ending.chunks(TRAIN_ROWS):
            logits = ending.logits(rows, softmax.head) + softmax.offsets
            cross_entropy(logits, softmax.places[rows], reduction="sum").backward()
        share = min(1.0, (1 - step / steps) / (1 - CONSTANT))
        if not optimizer.step(share, 1 / len(targets)):
            raise _diverged(step)
    losses = torch.cat([_losses(ending, softmax.whole, targets, rows)[1] for rows in ending.chunks(LOOK_ROWS)])
    if not math.isfinite(float(losses.sum())):
        raise _diverged(steps)
    return losses


class _SampledSoftmax:
    """Targets and their rivals, and a sample of all other tokens that counts for all of them.

    A low rank leaves much of the probability with tokens that nobody wants, spread thin: what they weigh has to have a
    gradient, which the rest of `loramem.training.rivals` has not.
    """

    def __init__(self, head: nn.Module, targets: Tensor, seed: int) -> None:
        parameters = {name: parameter.detach() for name, parameter in head.named_parameters()}
        self._weight, self._bias = parameters["weight"], parameters.get("bias")
        self._generator = torch.Generator(targets.device).manual_seed(seed)
        self._targets, self._competes = targets, torch.zeros(len(self._weight), dtype=torch.bool, device=targets.device)
        self._competes[targets] = True

    def look(self, logits: Tensor) -> None:
        """Let the likeliest tokens of these (n, V) compete."""
        mass = logits.softmax(1).sum(0)
        self._competes[mass.topk(min(RIVALS, len(mass))).indices] = True

    def draw(self) -> None:
        """The tokens of the next step."""
        few, others = self._competes.nonzero().flatten(), (~self._competes).nonzero().flatten()
        order = torch.randperm(len(others), generator=self._generator, device=others.device)
        drawn = others[order[:OTHERS]]
        self._ids = torch.cat([few, drawn])
        self.places = torch.searchsorted(few, self._targets)
        """(N,) of the targets among them."""
        self.offsets = self._weight.new_zeros(len(self._ids), dtype=torch.float32)
        """Of logits: what each of the drawn counts for."""
        if len(drawn):
            self.offsets[len(few) :] = math.log(len(others) / len(drawn))

    def head(self, hidden: Tensor) -> Tensor:
        """In the place of the model's head: logits of these tokens."""
        return linear(hidden, self._weight[self._ids], None if self._bias is None else self._bias[self._ids])

    def whole(self, hidden: Tensor) -> Tensor:
        """In the place of the model's head: logits of the whole vocabulary."""
        return linear(hidden, self._weight, self._bias)


@torch.no_grad()
def _losses(ending: Ending, head: Head, targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    logits = ending.logits(rows, head)
    return logits, cross_entropy(logits, targets[rows], reduction="none")


def _diverged(step: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"A calibration run was not finite at step {step}. Check the base model for NaN weights, or use float32.",
        step=step,
        learning_rate=RATE,
    )
