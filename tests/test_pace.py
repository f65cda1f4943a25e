"""The pace follows what writes visited, and never says that a denser write takes less."""

import doctest
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loramem.planning.visits
from loramem.planning.visits import Pace, fit
from loramem.records.outcome import Outcome


def outcome(parameters: float, visits: float | None, certified: bool = True, cost_bits: float = 1000.0) -> Outcome:
    return Outcome("hex", 1, 100, parameters, cost_bits, certified, visits)


def test_the_example_runs() -> None:
    assert doctest.testmod(loramem.planning.visits).failed == 0


def test_visits_by_hand() -> None:
    pace = Pace(at_one_bit=40.0, exponent=0.5, outcomes=9)
    assert pace.visits(1000, 1000.0) == pytest.approx(40)
    assert pace.visits(4000, 1000.0) == pytest.approx(20)  # a quarter of a bit per parameter: half as often
    assert pace.visits(100, 900.0) == pytest.approx(120)


def test_every_record_is_visited_at_least_once() -> None:
    pace = Pace(at_one_bit=40.0, exponent=0.5, outcomes=9)
    assert pace.visits(10**9, 1.0) == 1
    assert pace.visits(10**9, 0.0) == 1


def test_values_that_the_base_model_knows_count_as_one_bit() -> None:
    pace = Pace(at_one_bit=40.0, exponent=0.5, outcomes=9)
    assert pace.visits(4, 0.0) == pace.visits(4, 1.0) == pytest.approx(20)


def test_outcomes_of_a_pace_give_it_back() -> None:
    true = Pace(at_one_bit=60.0, exponent=0.7, outcomes=5)
    sizes = (500, 1000, 3000, 10_000, 20_000)
    found = fit([outcome(size, true.visits(size, 1000.0)) for size in sizes])
    assert found is not None
    assert (found.at_one_bit, found.exponent) == pytest.approx((60.0, 0.7), rel=0.05)
    assert found.outcomes == 5


def test_two_writes_by_hand() -> None:
    # A quarter of the density, a third of the visits. About their means the two lie ± ln 4 / 2 and ± ln 3 / 2; the
    # prior counts 0.36 for e = 0.5, and the line goes through the mean: density 1/2, √(30 · 10) visits.
    found = fit([outcome(1000, 30.0), outcome(4000, 10.0)])
    slope = (math.log(4) * math.log(3) / 2 + 0.36 * 0.5) / (math.log(4) ** 2 / 2 + 0.36)
    assert found is not None
    assert found.exponent == pytest.approx(slope)
    assert found.visits(2000, 1000.0) == pytest.approx(math.sqrt(300))


def test_writes_of_nearly_one_density_leave_the_exponent_to_the_prior() -> None:
    for other in (1000, 1001, 1020):
        found = fit([outcome(1000, 40.0), outcome(other, 10.0)])
        assert found is not None
        assert found.exponent == pytest.approx(0.5, abs=0.05)
        assert found.visits(1000, 1000.0) == pytest.approx(20, rel=0.01)  # geometric mean


def test_more_parameters_never_ask_for_more_visits_whatever_chance_did() -> None:
    found = fit([outcome(1000, 10.0), outcome(8000, 80.0)])
    assert found is not None
    assert (found.exponent, found.at_one_bit) == (0, pytest.approx(math.sqrt(800)))


def test_only_certified_writes_with_known_visits_count() -> None:
    good = [outcome(1000, 30.0), outcome(4000, 10.0)]
    found = fit([*good, outcome(1000, 999.0, certified=False), outcome(1000, None), outcome(1000, 0.0)])
    assert found == fit(good)


@pytest.mark.parametrize("useless", [[], [outcome(1000, None)], [outcome(1000, 30.0, certified=False)]], ids=str)
def test_without_such_a_write_there_is_no_pace(useless: list[Outcome]) -> None:
    assert fit(useless) is None


@given(
    outcomes=st.lists(
        st.builds(outcome, st.floats(1, 1e7), st.floats(1, 1e4), cost_bits=st.floats(0, 1e6)), min_size=1, max_size=10
    ),
    parameters=st.floats(1, 1e7),
    factor=st.floats(1, 100),
)
def test_a_larger_adapter_is_never_slower(outcomes: list[Outcome], parameters: float, factor: float) -> None:
    pace = fit(outcomes)
    assert pace is not None
    assert pace.outcomes == len(outcomes)
    visits = pace.visits(parameters, 5000.0)
    assert 1 <= pace.visits(parameters * factor, 5000.0) <= visits * (1 + 1e-9)
    assert fit([replace(one, kind="other") for one in outcomes]) == pace
