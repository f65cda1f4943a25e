"""Training objectives as token weights: which tokens the gradient is spent on.

Each takes the cross-entropy of every token, (B, T) in nats, and a mask (B, T) of the supervised ones, and returns
weights (B, T), detached; `weighted_mean` turns both into a loss. The same training loops serve all of them: what they
know of an objective is its `Objective`, and `BY_NAME` is where a new one is added.

Where the paper (arXiv 2605.30260) and its published code differ, the code's behaviour is the default here and the
difference is named.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from loramem._util.choices import check_choice
from loramem.training.settings import ObjectiveName

Idle = Literal["sft", "zero"]
"""What is trained on when no token is stubborn: all of them, or none."""
MIN_WEIGHT = 1e-5  # below this sum the published sliding objective falls back to all tokens
RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)  # share of the records exposed in each phase of the curriculum


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Scalar Σ(w·l) / Σw in nats; a zero that carries no gradient to speak of when all weights are zero.

    The paper writes an ε into the denominator; its code branches instead. Both agree wherever a weight is not zero.
    """
    total = weights.sum()
    return (weights * losses).sum() / total.clamp(min=torch.finfo(weights.dtype).tiny)


def stubborn(losses: Tensor, mask: Tensor, threshold: float = 0.5) -> Tensor:
    """Supervised tokens (B, T) whose probability is not above ``threshold``; at 0.5 a loss above ln 2.

    The published code uses a strict l > ln 2, so that p = 0.5 exactly counts as learned; it does here as well.
    """
    return mask & (losses.detach() > -math.log(threshold))


def sft(losses: Tensor, mask: Tensor) -> Tensor:
    """Weight 1 for every supervised token: plain cross-entropy."""
    return mask.to(losses.dtype)


def memft_ot(losses: Tensor, mask: Tensor, threshold: float = 0.5, idle: Idle = "sft") -> Tensor:
    """Weight 1 for stubborn tokens, 0 for the rest (MemFT-OT).

    Args:
        losses, mask: (B, T), nats and bool.
        threshold: Probability above which a token is left alone. The paper trains at 0.5.
        idle: When no token is stubborn, train on all of them ("sft", as the published OT does) or on none
            ("zero", as its PhoneBook curriculum does; the paper's formula).

    Raises:
        UnknownChoice: Another ``idle``.
    """
    check_choice("idle", idle, get_args(Idle))
    hard = stubborn(losses, mask, threshold)
    if idle == "sft" and not hard.any():
        return sft(losses, mask)
    return hard.to(losses.dtype)


def exposure(epoch: int, boundaries: Sequence[int], ratios: Sequence[float] = RATIOS) -> float:
    """Share of the records that MemFT-SW's curriculum trains on in an epoch (0-based).

    The published schedule: the ratio of the first boundary that the epoch is below, the last one afterwards.
    """
    for boundary, ratio in zip(boundaries, ratios, strict=False):
        if epoch < boundary:
            return ratio
    return ratios[-1]


def exposed_records(records: int, ratio: float, batch_size: int) -> int:
    """How many records of the fixed order an exposure reaches.

    As published: floor(N·ρ), rounded down to full batches, at least one batch and at most the full batches of N.
    A last partial batch is therefore never trained on: give a batch size that divides N.
    """
    full = records // batch_size * batch_size
    return min(max(math.floor(records * ratio) // batch_size * batch_size, batch_size), full)


@dataclass(frozen=True)
class SlidingState:
    """What the sliding window remembers of each row (B,) between steps."""

    anchor: Tensor
    """First wrong position of the previous step; -1 if there was none."""
    patience: Tensor
    """Steps for which the anchor has not moved."""
    expansion: Tensor
    """Factor on the window, 1 to 4."""

    @classmethod
    def start(cls, rows: int, device: torch.device | str = "cpu") -> "SlidingState":
        return cls(
            torch.full((rows,), -1, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.ones(rows, device=device),
        )


def memft_sw(
    losses: Tensor,
    mask: Tensor,
    correct: Tensor,
    state: SlidingState,
    threshold: float = 0.5,
    *,
    window: int = 50,
    decay: float = 20.0,
    floor: float = 0.01,
    sharpness: float = 10.0,
    before_anchor: float = 1.0,
) -> tuple[Tensor, SlidingState]:
    """Weights of MemFT-SW's sliding window inside long records.

    A soft gate sigmoid(10·(l − τ)) times a positional factor: exp(−d/20) for a token d after the anchor (the first
    position whose argmax under teacher forcing is wrong) within 50·expansion tokens, 0.01 beyond. When the anchor
    stays for three steps the expansion grows by 0.5 up to 4.

    Two consequences of the published form: the decay falls below the floor at d = 92, so expanding beyond ~1.8
    lowers the weight of tokens 93 to 200; and positions before the anchor keep the factor 1 (``before_anchor``),
    though the paper speaks of a window.

    Args:
        losses, mask, correct: (B, T); nats, supervised, argmax equals target.
        state: From the previous step on the same rows.
        threshold: Probability at which the gate is one half.
        window, decay, floor, sharpness: Tokens, tokens, factor, per nat; the published constants.

    Returns:
        Weights (B, T) and the state for the next step.
    """
    losses = losses.detach()
    tau = -math.log(threshold)
    gate = torch.sigmoid(sharpness * (losses - tau)) * mask

    wrong = mask & ~correct
    has_error = wrong.any(dim=1)
    anchor = torch.where(has_error, wrong.int().argmax(dim=1), -1)
    patience = torch.where(has_error & (anchor == state.anchor), state.patience + 1, 0)
    expansion = torch.where(patience >= 3, (state.expansion + 0.5).clamp(max=4.0), 1.0)

    distance = torch.arange(losses.shape[1], device=losses.device) - anchor[:, None]
    inside = torch.exp(-distance.clamp(min=0) / decay)
    factor = torch.where(distance < window * expansion[:, None], inside, floor)
    factor = torch.where(distance < 0, before_anchor, factor)
    factor = torch.where(has_error[:, None], factor, 1.0)

    weights = gate * factor
    if weights.sum() <= MIN_WEIGHT:
        weights = sft(losses, mask)
    return weights.to(losses.dtype), SlidingState(anchor, patience, expansion)


@dataclass(frozen=True)
class Objective:
    """What a training loop is told of an objective."""

    weights: Callable[[Tensor, Tensor, float, Idle], Tensor]
    """Of tokens, with the arguments of `memft_ot`."""
    sliding: Callable[[Tensor, Tensor, Tensor, SlidingState, float], tuple[Tensor, SlidingState]] | None = None
    """Within a single long record, with the arguments of `memft_sw`; None: as elsewhere."""
    to_convergence: bool = False
    """Whether learned tokens count as well: all records stay in training, and its progress is the loss of all."""


BY_NAME: Mapping[ObjectiveName, Objective] = {
    "sft": Objective(lambda losses, mask, _threshold, _idle: sft(losses, mask), to_convergence=True),
    "memft-ot": Objective(memft_ot),
    "memft-sw": Objective(memft_ot, sliding=memft_sw),
}
