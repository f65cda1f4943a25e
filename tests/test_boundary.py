"""The success boundary follows the trials, keeps to its sign, and stays finite when they say little."""

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
from loramem.planning.success import LEAST_LAW_RANK, SuccessBoundary, Trial, fit, reliability
from loramem.records.outcome import Outcome


def drawn(count: int, need: float = 2.0, steepness: float = 5.0, seed: int = 0) -> list[Trial]:
    """Trials of a known boundary."""
    chance, trials = random.Random(seed), []
    for _ in range(count):
        share = need * math.exp(chance.uniform(-1.0, 1.0))
        odds = (share / need) ** steepness
        trials.append(Trial(share, chance.random() < odds / (1 + odds)))
    return trials


def at_shares(shares: Sequence[float], certified: Sequence[bool]) -> list[Trial]:
    return [Trial(share, ok) for share, ok in zip(shares, certified, strict=True)]


SOME = fit(drawn(60))
boundaries = st.builds(
    lambda need, steepness: dataclasses.replace(SOME, need=need, steepness=steepness),
    st.floats(0.1, 10),
    st.floats(0.5, 30),
)
law_ranks = st.floats(LEAST_LAW_RANK, 1000)


def test_the_example_runs() -> None:
    assert doctest.testmod(loramem.planning.success).failed == 0


# --- asking


def test_probability_and_inverse_by_hand() -> None:
    boundary = dataclasses.replace(SOME, need=1.5, steepness=3.0)
    # Beside a law's rank of 4 even odds are at rank 6, odds of 2³ = 8 at rank 12, of 1/8 at rank 3.
    assert boundary.probability(6, 4.0) == pytest.approx(1 / 2)
    assert boundary.probability(12, 4.0) == pytest.approx(8 / 9)
    assert boundary.probability(3, 4.0) == pytest.approx(1 / 9)
    assert [boundary.rank_for(odds, 4.0) for odds in (1 / 9, 1 / 2, 8 / 9)] == pytest.approx([3, 6, 12])


@given(boundary=boundaries, law_rank=law_ranks, wanted=st.floats(0.05, 0.99))
def test_at_the_rank_for_a_probability_it_is_just_reached(
    boundary: SuccessBoundary, law_rank: float, wanted: float
) -> None:
    rank = boundary.rank_for(wanted, law_rank)
    assert boundary.probability(rank, law_rank) == pytest.approx(wanted, abs=1e-9)


@given(boundary=boundaries, rank=st.floats(1, 1000), law_rank=law_ranks, factor=st.floats(1.01, 100))
def test_more_rank_never_hurts_and_a_higher_law_rank_never_helps(
    boundary: SuccessBoundary, rank: float, law_rank: float, factor: float
) -> None:
    here = boundary.probability(rank, law_rank)
    assert 0 <= here <= 1
    assert boundary.probability(rank * factor, law_rank) >= here
    assert boundary.probability(rank, law_rank * factor) <= here
    if 0.001 < here < 0.999:
        assert boundary.probability(rank * factor, law_rank) > here
        assert boundary.probability(rank, law_rank * factor) < here


def test_values_that_the_base_model_orders_take_the_least_rank() -> None:
    assert SOME.probability(1, 0.0) == SOME.probability(1, LEAST_LAW_RANK) > 0.99
    assert SOME.rank_for(0.95, 0.0) == SOME.rank_for(0.95, LEAST_LAW_RANK) < 1


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_impossible_questions_are_refused(wrong: float) -> None:
    with pytest.raises(BoundaryError, match="rank must be positive"):
        SOME.probability(wrong, 2.0)
    with pytest.raises(BoundaryError, match="probability must lie between 0 and 1"):
        SOME.rank_for(wrong, 2.0)
    with pytest.raises(BoundaryError, match="share must be positive"):
        Trial(wrong, certified=True)
    if wrong != 0:
        with pytest.raises(BoundaryError, match="law rank must be at least 0"):
            SOME.rank_for(0.9, wrong)
    with pytest.raises(BoundaryError, match="must lie between 0 and 1, not 1"):
        SOME.rank_for(1.0, 2.0)


