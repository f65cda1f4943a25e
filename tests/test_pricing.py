"""What values share is paid once, and what they do not share costs what the base model says."""

import doctest
import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import loramem.planning.cost
from loramem.planning.cost import SHARE, costs_bits


def drawn(values: int, tokens: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(tokens)] for _ in range(values)]


def flat(values: list[list[int]], prob: float) -> list[list[float]]:
    return [[prob] * len(value) for value in values]


def test_the_example_runs() -> None:
    assert doctest.testmod(loramem.planning.cost).failed == 0


def test_nothing_costs_nothing() -> None:
    assert costs_bits([], []) == []
    assert costs_bits([[]], [[]]) == [0.0]


def test_two_values_by_hand() -> None:
    # [7] under p = 1/8 costs 3 − 1 bits: every expert begins as the base model. Then each has the weight 1/4, and the
    # three that count have seen 7 once in each of its contexts (place 0, after nothing, after nothing twice):
    # (1 + 1/8) / 2 = 9/16. So p = (1/8 + 3 · 9/16) / 4 = 29/64 for another 7, and for an unseen token of the same
    # base probability (1/8 + 3 · 1/16) / 4 = 5/64.
    assert costs_bits([[7], [7]], [[1 / 8]] * 2) == pytest.approx([2.0, math.log2(64 / 29) - 1])
    assert costs_bits([[7], [3]], [[1 / 8]] * 2) == pytest.approx([2.0, math.log2(64 / 5) - 1])


def test_experts_that_did_well_gain_weight_by_hand() -> None:
    # After the second 7 the joint weights are 1/32 and three times 9/64, of 29/64: the base model keeps 2/29, each of
    # the others has 9/29, and all but SHARE of these stays. Seen twice, the counting experts say (2 + 1/8) / 3.
    base, other = (((1 - SHARE) * weight / 29 + SHARE / 4) for weight in (2, 9))
    expected = -math.log2(base / 8 + 3 * other * (2 + 1 / 8) / 3) - 1
    assert costs_bits([[7]] * 3, [[1 / 8]] * 3)[2] == pytest.approx(max(0.0, expected))
    # The third token is where the floor of zero first matters: p = 0.68, and 0.5 is all that is needed.
    assert expected < 0


def test_a_shared_format_is_paid_once() -> None:
    # Ten random digits, each p = 0.02 under the base model, which spreads its mass over other tokens as well. Once it
    # is known that they are digits, each costs log2 10 − 1 bits; before, log2 50 − 1.
    values = drawn(300, 10, 10)
    costs = costs_bits(values, flat(values, 0.02))
    known, unknown = 10 * (math.log2(10) - 1), 10 * (math.log2(50) - 1)
    assert costs[0] == pytest.approx(unknown, rel=0.05)
    assert sum(costs[-100:]) / 100 == pytest.approx(known, rel=0.05)
    assert 300 * known < sum(costs) < 300 * known + 0.1 * 300 * (unknown - known)


@pytest.mark.parametrize("seed", range(3))
def test_values_that_share_nothing_cost_what_the_base_model_says(seed: int) -> None:
    values = drawn(30, 20, 5000, seed)
    cost = sum(costs_bits(values, flat(values, 1 / 5000)))
    assert cost == pytest.approx(600 * (math.log2(5000) - 1), abs=10)


def test_a_value_written_again_costs_almost_nothing() -> None:
    values = drawn(1, 20, 5000) * 3
    first, second, third = costs_bits(values, flat(values, 1 / 5000))
    assert first == pytest.approx(20 * (math.log2(5000) - 1), rel=0.02)
    assert second < 1
    assert third == 0


def test_a_repetition_inside_one_value_is_seen() -> None:
    period = drawn(1, 10, 5000)[0]
    (cost,) = costs_bits([period * 10], [[1 / 5000] * 100])
    assert cost < 1.2 * 10 * (math.log2(5000) - 1)


def test_values_that_the_base_model_knows_cost_nothing() -> None:
    values = drawn(20, 10, 5000)
    assert sum(costs_bits(values, flat(values, 0.99))) == 0


def test_a_probability_of_zero_has_a_price() -> None:
    (cost,) = costs_bits([[1, 2, 3]], [[0.0] * 3])
    assert 100 < cost < math.inf


def test_values_of_one_format_cost_as_much_in_any_order() -> None:
    values, shuffled = drawn(200, 10, 10), drawn(200, 10, 10)
    random.Random(1).shuffle(shuffled)
    assert shuffled != values
    costs, others = (costs_bits(order, flat(order, 0.02)) for order in (values, shuffled))
    assert costs != others
    assert sum(others) == pytest.approx(sum(costs), rel=0.02)


def test_who_comes_first_pays_for_what_is_shared() -> None:
    prefixed, bare = [1, 2, 3, 4], [5, 6, 3, 4]
    first, second = costs_bits([prefixed, bare], [[1 / 64] * 4] * 2)
    assert costs_bits([bare, prefixed], [[1 / 64] * 4] * 2)[0] == pytest.approx(first)
    assert second < first


def test_as_many_probabilities_as_tokens_are_needed() -> None:
    with pytest.raises(ValueError, match="shorter"):
        costs_bits([[1, 2]], [[0.5]])
    with pytest.raises(ValueError, match="shorter"):
        costs_bits([[1], [2]], [[0.5]])


CHANGING = [[kind] for kind in range(12) for _ in range(100)]  # a hundred times the same, then another
TOKENS = st.tuples(st.integers(0, 5), st.floats(1e-6, 1))


@given(values=st.lists(st.lists(TOKENS, min_size=1, max_size=12), max_size=40))
@example(values=[[(token, 0.5)] for (token,) in CHANGING])
def test_the_cost_is_never_negative_and_never_above_the_base_models_code_length(
    values: list[list[tuple[int, float]]],
) -> None:
    # The mixture holds the base model with weight 1/4, which never loses more than a share of SHARE per token beside
    # what it loses by its own probabilities: −Σ log2 p <= −Σ log2 p_base + log2 4 − tokens · log2(1 − SHARE). After
    # any token it has at least SHARE / 4, so that none costs more than log2(4 / SHARE) bits above its own.
    tokens = [[token for token, _ in value] for value in values]
    probs = [[prob for _, prob in value] for value in values]
    costs = costs_bits(tokens, probs)
    lengths = [-math.log2(prob) for value in probs for prob in value]
    assert all(cost >= 0 for cost in costs)
    assert sum(costs) <= sum(lengths) + 2 - len(lengths) * math.log2(1 - SHARE) + 1e-6
    for cost, value in zip(costs, probs, strict=True):
        most = sum(max(0.0, -math.log2(prob) + math.log2(4 / SHARE) - 1) for prob in value)
        assert cost <= most + 1e-6


def test_data_that_change_can_cost_more_than_the_base_model_alone_would() -> None:
    # The bit per token that greedy decoding needs not is not saved up: where an expert is surer than p = 0.5 it gains
    # weight but no bits, and at a change it loses them. Here the base model alone, p = 0.5 throughout, costs nothing.
    costs = costs_bits(CHANGING, flat(CHANGING, 0.5))
    assert sum(costs) > 2 - len(CHANGING) * math.log2(1 - SHARE)
    assert costs.index(max(costs)) == 100  # the first change
