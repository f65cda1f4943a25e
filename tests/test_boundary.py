"""The success boundary follows the outcomes, keeps to its signs, and stays finite when they say little."""

import dataclasses
import doctest
import json
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loramem.planning.success
from loramem.errors import BoundaryError, LoramemError
from loramem.planning.success import SuccessBoundary, fit, reliability
from loramem.records.outcome import Outcome

PER_RANK = 500


def odds(rho: float, tau: float, steepness: float, parameters: float, cost: float, length: float) -> float:
    return float((parameters / (rho * cost * (length / 1000) ** tau)) ** steepness)


def drawn(
    count: int, rho: float = 2.0, tau: float = 0.3, steepness: float = 5.0, seed: int = 0, kind: str = "random"
) -> list[Outcome]:
    """Outcomes of a known boundary."""
    chance, outcomes = random.Random(seed), []
    for _ in range(count):
        length = chance.choice((200, 500, 1000, 2000))
        cost = 2.2 * length
        rank = max(1, round(cost * math.exp(chance.uniform(-1.5, 3.0)) / PER_RANK))
        ratio = odds(rho, tau, steepness, rank * PER_RANK, cost, length)
        outcomes.append(Outcome(kind, rank, length, rank * PER_RANK, cost, chance.random() < ratio / (1 + ratio)))
    return outcomes


def at_densities(densities: Sequence[float], certified: Sequence[bool], length: int = 1000) -> list[Outcome]:
    """Outcomes at these parameters per bit, of values that cost 1000 bits."""
    return [Outcome("random", 1, length, 1000 * d, 1000.0, ok) for d, ok in zip(densities, certified, strict=True)]


SOME = fit(drawn(60))
boundaries = st.builds(
    lambda rho, tau, steepness: dataclasses.replace(
        SOME, parameters_per_bit=rho, length_exponent=tau, steepness=steepness
    ),
    st.floats(0.01, 100),
    st.floats(0, 2),
    st.floats(0.1, 30),
)
sizes = st.floats(1, 1e7)
lengths = st.integers(1, 100_000)


def test_the_example_runs() -> None:
    assert doctest.testmod(loramem.planning.success).failed == 0


# --- asking


def test_probability_and_inverse_by_hand() -> None:
    boundary = dataclasses.replace(SOME, parameters_per_bit=2.0, length_exponent=0.5, steepness=3.0)
    # 100 bits at 4000 tokens need 2 · 100 · √4 = 400 parameters for even odds, twice as many for odds of 2³ = 8.
    assert boundary.probability(400, 100.0, 4000) == pytest.approx(1 / 2)
    assert boundary.probability(800, 100.0, 4000) == pytest.approx(8 / 9)
    assert boundary.parameters_for(8 / 9, 100.0, 4000) == pytest.approx(800)
    assert boundary.rank_for_success(4000, 100.0, 300, probability=8 / 9) == 3
    assert boundary.rank_for_success(4000, 100.0, 10_000, probability=8 / 9) == 1


@given(boundary=boundaries, cost=sizes, length=lengths, probability=st.floats(0.001, 0.999))
def test_the_inverse_undoes_the_probability(
    boundary: SuccessBoundary, cost: float, length: int, probability: float
) -> None:
    parameters = boundary.parameters_for(probability, cost, length)
    assert boundary.probability(parameters, cost, length) == pytest.approx(probability, rel=1e-9)


@given(boundary=boundaries, cost=sizes, length=lengths, per_rank=st.floats(1, 1e6), wanted=st.floats(0.05, 0.99))
def test_the_rank_for_success_is_the_least_that_reaches_it(
    boundary: SuccessBoundary, cost: float, length: int, per_rank: float, wanted: float
) -> None:
    rank = boundary.rank_for_success(length, cost, per_rank, wanted)
    assert isinstance(rank, int)
    assert rank >= 1
    assert boundary.probability(rank * per_rank, cost, length) >= wanted - 1e-6
    if rank > 1:
        assert boundary.probability((rank - 1) * per_rank, cost, length) < wanted + 1e-6


@given(boundary=boundaries, parameters=sizes, cost=sizes, length=lengths, factor=st.floats(1.01, 100))
def test_more_parameters_never_hurt_and_more_bits_or_tokens_never_help(
    boundary: SuccessBoundary, parameters: float, cost: float, length: int, factor: float
) -> None:
    here = boundary.probability(parameters, cost, length)
    assert 0 <= here <= 1
    assert boundary.probability(parameters * factor, cost, length) >= here
    assert boundary.probability(parameters, cost * factor, length) <= here
    assert boundary.probability(parameters, cost, length * factor) <= here
    if 0.001 < here < 0.999 and cost > 1:
        assert boundary.probability(parameters * factor, cost, length) > here
        assert boundary.probability(parameters, cost * factor, length) < here