def test_a_probability_out_of_reach_is_refused_with_its_price() -> None:
    with pytest.raises(BoundaryError, match=r"would take a rank of e\^\d{4}"):
        dataclasses.replace(SOME, steepness=0.001).rank_for(0.99, 2.0)


def test_extrapolation_is_outside_the_shares_that_were_tried() -> None:
    boundary = fit(at_shares([0.5, 1, 2, 4, 8], [False, False, True, True, True]))
    assert boundary.share_range == (0.5, 8.0)
    assert not boundary.extrapolates(2, 4.0) and not boundary.extrapolates(32, 4.0)
    assert boundary.extrapolates(1, 4.0) and boundary.extrapolates(33, 4.0)


# --- fitting


def test_many_trials_give_their_boundary_back() -> None:
    boundary = fit(drawn(3000))
    assert boundary.need == pytest.approx(2.0, rel=0.05)
    assert boundary.steepness == pytest.approx(5.0, rel=0.12)
    assert (boundary.trials, boundary.warnings) == (3000, ())
    assert boundary.certified == sum(trial.certified for trial in drawn(3000))


def test_a_hundred_trials_place_the_boundary_within_a_quarter() -> None:
    for seed in range(10):
        assert fit(drawn(100, seed=seed)).need == pytest.approx(2.0, rel=0.25)


def test_the_fit_is_the_best_of_its_neighbourhood() -> None:
    trials, found = drawn(80, seed=3), fit(drawn(80, seed=3))

    def loss(need: float, steepness: float) -> float:
        odds = [(trial.share / need) ** steepness for trial in trials]
        data = sum(math.log1p(1 / o if trial.certified else o) for o, trial in zip(odds, trials, strict=True))
        return data + ((math.log(need / 2.4) / 0.3) ** 2 + (math.log(steepness / 8) / 0.8) ** 2) / 2

    best = (found.need, found.steepness)
    for step in (0.9, 0.99, 1.01, 1.1):
        for index in range(2):
            other = [value * step if place == index else value for place, value in enumerate(best)]
            assert loss(*other) > loss(*best)


def test_more_rank_never_hurts_whatever_the_trials_say() -> None:
    boundary = fit(at_shares([1, 2, 4, 8, 16, 32] * 3, [True, True, True, False, False, False] * 3))
    assert 0 < boundary.steepness < 1
    assert "More rank hardly helped in these outcomes" in boundary.warnings[0]


def test_separable_trials_give_a_finite_boundary_between_them() -> None:
    shares = [0.25, 0.5, 1, 1.5, 3, 4, 8, 16]
    boundary = fit(at_shares(shares * 5, [share > 2 for share in shares] * 5))
    assert 1.5 < boundary.need < 3
    assert 4 < boundary.steepness < 50
    assert boundary.warnings == ()


def test_without_a_failure_the_boundary_is_usable_and_says_what_it_is() -> None:
    boundary = fit(at_shares([0.6, 0.8, 1, 2, 3, 4], [True] * 6))
    assert "Every outcome was certified" in boundary.warnings[0]
    assert 0.3 < boundary.need < 1.6
    assert boundary.probability(2.4, 1.0) > 0.5


@pytest.mark.parametrize("most", [1.5, 3.0])
def test_without_a_success_the_boundary_asks_for_more_than_was_tried(most: float) -> None:
    boundary = fit(at_shares([most / 4, most / 2, most] * 4, [False] * 12))
    assert "No outcome was certified" in boundary.warnings[0]
    assert boundary.probability(most, 1.0) < 0.4
    assert boundary.rank_for(0.9, 100.0) > 100 * most


def test_trials_of_one_share_leave_the_steepness_to_the_prior() -> None:
    boundary = fit(at_shares([2.4] * 6, [True, False] * 3))
    assert boundary.steepness == pytest.approx(8, rel=0.1)
    assert boundary.need == pytest.approx(2.4, rel=0.1)
    assert "steepness is the prior's guess" in boundary.warnings[0]


