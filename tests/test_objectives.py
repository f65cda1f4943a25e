"""The objectives put their weight where the paper's published code does; expected numbers are worked out by hand.

Probabilities and losses: l = -ln p, so p = 0.5 is l = ln 2 = 0.6931. The gate of MemFT-SW is
sigmoid(10·(l - ln 2)) = 1 / (1 + (2p)^10): exactly 1/1025 at p = 1, 1/2 at p = 0.5, and 1 (to 1e-6) for p < 0.1.
"""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loramem.training.objectives import (
    BY_NAME,
    SlidingState,
    exposed_records,
    exposure,
    memft_ot,
    memft_sw,
    sft,
    stubborn,
    weighted_mean,
)
from loramem.training.settings import OBJECTIVES

LN2 = math.log(2)
HARD = 20.0  # a loss in nats at which the gate is 1 to the last bit of float32
PUBLISHED = (20, 40, 60, 80, 300)


def nats(*probabilities: float) -> Tensor:
    return torch.tensor([[-math.log(p) for p in probabilities]])


def mask_of(*flags: int) -> Tensor:
    return torch.tensor([flags], dtype=torch.bool)


def close(weights: Tensor, expected: Sequence[Sequence[float]]) -> None:
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=1e-9)


# --- weights into a loss


def test_the_weighted_mean_divides_by_the_weights() -> None:
    losses, weights = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[3.0, 1.0, 0.0]])
    assert weighted_mean(losses, weights).item() == pytest.approx(1.25)  # (3·1 + 1·2 + 0·5) / (3 + 1)