def test_values_that_the_base_model_knows_cost_a_bit() -> None:
    assert SOME.probability(100, 0.0, 1000) == SOME.probability(100, 1.0, 1000) > 0.99
    assert SOME.rank_for_success(1000, 0.0, PER_RANK) == 1


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_impossible_questions_are_refused(wrong: float) -> None:
    with pytest.raises(BoundaryError, match="parameters must be positive"):
        SOME.probability(wrong, 100.0, 1000)
    with pytest.raises(BoundaryError, match="length must be positive"):
        SOME.probability(100, 100.0, wrong)
    with pytest.raises(BoundaryError, match="parameters per rank must be positive"):
        SOME.rank_for_success(1000, 100.0, wrong)
    with pytest.raises(BoundaryError, match="probability must lie between 0 and 1"):
        SOME.parameters_for(wrong, 100.0, 1000)
    if wrong != 0:
        with pytest.raises(BoundaryError, match="cost bits must be at least 0"):
            SOME.parameters_for(0.9, wrong, 1000)
    with pytest.raises(BoundaryError, match="must lie between 0 and 1, not 1"):
        SOME.rank_for_success(1000, 100.0, PER_RANK, probability=1.0)


def test_a_probability_out_of_reach_is_refused_with_its_price() -> None:
    soft = dataclasses.replace(SOME, steepness=0.001)
    with pytest.raises(BoundaryError, match=r"would take e\^\d{4} parameters"):
        soft.parameters_for(0.99, 100.0, 1000)


def test_extrapolation_is_outside_the_densities_or_the_lengths() -> None:
    boundary = fit(at_densities([0.5, 1, 2, 4, 8], [False, False, True, True, True]))
    assert boundary.density_range == (0.5, 8.0)
    assert not boundary.extrapolates(500, 1000.0, 1000) and not boundary.extrapolates(8000, 1000.0, 1000)
    assert boundary.extrapolates(499, 1000.0, 1000) and boundary.extrapolates(8001, 1000.0, 1000)
    assert boundary.extrapolates(1000, 1000.0, 999) and boundary.extrapolates(1000, 1000.0, 1001)


def test_a_kind_needs_its_own_number_of_parameters_and_an_unknown_one_the_average() -> None:
    boundary = dataclasses.replace(SOME, kind_needs={"easy": 0.5, "hard": 2.0})
    for ask in (
        lambda kind: boundary.parameters_for(0.9, 100.0, 500, kind),
        lambda kind: boundary.rank_for_success(500, 1e6, 1.0, kind=kind),
    ):
        assert ask("easy") == pytest.approx(ask(None) / 2, rel=1e-3)
        assert ask("hard") == pytest.approx(ask(None) * 2, rel=1e-3)
        assert ask("never seen") == ask(None)
    assert boundary.probability(50, 100.0, 500, "easy") == pytest.approx(boundary.probability(200, 100.0, 500, "hard"))


# --- fitting


def test_many_outcomes_give_their_boundary_back() -> None:
    boundary = fit(drawn(3000))
    assert boundary.parameters_for(0.5, 1000.0, 1000, "random") == pytest.approx(2000, rel=0.05)
    assert boundary.length_exponent == pytest.approx(0.3, abs=0.06)
    assert boundary.steepness == pytest.approx(5.0, rel=0.12)
    assert (boundary.outcomes, [*boundary.kind_needs], boundary.warnings) == (3000, ["random"], ())
    assert boundary.certified == sum(outcome.certified for outcome in drawn(3000))


def test_kinds_that_need_different_numbers_of_parameters_are_told_apart() -> None:
    boundary = fit([*drawn(400, rho=1.0, kind="easy"), *drawn(400, rho=4.0, kind="hard", seed=1)])
    assert boundary.parameters_for(0.5, 1000.0, 1000, "easy") == pytest.approx(1000, rel=0.15)
    assert boundary.parameters_for(0.5, 1000.0, 1000, "hard") == pytest.approx(4000, rel=0.15)
    assert boundary.kind_needs["easy"] < 1 < boundary.kind_needs["hard"]