def test_too_few_trials_are_refused() -> None:
    with pytest.raises(BoundaryError, match=r"4 outcomes are too few for a boundary\. Write at least 5") as error:
        fit(drawn(4))
    assert isinstance(error.value, ValueError) and isinstance(error.value, LoramemError)
    assert fit(drawn(5)).trials == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank must be positive, not 0"),
        ({"length": -1}, "length must be positive, not -1"),
        ({"parameters": math.inf}, "parameters must be positive, not inf"),
        ({"cost_bits": -0.5}, r"cost bits must be at least 0, not -0\.5"),
        ({"cost_bits": math.nan}, "cost bits must be at least 0, not nan"),
        ({"vocabulary": 0.0}, r"vocabulary must be positive, not 0\.0"),
    ],
)
def test_an_outcome_of_impossible_numbers_is_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(BoundaryError, match=message):
        dataclasses.replace(Outcome("random", 1, 100, 500, 1000.0, certified=True, vocabulary=90.0), **changed)


# --- JSON


def test_a_boundary_comes_back_from_json_byte_for_byte() -> None:
    for boundary in (SOME, fit(at_shares([0.3, 0.5, 1, 2, 3], [True] * 5))):
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
        edited(need=-0.1),
        edited(need="2"),
        edited(share_range=None),
        json.dumps({key: value for key, value in json.loads(SOME.to_json()).items() if key != "trials"}),
    ],
)
def test_what_is_not_a_boundary_is_not_read_as_one(content: str) -> None:
    with pytest.raises(BoundaryError):
        SuccessBoundary.from_json(content)


# --- reliability


def test_the_reliability_table_holds_every_trial_once() -> None:
    trials = drawn(200, seed=4)
    found = reliability(trials, bins=4)
    assert [(row.low, row.high) for row in found.bins] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert sum(row.count for row in found.bins) == 200
    assert all(row.low <= row.predicted <= row.high for row in found.bins)
    certified = sum(row.count * row.observed for row in found.bins)
    assert certified == pytest.approx(sum(trial.certified for trial in trials))


def test_a_probability_of_one_is_in_the_last_bin() -> None:
    [row] = reliability([Trial(1e30 * rank, certified=True) for rank in range(1, 21)]).bins
    assert (row.high, row.count, row.predicted) == (1, 20, 1)


def test_probabilities_of_trials_that_follow_the_model_can_be_believed() -> None:
    found = reliability(drawn(1500, steepness=2.0, seed=5))
    assert all(row.observed == pytest.approx(row.predicted, abs=0.08) for row in found.bins)


def test_scores_are_those_of_boundaries_that_have_not_seen_the_trial() -> None:
    trials = drawn(12, seed=6)
    found = reliability(trials, folds=12)
    surprise = brier = 0.0
    for trial in trials:
        boundary = fit([other for other in trials if other != trial])
        chance = boundary.probability(trial.share, 1.0)
        surprise -= math.log(chance if trial.certified else 1 - chance) / 12
        brier += (chance - trial.certified) ** 2 / 12
    assert found.log_loss == pytest.approx(surprise)
    assert found.brier == pytest.approx(brier)
    assert reliability(trials, folds=100) == found


def test_repeats_of_a_write_do_not_judge_each_other() -> None:
    # Four writes, each repeated, whose outcomes contradict the model: seen repeats would make them look predictable.
    trials = at_shares([0.5, 1, 2, 4] * 10, [True, False, True, False] * 10)
    singles = [dataclasses.replace(trial, share=trial.share * (1 + 1e-9 * n)) for n, trial in enumerate(trials)]
    assert reliability(trials, folds=10).log_loss > 1.1 * reliability(singles, folds=10).log_loss


def test_cross_validation_needs_something_to_leave_out() -> None:
    with pytest.raises(BoundaryError, match="two different writes"):
        reliability(at_shares([2.0] * 20, [True, False] * 10))
    for options in ({"bins": 0}, {"folds": 1}):
        with pytest.raises(BoundaryError, match="needs a bin, two folds"):
            reliability(drawn(50), **options)
    with pytest.raises(BoundaryError, match="4 outcomes are too few"):
        reliability(drawn(5))