def test_the_weighted_mean_runs_over_all_tokens_of_a_batch_at_once() -> None:
    losses, weights = torch.tensor([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert weighted_mean(losses, weights).item() == pytest.approx(1.75)  # 7/4; a mean of row means would be 2.5


def test_weights_that_are_all_zero_give_zero_and_a_zero_gradient() -> None:
    losses = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = weighted_mean(losses, torch.zeros(1, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert losses.grad is not None
    assert losses.grad.tolist() == [[0.0, 0.0]]


def test_a_small_weight_sum_is_not_rounded_up() -> None:
    losses, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[1e-20, 1e-20]])
    assert weighted_mean(losses, weights).item() == pytest.approx(2.0)  # an ε in the denominator would give 0


@pytest.mark.parametrize("objective", ["sft", "memft_ot", "memft_sw"])
def test_no_gradient_flows_through_the_weights(objective: str) -> None:
    losses = nats(0.9, 0.4, 0.1, 0.01).requires_grad_()
    mask, correct = mask_of(0, 1, 1, 1), mask_of(1, 0, 1, 0)
    weights = {
        "sft": lambda: sft(losses, mask),
        "memft_ot": lambda: memft_ot(losses, mask),
        "memft_sw": lambda: memft_sw(losses, mask, correct, SlidingState.start(1))[0],
    }[objective]()
    assert not weights.requires_grad
    weighted_mean(losses, weights).backward()
    # d/dl_t of Σ(w·l)/Σw with constant w is w_t/Σw.
    torch.testing.assert_close(losses.grad, weights / weights.sum())


# --- sft and memft_ot


def test_sft_weighs_every_supervised_token_alike() -> None:
    losses, mask = nats(0.99, 0.5, 0.01, 0.3), mask_of(0, 1, 1, 1)
    assert sft(losses, mask).tolist() == [[0.0, 1.0, 1.0, 1.0]]
    # (ln 2 + ln 100 + ln 10/3) / 3 = (0.69315 + 4.60517 + 1.20397) / 3
    assert weighted_mean(losses, sft(losses, mask)).item() == pytest.approx(2.16743, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_probability_of_exactly_one_half_is_not_stubborn(dtype: torch.dtype) -> None:
    at = torch.tensor(LN2, dtype=dtype)
    above = torch.nextafter(at, torch.tensor(9.0, dtype=dtype))
    losses = torch.stack([at, above])[None]
    assert stubborn(losses, mask_of(1, 1)).tolist() == [[False, True]]
    assert memft_ot(losses, mask_of(1, 1)).tolist() == [[0.0, 1.0]]


def test_a_token_that_is_not_supervised_is_never_stubborn() -> None:
    assert stubborn(nats(0.01, 0.01), mask_of(0, 1)).tolist() == [[False, True]]


def test_ot_averages_over_the_stubborn_tokens_alone() -> None:
    losses, mask = nats(0.9, 0.25, 0.6, 0.125, 0.001), mask_of(1, 1, 1, 1, 0)
    weights = memft_ot(losses, mask)
    assert weights.tolist() == [[0.0, 1.0, 0.0, 1.0, 0.0]]
    assert weighted_mean(losses, weights).item() == pytest.approx(2.5 * LN2)  # (ln 4 + ln 8) / 2 = (2 + 3)/2 · ln 2


def test_another_threshold_moves_what_is_stubborn() -> None:
    losses, mask = nats(0.95, 0.85, 0.55, 0.45), mask_of(1, 1, 1, 1)
    assert memft_ot(losses, mask, 0.9).tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert memft_ot(losses, mask, 0.5).tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_ot_without_a_stubborn_token_trains_on_all_or_on_none() -> None:
    losses, mask = nats(0.8, 0.5, 0.9), mask_of(1, 1, 0)
    assert memft_ot(losses, mask).tolist() == [[1.0, 1.0, 0.0]]
    assert memft_ot(losses, mask, idle="sft").tolist() == [[1.0, 1.0, 0.0]]
    assert memft_ot(losses, mask, idle="zero").tolist() == [[0.0, 0.0, 0.0]]
    # SFT: (ln 1.25 + ln 2) / 2 = ln 2.5 / 2 = 0.45815
    assert weighted_mean(losses, memft_ot(losses, mask)).item() == pytest.approx(0.45815, abs=1e-5)
    assert weighted_mean(losses, memft_ot(losses, mask, idle="zero")).item() == 0.0


def test_one_stubborn_token_in_the_batch_is_enough_not_to_be_idle() -> None:
    losses, mask = nats(0.8, 0.3).T, torch.ones(2, 1, dtype=torch.bool)
    assert memft_ot(losses, mask, idle="sft").tolist() == [[0.0], [1.0]]


def test_every_name_has_an_objective_and_gives_the_weights_of_its_function() -> None:
    assert set(BY_NAME) == set(OBJECTIVES)
    losses, mask, correct = nats(0.8, 0.3, 0.6), mask_of(1, 1, 0), mask_of(1, 0, 1)
    assert torch.equal(BY_NAME["sft"].weights(losses, mask, 0.9, "zero"), sft(losses, mask))
    for name in ("memft-ot", "memft-sw"):
        for threshold in (0.2, 0.5):
            for idle in ("sft", "zero"):
                given = BY_NAME[name].weights(losses, mask, threshold, idle)
                assert torch.equal(given, memft_ot(losses, mask, threshold, idle=idle))
    assert [name for name, objective in BY_NAME.items() if objective.to_convergence] == ["sft"]
    assert [name for name, objective in BY_NAME.items() if objective.sliding] == ["memft-sw"]
    sliding, state = BY_NAME["memft-sw"].sliding, SlidingState.start(1)
    assert sliding is not None
    ours, published = (f(losses, mask, correct, state, 0.5) for f in (sliding, memft_sw))
    assert torch.equal(ours[0], published[0])


def test_an_unknown_idle_behaviour_is_refused() -> None:
    with pytest.raises(ValueError, match="idle"):
        memft_ot(nats(0.5), mask_of(1), idle="none")


# --- the curriculum over records


@pytest.mark.parametrize(
    ("epoch", "share"),
    [(0, 0.2), (19, 0.2), (20, 0.4), (39, 0.4), (40, 0.6), (59, 0.6), (60, 0.8), (79, 0.8), (80, 1.0), (299, 1.0)],
)
def test_the_published_boundaries_expose_a_fifth_more_each(epoch: int, share: float) -> None:
    assert exposure(epoch, PUBLISHED) == share


def test_the_last_share_holds_after_the_last_boundary() -> None:
    assert exposure(300, PUBLISHED) == exposure(10_000, PUBLISHED) == 1.0
    assert exposure(7, (3, 6), (0.5, 0.75)) == 0.75


@pytest.mark.parametrize(
    ("records", "ratio", "batch_size", "expected"),
    [
        (100, 0.2, 10, 20),
        (100, 1.0, 10, 100),
        (250, 0.2, 25, 50),
        (103, 0.2, 10, 20),  # floor(20.6) = 20
        (103, 1.0, 10, 100),  # the last three never
        (27, 0.6, 10, 10),  # floor(16.2) = 16, one full batch
        (27, 0.8, 10, 20),  # floor(21.6) = 21, two
        (30, 0.2, 10, 10),  # floor(6) is less than a batch: one batch all the same
        (98, 0.2, 10, 10),  # floor(19.6) = 19, one; 20 would be two
        (19, 1.0, 4, 16),
        (12, 0.5, 4, 4),  # floor(6) = 6, one full batch
        (4, 0.2, 4, 4),
        (3, 1.0, 4, 0),  # no full batch in N, as published: the batch size must divide N
    ],
)
def test_an_exposure_reaches_full_batches_only(records: int, ratio: float, batch_size: int, expected: int) -> None:
    assert exposed_records(records, ratio, batch_size) == expected


# --- the sliding window: one step


def test_the_gate_is_a_half_at_one_half_and_a_thousandth_when_certain() -> None:
    losses, mask = nats(1.0, 0.5, 0.25, 1e-9, 1e-9), mask_of(1, 1, 1, 1, 0)
    weights, _ = memft_sw(losses, mask, torch.ones_like(mask), SlidingState.start(1))
    # No position is wrong, so the weights are the gate alone: 1/(1 + (2p)^10)
    # p=1: 1/1025 = 0.00097561; p=1/2: 1/2; p=1/4: 1/(1 + 2^-10) = 1024/1025 = 0.99902439; p=1e-9: 1; unsupervised: 0
    close(weights, [[0.00097561, 0.5, 0.99902439, 1.0, 0.0]])


def test_the_gate_is_a_half_at_another_threshold() -> None:
    losses, mask = nats(0.9, 0.5), mask_of(1, 1)
    weights, _ = memft_sw(losses, mask, mask, SlidingState.start(1), 0.9)
    # 1/(1 + (p/0.9)^10): 1/2; (5/9)^10 = 0.0028008, so 0.9972070
    close(weights, [[0.5, 0.9972070]])
    weights, _ = memft_sw(losses, mask, mask, SlidingState.start(1), 0.9, sharpness=2.0)
    close(weights, [[0.5, 81 / 106]])  # 1/(1 + (5/9)^2) = 81/(81 + 25)


def window(
    wrong: Sequence[int],
    tokens: int = 260,
    first_supervised: int = 0,
    state: SlidingState | None = None,
    **options: float,
) -> tuple[Tensor, SlidingState]:
    """Positional factors of one row (the gate is 1 everywhere), and the next state."""
    mask = torch.arange(tokens)[None] >= first_supervised
    correct = torch.ones_like(mask)
    correct[0, list(wrong)] = False
    losses = torch.full((1, tokens), HARD)
    weights, after = memft_sw(losses, mask, correct, state or SlidingState.start(1), **options)
    return weights[0], after


def test_weight_decays_behind_the_anchor_down_to_the_floor_outside_the_window() -> None:
    weights, state = window([30, 33, 200])
    assert state.anchor.tolist() == [30]
    # d = 0: 1; 1: e^-0.05; 20: e^-1; 49: e^-2.45; 50, at the edge of the window, and beyond: 0.01
    expected = {30: 1.0, 31: 0.951229, 50: 0.367879, 79: 0.086294, 80: 0.01, 81: 0.01, 259: 0.01}
    for position, factor in expected.items():
        assert weights[position].item() == pytest.approx(factor, rel=1e-5), position


def test_positions_before_the_anchor_keep_their_weight_as_published() -> None:
    weights, _ = window([30])
    assert weights[:30].tolist() == [1.0] * 30


def test_positions_before_the_anchor_can_be_given_another_factor() -> None:
    weights, _ = window([30], before_anchor=0.25)
    assert weights[:32].tolist() == pytest.approx([0.25] * 30 + [1.0, 0.951229])
    weights, _ = window([], before_anchor=0.25)
    assert set(weights.tolist()) == {1.0}


def test_window_decay_and_floor_can_be_given() -> None:
    weights, _ = window([0], window=3, decay=1.0, floor=0.5)
    assert weights[:5].tolist() == pytest.approx([1.0, 0.367879, 0.135335, 0.5, 0.5], rel=1e-5)  # 1, e^-1, e^-2, floor


def test_a_row_without_error_has_factor_one_everywhere() -> None:
    weights, state = window([])
    assert set(weights.tolist()) == {1.0}
    assert (state.anchor.tolist(), state.patience.tolist(), state.expansion.tolist()) == ([-1], [0], [1.0])


def test_the_anchor_is_the_first_wrong_supervised_position() -> None:
    weights, state = window([3, 7, 40], first_supervised=5)
    assert state.anchor.tolist() == [7]
    assert weights[:8].tolist() == [0.0] * 5 + [1.0] * 3


def test_errors_at_unsupervised_positions_are_no_errors() -> None:
    weights, state = window([3, 4], first_supervised=5)
    assert state.anchor.tolist() == [-1]
    assert set(weights[5:].tolist()) == {1.0}


def test_rows_have_anchors_of_their_own() -> None:
    losses, mask = torch.full((3, 60), HARD), torch.ones(3, 60, dtype=torch.bool)
    correct = torch.ones_like(mask)
    correct[0, 10] = correct[2, 0] = False
    weights, state = memft_sw(losses, mask, correct, SlidingState.start(3))
    assert state.anchor.tolist() == [10, -1, 0]
    # position 30 is d = 20 from row 0's anchor, d = 30 from row 2's: e^-1, (no error) 1, e^-1.5
    assert weights[:, 30].tolist() == pytest.approx([0.367879, 1.0, 0.223130], rel=1e-5)


# --- the sliding window: over steps


def repeat(wrong: Sequence[int], steps: int, state: SlidingState | None = None) -> tuple[list[float], SlidingState]:
    expansions = []
    for _ in range(steps):
        _, state = window(wrong, state=state)
        expansions.append(state.expansion.item())
    assert state is not None
    return expansions, state


def test_the_window_expands_from_the_third_repetition_of_an_anchor_up_to_four() -> None:
    expansions, state = repeat([5], 12)
    # The first sight of an anchor is no repetition; repetitions 1 and 2 change nothing, 3 gives 1.5, 8 gives 4.
    assert expansions == [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0, 4.0, 4.0]
    assert state.patience.tolist() == [11]


@pytest.mark.parametrize("other", [[6], [4, 5], []])
def test_an_anchor_that_moves_or_vanishes_resets_the_window(other: list[int]) -> None:
    _, state = repeat([5], 7)
    assert (state.patience.item(), state.expansion.item()) == (6, 3.0)
    expansions, state = repeat(other, 1, state)
    assert (expansions, state.patience.item()) == ([1.0], 0)
    assert repeat([5], 4, state)[0] == [1.0, 1.0, 1.0, 1.5]


def test_rows_without_error_never_gain_patience() -> None:
    expansions, state = repeat([], 6)
    assert (expansions, state.patience.item()) == ([1.0] * 6, 0)


@pytest.mark.parametrize(
    ("repetitions", "last_inside", "factor"),
    [
        (2, 49, 0.0862936),  # window 50: e^-2.45
        (3, 74, 0.0247235),  # 1.5 x 50 = 75: e^-3.7
        (5, 124, 0.00202943),  # 2.5 x 50 = 125: e^-6.2, under the floor
        (8, 199, 4.77276e-5),  # 4 x 50 = 200: e^-9.95
        (20, 199, 4.77276e-5),
    ],
)
def test_an_expanded_window_decays_further_before_the_floor(repetitions: int, last_inside: int, factor: float) -> None:
    _, state = repeat([10], repetitions)
    weights, _ = window([10], state=state)
    assert weights[10 + last_inside].item() == pytest.approx(factor, rel=1e-4)
    assert weights[10 + last_inside + 1].item() == pytest.approx(0.01)


def test_the_state_of_one_row_does_not_touch_another() -> None:
    losses, mask = torch.full((2, 12), HARD), torch.ones(2, 12, dtype=torch.bool)
    state = SlidingState.start(2)
    for step in range(6):
        correct = torch.ones_like(mask)
        correct[0, 3] = correct[1, step] = False
        _, state = memft_sw(losses, mask, correct, state)
    assert state.anchor.tolist() == [3, 5]
    assert state.patience.tolist() == [5, 0]
    assert state.expansion.tolist() == [2.5, 1.0]


# --- the sliding window: nothing left to weigh


@pytest.mark.parametrize(("tokens", "falls_back"), [(97, True), (98, False)])
def test_a_weight_sum_of_a_hundred_thousandth_or_less_falls_back_to_sft(tokens: int, falls_back: bool) -> None:
    mask = torch.ones(1, tokens, dtype=torch.bool)
    weights, _ = memft_sw(torch.zeros(1, tokens), mask, mask, SlidingState.start(1), 0.2)
    # Certain tokens at threshold 0.2: 1/(1 + 5^10) = 1.024e-7 each; 97 make 9.933e-6, 98 make 1.0035e-5.
    assert weights[0, 0].item() == pytest.approx(1.0 if falls_back else 1.024e-7, rel=1e-4)


def test_the_weight_sum_is_taken_over_the_batch() -> None:
    losses, mask = torch.zeros(2, 3), mask_of(1, 1, 0).repeat(2, 1)
    alone, _ = memft_sw(losses, mask, mask, SlidingState.start(2), 0.2)
    assert alone.tolist() == [[1.0, 1.0, 0.0]] * 2
    losses[1, 0] = HARD
    beside, _ = memft_sw(losses, mask, mask, SlidingState.start(2), 0.2)
    close(beside, [[1.024e-7, 1.024e-7, 0.0], [1.0, 1.024e-7, 0.0]])


def test_a_batch_without_supervised_tokens_weighs_nothing() -> None:
    weights, state = memft_sw(nats(0.1, 0.1), mask_of(0, 0), mask_of(0, 0), SlidingState.start(1))
    assert weights.tolist() == [[0.0, 0.0]]
    assert state.anchor.tolist() == [-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_have_the_dtype_of_the_losses(dtype: torch.dtype) -> None:
    losses, mask = nats(0.9, 0.1).to(dtype), mask_of(1, 1)
    assert sft(losses, mask).dtype == dtype
    assert memft_ot(losses, mask).dtype == dtype
    assert memft_sw(losses, mask, mask_of(1, 0), SlidingState.start(1))[0].dtype == dtype


# --- against a slow computation, token by token, written from the description of the published code

Rows = list[list[float]]
Flags = list[list[bool]]


def slow_ot(losses: Rows, mask: Flags, zero: bool) -> float:
    supervised = [
        loss for row, flags in zip(losses, mask, strict=True) for loss, on in zip(row, flags, strict=True) if on
    ]
    hard = [loss for loss in supervised if loss > LN2]
    if hard:
        return sum(hard) / len(hard)
    return 0.0 if zero or not supervised else sum(supervised) / len(supervised)


class SlowSlidingWindow:
    def __init__(self, rows: int) -> None:
        self.anchors, self.patience, self.expansion = [-1] * rows, [0] * rows, [1.0] * rows

    def step(self, losses: Rows, mask: Flags, correct: Flags) -> Rows:
        weights = []
        for b in range(len(losses)):
            tokens = range(len(losses[b]))
            errors = [t for t in tokens if mask[b][t] and not correct[b][t]]
            anchor = errors[0] if errors else -1
            if errors and anchor == self.anchors[b]:
                self.patience[b] += 1
            else:
                self.patience[b] = 0
            self.expansion[b] = min(self.expansion[b] + 0.5, 4.0) if self.patience[b] >= 3 else 1.0
            self.anchors[b] = anchor
            row = []
            for t in tokens:
                u = 1 / (1 + math.exp(-10 * (losses[b][t] - LN2))) if mask[b][t] else 0.0
                d = t - anchor
                if not errors or d < 0:
                    m = 1.0
                elif d < 50 * self.expansion[b]:
                    m = math.exp(-d / 20)
                else:
                    m = 0.01
                row.append(u * m)
            weights.append(row)
        if sum(map(sum, weights)) <= 1e-5:
            return [[1.0 if on else 0.0 for on in row] for row in mask]
        return weights


def some_losses(source: random.Random, rows: int, tokens: int) -> Rows:
    def draw() -> float:
        return source.choice([0.0, 1e-4, LN2, source.uniform(0, 1.5), source.uniform(0, 12)])

    return [[draw() for _ in range(tokens)] for _ in range(rows)]


def some_flags(source: random.Random, rows: int, tokens: int, share: float) -> Flags:
    return [[source.random() < share for _ in range(tokens)] for _ in range(rows)]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), tokens=st.integers(1, 8), easy=st.booleans())
def test_ot_agrees_with_a_slow_computation(seed: int, rows: int, tokens: int, easy: bool) -> None:
    source = random.Random(seed)
    losses, mask = some_losses(source, rows, tokens), some_flags(source, rows, tokens, 0.7)
    if easy:
        losses = [[min(loss, LN2) for loss in row] for row in losses]
    tensors = torch.tensor(losses, dtype=torch.float64), torch.tensor(mask)
    for idle in ("sft", "zero"):
        loss = weighted_mean(tensors[0], memft_ot(*tensors, idle=idle))
        assert loss.item() == pytest.approx(slow_ot(losses, mask, idle == "zero"), rel=1e-12)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 3), tokens=st.integers(1, 240), steps=st.integers(1, 14))
def test_the_sliding_window_agrees_with_a_slow_computation(seed: int, rows: int, tokens: int, steps: int) -> None:
    source = random.Random(seed)
    slow, state = SlowSlidingWindow(rows), SlidingState.start(rows)
    mask = some_flags(source, rows, tokens, source.choice([0.0, 0.8, 1.0]))
    correct = some_flags(source, rows, tokens, source.choice([0.5, 0.97, 1.0]))
    for _ in range(steps):
        losses = some_losses(source, rows, tokens)
        if source.random() < 0.1:
            correct = some_flags(source, rows, tokens, 0.97)
        weights, state = memft_sw(torch.tensor(losses), torch.tensor(mask), torch.tensor(correct), state)
        expected = slow.step(losses, mask, correct)
        torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=1e-8)
        assert state.anchor.tolist() == slow.anchors
        assert state.patience.tolist() == slow.patience
        assert state.expansion.tolist() == slow.expansion