def test_a_kind_with_one_outcome_is_drawn_to_the_others() -> None:
    many = drawn(400, rho=1.0, kind="many")
    failed = [Outcome("new", 1, 1000, 3000, 1000.0, certified=False)] * 5  # the others nearly always hold this
    beside = fit([*many, failed[0]]).parameters_for(0.5, 1000.0, 1000, "new")
    assert 1100 < beside < fit([*many, *failed]).parameters_for(0.5, 1000.0, 1000, "new")
    assert beside < 0.7 * fit(failed).parameters_for(0.5, 1000.0, 1000, "new")  # where nothing draws it down


def test_a_hundred_outcomes_place_the_boundary_within_a_quarter() -> None:
    for seed in range(10):
        boundary = fit(drawn(100, seed=seed))
        assert boundary.parameters_for(0.9, 2200.0, 1000, "random") == pytest.approx(2 * 2200 * 9 ** (1 / 5), rel=0.25)


def test_the_fit_is_the_best_of_its_neighbourhood() -> None:
    outcomes, found = drawn(80, seed=3), fit(drawn(80, seed=3))

    def loss(rho: float, kappa: float, tau: float, steepness: float) -> float:
        ratios = [odds(rho * kappa, tau, steepness, o.parameters, o.cost_bits, o.length) for o in outcomes]
        data = sum(math.log1p(1 / r if o.certified else r) for o, r in zip(outcomes, ratios, strict=True))
        prior = (math.log(rho) / 1.5) ** 2 + (tau / 0.5) ** 2 + (math.log(steepness / 4) / 0.8) ** 2
        return data + (prior + (math.log(kappa) / 0.5) ** 2) / 2

    best = (found.parameters_per_bit, found.kind_needs["random"], found.length_exponent, found.steepness)
    for step in (0.9, 0.99, 1.01, 1.1):
        for index in range(4):
            other = [value * step if place == index else value for place, value in enumerate(best)]
            assert loss(*other) > loss(*best)


def test_longer_is_never_easier_whatever_the_outcomes_say() -> None:
    easier = [
        *at_densities([1, 2, 3, 4, 5, 6], [False] * 6, length=200),
        *at_densities([1, 2, 3, 4, 5, 6], [True] * 6, length=2000),
    ]
    assert fit(easier).length_exponent == 0


def test_more_parameters_never_hurt_whatever_the_outcomes_say() -> None:
    boundary = fit(at_densities([1, 2, 4, 8, 16, 32] * 3, [True, True, True, False, False, False] * 3))
    assert 0 < boundary.steepness < 1
    assert "More parameters hardly helped in these outcomes" in boundary.warnings[0]


def test_separable_outcomes_give_a_finite_boundary_between_them() -> None:
    densities = [0.25, 0.5, 1, 1.5, 3, 4, 8, 16]
    boundary = fit(at_densities(densities * 5, [d > 2 for d in densities] * 5))
    assert 1.5 < boundary.parameters_per_bit < 3
    assert 4 < boundary.steepness < 50
    assert boundary.probability(1500, 1000.0, 1000) < 0.5 < boundary.probability(3000, 1000.0, 1000)
    assert boundary.warnings == ()


def test_without_a_failure_the_boundary_is_usable_and_says_what_it_is() -> None:
    boundary = fit(at_densities([0.3, 0.5, 1, 2, 3, 4], [True] * 6))
    assert "Every outcome was certified" in boundary.warnings[0]
    assert 0.01 < boundary.parameters_per_bit < 0.3
    assert boundary.probability(300, 1000.0, 1000) > 0.7


@pytest.mark.parametrize("most", [1.0, 3.0, 30.0])
def test_without_a_success_the_boundary_asks_for_more_than_was_tried(most: float) -> None:
    boundary = fit(at_densities([most / 4, most / 2, most] * 4, [False] * 12))
    assert "No outcome was certified" in boundary.warnings[0]
    assert boundary.probability(1000 * most, 1000.0, 1000, "random") < 0.3
    assert most < boundary.parameters_for(0.9, 1000.0, 1000, "random") / 1000 < 10 * most


def test_outcomes_of_one_density_leave_the_steepness_to_the_prior() -> None:
    boundary = fit(at_densities([2.0] * 6, [True, False] * 3))
    assert boundary.steepness == pytest.approx(4, rel=0.1)
    assert boundary.parameters_per_bit == pytest.approx(2, rel=0.1)
    assert "steepness is the prior's guess" in boundary.warnings[0]


