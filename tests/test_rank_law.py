"""The law's rank of a vocabulary inverts the law of random tokens, and lies in its interval."""

import dataclasses
import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loramem.planning.variety
from loramem.planning.law_fit import SATURATED
from loramem.planning.rank_law import KindSamples, RankLaw, Sample
from loramem.planning.variety import effective_vocabulary

from .planning_samples import LAW, RANK_LAW, STUDENT_T

TARGET = 6.0 - SATURATED


# --- vocabularies


def test_the_example_runs() -> None:
    assert doctest.testmod(loramem.planning.variety).failed == 0


def test_equally_frequent_tokens_count_as_many_as_they_are_and_a_rare_one_for_less() -> None:
    assert effective_vocabulary([7] * 50) == 1
    assert effective_vocabulary([*range(480)]) == pytest.approx(480)
    assert 10 < effective_vocabulary([*range(10)] * 100 + [11]) < 10.1


@given(tokens=st.lists(st.integers(0, 20), min_size=1, max_size=200))
def test_a_vocabulary_is_at_most_the_number_of_different_tokens_and_does_not_go_by_order(tokens: list[int]) -> None:
    found = effective_vocabulary(tokens)
    assert 1 <= found <= len(set(tokens)) + 1e-6
    assert found == pytest.approx(effective_vocabulary(sorted(tokens) * 2), abs=1e-5)


# --- ranks


def test_the_laws_rank_by_hand() -> None:
    # At 400 tokens ΔL = 1.5 · √r + 1, and a base loss of 6 leaves 0.69 at ΔL = 5.31: √r = 4.31 / 1.5. The interval
    # is ± 0.2015, which at its ends takes √r = (4.31 ∓ 0.2015) / 1.5.
    found, half = RANK_LAW.rank(400), STUDENT_T * 0.1
    assert found.rank == pytest.approx((4.31 / 1.5) ** 2)
    assert found.low == pytest.approx(((4.31 - half) / 1.5) ** 2, rel=2e-4)
    assert found.high == pytest.approx(((4.31 + half) / 1.5) ** 2, rel=2e-4)
    assert not found.extrapolated
    assert RANK_LAW.rank(4000).extrapolated and RANK_LAW.rank(20).extrapolated


@given(base_loss=st.floats(2, 15), vocabulary=st.floats(50, 20_000), sigma=st.floats(0, 0.3))
def test_the_laws_rank_inverts_the_law_and_lies_in_its_interval(
    base_loss: float, vocabulary: float, sigma: float
) -> None:
    law = dataclasses.replace(LAW, sigma=sigma)
    found = RankLaw(law, base_loss).rank(vocabulary)
    assert law.predict(found.rank, vocabulary) == pytest.approx(base_loss - SATURATED)
    assert found.low is None or found.low <= found.rank
    assert found.high is not None and found.high >= found.rank
    assert law.predict_interval(found.high, vocabulary)[0] == pytest.approx(base_loss - SATURATED, abs=0.02)
    if found.low is not None:
        assert law.predict_interval(found.low, vocabulary)[1] == pytest.approx(base_loss - SATURATED, abs=0.02)


def test_an_interval_that_widens_with_the_rank_still_has_its_ends() -> None:
    # With σ(α) = 0.1 the lower end of ΔL = 1.5 · √r + 1 at 400 tokens rises, and falls again at very high ranks.
    uncertain = ((0.0,) * 4, (0.0, 0.01, 0.0, 0.0), (0.0,) * 4, (0.0,) * 4)
    law = dataclasses.replace(LAW, covariance=uncertain)
    assert law.predict_interval(1e6, 400)[0] < 0
    found = RankLaw(law, 4.0).rank(400)
    assert found.low is not None and found.high is not None
    assert found.low < found.rank < found.high
    for end, rank in ((1, found.low), (0, found.high)):
        assert law.predict_interval(rank, 400)[end] == pytest.approx(4.0 - SATURATED, abs=0.01)


def test_an_interval_that_never_reaches_the_loss_has_no_end() -> None:
    found = RankLaw(dataclasses.replace(LAW, sigma=3.0), 6.0).rank(400)
    assert found.low is None  # b + t · σ alone is above 5.31
    assert found.high is not None


def test_where_every_rank_reaches_the_loss_the_laws_rank_is_nothing() -> None:
    found = RankLaw(LAW, 1.6).rank(400)  # every rank lowers it by more than b = 1
    assert (found.rank, found.low, found.high, found.extrapolated) == (0.0, None, None, True)


def test_more_different_tokens_take_more_rank() -> None:
    ranks = [RANK_LAW.rank(vocabulary).rank for vocabulary in (11, 50, 200, 800)]
    assert ranks == sorted(ranks)
    assert ranks[3] / ranks[2] == pytest.approx(4)  # β / α = 1


# --- what a kind costs

SAMPLES = KindSamples(
    "text", (Sample(100, 4.0, 500.0, 50.0), Sample(400, 3.0, 1400.0, 150.0), Sample(1600, 2.8, 5000.0, 250.0))
)


def test_what_was_measured_is_said_as_it_was() -> None:
    assert [SAMPLES.at(sample.length) for sample in SAMPLES.samples] == list(SAMPLES.samples)


def test_between_the_samples_by_hand() -> None:
    # 200 is half of the way from 100 to 400 in ln ℓ and a third in ℓ; 800 the same from 400 to 1600.
    assert SAMPLES.at(200) == Sample(200, pytest.approx(3.5), pytest.approx(800.0), pytest.approx(100.0))
    assert SAMPLES.at(800) == Sample(800, pytest.approx(2.9), pytest.approx(2600.0), pytest.approx(200.0))


def test_beyond_the_samples_all_but_the_cost_are_those_of_the_nearest() -> None:
    assert SAMPLES.at(20) == Sample(20, 4.0, 100.0, 50.0)
    assert SAMPLES.at(3200) == Sample(3200, 2.8, 10_000.0, 250.0)


def test_one_sample_is_enough() -> None:
    one = KindSamples("text", SAMPLES.samples[:1])
    assert [one.at(length).cost_bits for length in (10, 100, 1000)] == [50.0, 500.0, 5000.0]