def test_too_few_outcomes_are_refused() -> None:
    with pytest.raises(BoundaryError, match=r"4 outcomes are too few for a boundary\. Write at least 5") as error:
        fit(drawn(4))
    assert isinstance(error.value, ValueError) and isinstance(error.value, LoramemError)
    assert fit(drawn(5)).outcomes == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank must be positive, not 0"),
        ({"length": -1}, "length must be positive, not -1"),
        ({"parameters": math.inf}, "parameters must be positive, not inf"),
        ({"cost_bits": -0.5}, r"cost bits must be at least 0, not -0\.5"),
        ({"cost_bits": math.nan}, "cost bits must be at least 0, not nan"),
    ],
)
def test_an_outcome_of_impossible_numbers_is_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(BoundaryError, match=message):
        dataclasses.replace(drawn(1)[0], **changed)


# --- JSON


def test_a_boundary_comes_back_from_json_byte_for_byte() -> None:
    for boundary in (SOME, fit(at_densities([0.3, 0.5, 1, 2, 3], [True] * 5))):
        copy = SuccessBoundary.from_json(boundary.to_json())
        assert copy == boundary
        assert copy.to_json() == boundary.to_json()


def edited(**changed: object) -> str:
    return json.dumps({**json.loads(SOME.to_json()), **changed})


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        "{}",
        edited(extra=1),
        edited(steepness=0.0),
        edited(steepness=math.nan),
        edited(length_exponent=-0.1),
        edited(parameters_per_bit="2"),
        edited(kinds=None),
        json.dumps({key: value for key, value in json.loads(SOME.to_json()).items() if key != "outcomes"}),
    ],
)
def test_what_is_not_a_boundary_is_not_read_as_one(content: str) -> None:
    with pytest.raises(BoundaryError):
        SuccessBoundary.from_json(content)


# --- reliability


def test_the_reliability_table_holds_every_outcome_once() -> None:
    outcomes = drawn(200, seed=4)
    found = reliability(outcomes, bins=4)
    assert [(row.low, row.high) for row in found.bins] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert sum(row.count for row in found.bins) == 200
    assert all(row.low <= row.predicted <= row.high for row in found.bins)
    certified = sum(row.count * row.observed for row in found.bins)
    assert certified == pytest.approx(sum(outcome.certified for outcome in outcomes))


def test_a_probability_of_one_is_in_the_last_bin() -> None:
    sure = [Outcome("random", rank, 1000, 1e30 * rank, 1000.0, True) for rank in range(1, 21)]
    [row] = reliability(sure).bins
    assert (row.high, row.count, row.predicted) == (1, 20, 1)


def test_probabilities_of_outcomes_that_follow_the_model_can_be_believed() -> None:
    found = reliability(drawn(1500, steepness=2.0, seed=5))
    assert len(found.bins) == 5
    assert all(row.observed == pytest.approx(row.predicted, abs=0.08) for row in found.bins)


def test_scores_are_those_of_boundaries_that_have_not_seen_the_outcome() -> None:
    outcomes = [dataclasses.replace(o, kind=f"{index:02}") for index, o in enumerate(drawn(12, seed=6))]
    found = reliability(outcomes, folds=12)
    surprise = brier = 0.0
    for outcome in outcomes:
        boundary = fit([other for other in outcomes if other != outcome])
        chance = boundary.probability(outcome.parameters, outcome.cost_bits, outcome.length)
        surprise -= math.log(chance if outcome.certified else 1 - chance) / 12
        brier += (chance - outcome.certified) ** 2 / 12
    assert found.log_loss == pytest.approx(surprise)
    assert found.brier == pytest.approx(brier)
    assert reliability(outcomes, folds=100) == found


def test_repeats_of_a_write_do_not_judge_each_other() -> None:
    # Four writes, each repeated, whose outcomes contradict the model: seen repeats would make them look predictable.
    outcomes = at_densities([1, 4, 16, 64] * 10, [True, False, True, False] * 10)
    singles = [dataclasses.replace(o, kind=str(index)) for index, o in enumerate(outcomes)]
    assert reliability(outcomes, folds=10).log_loss > 1.2 * reliability(singles, folds=10).log_loss


def test_cross_validation_needs_something_to_leave_out() -> None:
    with pytest.raises(BoundaryError, match="two different writes"):
        reliability(at_densities([2.0] * 20, [True, False] * 10))
    for options in ({"bins": 0}, {"folds": 1}):
        with pytest.raises(BoundaryError, match="needs a bin, two folds"):
            reliability(drawn(50), **options)
    with pytest.raises(BoundaryError, match="4 outcomes are too few"):
        reliability(drawn(5))
