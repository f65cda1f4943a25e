"""The law is fitted, inverted and bounded as it says, and refuses what determines no law."""

import dataclasses
import doctest
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loramem.planning.law
from loramem.errors import DegeneratePoints, LawError, LoramemError, OutOfReach
from loramem.planning.law import MemoryLaw, Point
from loramem.planning.law_fit import SATURATED, fit, held_out, means_agreement

RANKS, LENGTHS = (1, 2, 4, 8, 16), (100, 200, 400, 800, 1600, 3200)
BASE = 50.0  # nats per token: far above any ΔL here, so that no point is saturated
TRUE = (30.0, 0.3, 0.4, 0.5)


def formula(constants: Sequence[float], rank: float, length: float) -> float:
    c, alpha, beta, b = constants
    return c * rank**alpha * length**-beta + b


def made(
    constants: Sequence[float] = TRUE,
    ranks: Sequence[int] = RANKS,
    lengths: Sequence[int] = LENGTHS,
    noise: float = 0.0,
    seed: int = 0,
) -> list[Point]:
    chance = random.Random(seed)
    return [
        Point(rank, length, BASE, BASE - formula(constants, rank, length) - chance.gauss(0, noise))
        for rank in ranks
        for length in lengths
    ]


def law_of(c: float, alpha: float, beta: float, b: float) -> MemoryLaw:
    """With these constants, and the quality of some fit."""
    return dataclasses.replace(fit(made()), C=c, alpha=alpha, beta=beta, b=b)


SOME = fit(made())
laws = st.builds(
    lambda c, alpha, beta, b: dataclasses.replace(SOME, C=c, alpha=alpha, beta=beta, b=b),
    st.floats(0.01, 1e4),
    st.floats(0.05, 3),
    st.floats(0.05, 3),
    st.floats(-5, 5),
)
numbers = st.floats(1, 1e4)


def test_the_example_runs() -> None:
    assert doctest.testmod(loramem.planning.law).failed == 0


# --- asking


def test_prediction_and_inverses_by_hand() -> None:
    law = law_of(30.0, 0.5, 0.5, 1.0)  # 30 · √4 / √900 + 1 = 3
    assert law.predict(4, 900) == pytest.approx(3)
    assert law.rank_for(3, 900) == pytest.approx(4)
    assert law.length_for(3, 4) == pytest.approx(900)


@given(law=laws, rank=numbers, length=numbers)
def test_the_inverses_undo_the_prediction(law: MemoryLaw, rank: float, length: float) -> None:
    predicted = law.predict(rank, length)
    excess = predicted - law.b
    if excess < 1e-6 * max(1.0, abs(law.b)):  # so close to b that a float does not hold the difference
        return
    slack = 1e-9 + 1e-15 * abs(law.b) / excess / min(law.alpha, law.beta)
    assert law.rank_for(predicted, length) == pytest.approx(rank, rel=slack)
    assert law.length_for(predicted, rank) == pytest.approx(length, rel=slack)


@given(law=laws, rank=numbers, length=numbers, factor=st.floats(1.01, 100))
def test_more_rank_never_hurts_and_more_tokens_never_help(
    law: MemoryLaw, rank: float, length: float, factor: float
) -> None:
    here = law.predict(rank, length)
    assert law.predict(rank * factor, length) >= here >= law.predict(rank, length * factor) >= law.b
    if here - law.b > 1e-6:
        assert law.predict(rank * factor, length) > here > law.predict(rank, length * factor)


@pytest.mark.parametrize("reduction", [0.5, 0.4, -1.0, math.inf, math.nan])
def test_no_rank_and_no_length_give_what_is_not_above_b(reduction: float) -> None:
    law = law_of(30.0, 0.3, 0.4, 0.5)
    with pytest.raises(OutOfReach, match=r"No rank gives .*: only finite ones above b = 0\.5 are possible") as error:
        law.rank_for(reduction, 1000)
    with pytest.raises(OutOfReach, match="No length gives"):
        law.length_for(reduction, 4)
    assert error.value.loss_reduction is reduction
    assert isinstance(error.value, ValueError) and isinstance(error.value, LoramemError)


def test_a_law_without_slope_has_no_inverse_there_but_in_the_other_direction() -> None:
    flat = law_of(30.0, 0.0, 0.5, 0.0)
    with pytest.raises(OutOfReach, match="does not depend on the rank"):
        flat.rank_for(1.0, 900)
    assert flat.length_for(1.0, 4) == pytest.approx(900)
    with pytest.raises(OutOfReach, match="does not depend on the length"):
        law_of(30.0, 0.5, 0.0, 0.0).length_for(1.0, 4)


def test_an_answer_too_large_for_a_float_is_out_of_reach() -> None:
    with pytest.raises(OutOfReach, match=r"it would be about e\^\d{4}"):
        law_of(1.0, 0.001, 0.5, 0.0).rank_for(10.0, 1000)


@pytest.mark.parametrize("wrong", [0, -1, math.inf, math.nan])
def test_only_positive_ranks_and_lengths_can_be_asked_about(wrong: float) -> None:
    for ask in (
        lambda: SOME.predict(wrong, 100),
        lambda: SOME.rank_for(1.0, wrong),
        lambda: SOME.predict_interval(4, wrong),
        lambda: SOME.length_for(1.0, wrong),
    ):
        with pytest.raises(LawError, match="must be a positive number"):
            ask()


# --- fitting


@pytest.mark.parametrize(
    "constants",
    [
        TRUE,
        (200.0, 1.0, 0.9, -0.5),
        (5.0, 0.1, 0.1, 0.0),
        (0.001, 0.3, 0.4, 3.0),
        (1000.0, 2.9, 2.9, 1.0),
        (50.0, 0.25, 0.02, -30.0),
        (2.0, 1.5, 0.2, 0.1),
    ],
)
def test_points_without_noise_give_their_constants_back(constants: tuple[float, ...]) -> None:
    # A base loss of 10⁴ keeps the largest ΔL unsaturated; subtracting it costs ΔL digits, hence the tolerance.
    points = [Point(r, n, 1e4, 1e4 - formula(constants, r, n)) for r in RANKS for n in LENGTHS]
    law = fit(points)
    assert law.constants == pytest.approx(constants, rel=1e-5, abs=1e-7)
    assert (law.points, law.dropped, law.warnings) == (30, 0, ())
    assert (law.rank_range, law.length_range) == ((1, 16), (100, 3200))
    assert law.r_squared > 1 - 1e-9 and law.mape < 1e-4


def test_noisy_points_give_the_constants_to_within_their_stated_errors() -> None:
    law = fit(made(noise=0.03, seed=5))
    assert law.constants == pytest.approx(TRUE, rel=0.3)
    for index, (found, true) in enumerate(zip(law.constants, TRUE, strict=True)):
        error = math.sqrt(law.covariance[index][index])
        assert abs(found - true) < 3 * error < 0.6 * true
    assert law.sigma == pytest.approx(0.03, rel=0.4)


def test_quality_and_covariance_are_those_of_scipys_curve_fit() -> None:
    import numpy as np
    from scipy.optimize import curve_fit

    points = made(noise=0.05, seed=2)
    law = fit(points)
    x = np.array([(point.rank, point.length) for point in points]).T.astype(float)
    y = np.array([point.loss_reduction for point in points])

    def model(at: Any, *free: float) -> Any:
        return free[0] * at[0] ** free[1] * at[1] ** -free[2] + free[3]

    constants, covariance = curve_fit(model, x, y, p0=TRUE, xtol=1e-14, ftol=1e-14)
    assert law.constants == pytest.approx(constants, rel=1e-5)
    assert np.array(law.covariance) == pytest.approx(covariance, rel=1e-3)
    residuals = y - model(x, *constants)
    assert law.r_squared == pytest.approx(1 - residuals.var() / y.var(), abs=1e-6)
    assert law.mape == pytest.approx(100 * np.abs(residuals / y).mean(), rel=1e-3)
    assert law.sigma == pytest.approx(math.sqrt((residuals**2).sum() / (len(y) - 4)), rel=1e-6)


def test_points_below_the_paper_s_threshold_are_dropped_and_no_others() -> None:
    kept = [dataclasses.replace(point, final_loss=point.final_loss) for point in made()]
    edge = Point(1, 50, SATURATED + formula(TRUE, 1, 50), SATURATED)
    assert edge.final_loss == 0.69
    below = dataclasses.replace(edge, base_loss=3.0, final_loss=math.nextafter(0.69, 0))
    law = fit([*kept, edge, below, Point(500, 7, 3.0, 0.0)])
    assert (law.points, law.dropped) == (31, 2)
    assert law.constants == pytest.approx(TRUE, rel=1e-6)
    assert (law.rank_range, law.length_range[0]) == ((1, 16), 50)


def test_the_order_of_the_points_does_not_matter() -> None:
    points = made(noise=0.05, seed=3)
    assert fit(points[::-1]).constants == pytest.approx(fit(points).constants, rel=1e-6)


# --- intervals


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),  # any table of Student's t
    [(0.9, 1, 6.3138), (0.9, 5, 2.0150), (0.95, 10, 2.2281), (0.99, 2, 9.9248), (0.5, 3, 0.7649), (0.95, 60, 2.0003)],
)
def test_student_s_quantiles_are_those_of_the_tables(confidence: float, freedom: int, quantile: float) -> None:
    assert loramem.planning.law._student_t(confidence, freedom) == pytest.approx(quantile, abs=6e-5)


def test_a_90_percent_interval_holds_about_90_percent_of_new_runs() -> None:
    inside = total = 0
    for seed in range(100):
        law = fit(made(ranks=(1, 4, 16), lengths=(100, 600, 3200), noise=0.05, seed=seed))
        chance = random.Random(-1 - seed)
        for rank, length in ((1, 100), (2, 300), (16, 100), (16, 3200)):
            low, high = law.predict_interval(rank, length)
            inside += low <= formula(TRUE, rank, length) + chance.gauss(0, 0.05) <= high
            total += 1
    assert 0.85 < inside / total < 0.95


def test_intervals_grow_with_confidence_and_distance() -> None:
    law = fit(made(noise=0.05, seed=1))

    def width(rank: float, length: float, confidence: float = 0.9) -> float:
        low, high = law.predict_interval(rank, length, confidence)
        assert low < law.predict(rank, length) < high
        return high - low

    assert width(4, 600, 0.5) < width(4, 600) < width(4, 600, 0.99)
    assert width(4, 600) < width(16, 100) < width(64, 25)
    for wrong in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(LawError, match="confidence must lie between 0 and 1"):
            law.predict_interval(4, 600, wrong)


def test_extrapolation_is_outside_the_ranks_the_lengths_or_the_loss_reductions() -> None:
    law = fit(made())
    assert not any(law.extrapolates(rank, length) for rank in RANKS for length in LENGTHS)
    assert law.extrapolates(0.9, 400) and law.extrapolates(17, 400)
    assert law.extrapolates(4, 99) and law.extrapolates(4, 3201)
    seen = max(formula(TRUE, 4, 100), formula(TRUE, 16, 800))
    corner_cut = [point for point in made() if point.loss_reduction <= seen + 1e-9]
    law = fit(corner_cut)
    assert (law.rank_range, law.length_range) == ((1, 16), (100, 3200))
    assert law.extrapolates(16, 100) and not law.extrapolates(4, 100)


# --- warnings


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("alpha", lambda r, n: formula((3.0, -0.2, 0.4, 1.0), r, n)),
        ("alpha", lambda r, n: formula((0.001, 4.0, 0.3, 1.0), r, n)),
        ("beta", lambda r, n: formula((3.0, 0.3, -0.1, 1.0), r, n)),
        ("beta", lambda r, n: formula((1e8, 0.3, 4.0, 1.0), r, n)),
        ("b", lambda r, n: 3 + 0.5 * math.log(r) - 0.3 * math.log(n)),
    ],
)
def test_a_constant_at_its_bound_is_said_and_taken_as_known(name: str, measured: Callable[[int, int], float]) -> None:
    law = fit([Point(r, n, BASE, BASE - measured(r, n)) for r in (1, 2, 4, 8) for n in LENGTHS])
    assert any(warning.startswith(f"{name} ended at its bound") for warning in law.warnings)
    index = ["C", "alpha", "beta", "b"].index(name)
    assert law.covariance[index][index] == 0
    bound = {"alpha": (0.0, 3.0), "beta": (0.0, 3.0), "b": (-law.reduction_range[1],)}[name]
    assert law.constants[index] in bound


# --- refusals

CELLS = [(1, 100), (1, 400), (2, 100), (2, 400), (4, 100), (4, 1600)]


def points_at(cells: Sequence[tuple[float, float]]) -> list[Point]:
    return [Point(rank, length, BASE, BASE - formula(TRUE, rank, length)) for rank, length in cells]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "0 points are left, and the fit needs 5"),
        (points_at(CELLS[:4]), "4 points are left, and the fit needs 5"),
        (
            points_at(CELLS[:4]) + [Point(9, 9, 3.0, 0.1)] * 3,
            r"4 points are left after 3 with a final loss below 0\.69 were dropped, and the fit needs 5",
        ),
        (points_at([(2, n) for n in LENGTHS]), "All points have the same rank, 2"),
        (points_at([(r, 400) for r in RANKS]), "All points have the same length, 400"),
        (points_at([(1, 100), (2, 100), (2, 400)] * 2), "only 3 different runs, for 4 constants"),
        (points_at([(r, 100 * r) for r in RANKS]), "rank and the length change together"),
        ([Point(r, n, 3.0, 1.0) for r, n in CELLS], "same loss reduction, 2 nats"),
        ([Point(r, n, 3.0, 3.0) for r, n in CELLS], "same loss reduction, 0 nats"),
    ],
)
def test_points_that_determine_no_law_are_refused(points: list[Point], message: str) -> None:
    with pytest.raises(DegeneratePoints, match=message) as error:
        fit(points)
    left = sum(point.final_loss >= 0.69 for point in points)
    assert (error.value.points, error.value.dropped) == (left, len(points) - left)
    assert isinstance(error.value, ValueError) and isinstance(error.value, LoramemError)


def test_one_point_more_than_constants_is_enough() -> None:
    assert fit(points_at(CELLS[:5])).points == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank must be a positive number, not 0"),
        ({"rank": -4}, "rank must be a positive number, not -4"),
        ({"length": 0}, "length must be a positive number, not 0"),
        ({"length": math.inf}, "length must be a positive number, not inf"),
        ({"base_loss": math.inf}, "loss must be finite"),
        ({"final_loss": math.nan}, "loss must be finite"),
    ],
)
def test_a_point_of_impossible_numbers_is_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(LawError, match=message):
        dataclasses.replace(Point(4, 400, 3.0, 1.0), **changed)


# --- JSON


def test_a_law_comes_back_from_json_byte_for_byte() -> None:
    for law in (fit(made(noise=0.05)), fit([Point(r, n, 9.0, 9 - 3 / n**0.2) for r, n in CELLS])):
        copy = MemoryLaw.from_json(law.to_json())
        assert copy == law
        assert copy.to_json() == law.to_json()
        assert hash(copy) == hash(law)
        assert copy.predict_interval(3, 700) == law.predict_interval(3, 700)


def edited(**changed: object) -> str:
    return json.dumps({**json.loads(SOME.to_json()), **changed})


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        "{}",
        edited(extra=1),
        json.dumps({key: value for key, value in json.loads(SOME.to_json()).items() if key != "sigma"}),
        edited(C=-1.0),
        edited(C="30"),
        edited(alpha=math.nan),
        edited(beta=math.nan),
        edited(beta=-0.1),
        edited(b=math.inf),
        edited(form="linear"),
        edited(covariance=[[0.0] * 4] * 3),
        edited(points=4),
    ],
)
def test_what_is_not_a_law_is_not_read_as_one(content: str) -> None:
    with pytest.raises(LawError):
        MemoryLaw.from_json(content)


# --- held out


def test_what_was_held_out_is_predicted_from_the_rest() -> None:
    points = [*made(noise=0.02, seed=4), Point(4, 6400, 3.0, 0.1)]
    found = held_out(points, lambda point: point.length <= 800)
    assert found.law == fit([point for point in points if point.length <= 800])
    assert [(point.rank, point.length) for point in found.points] == [(r, n) for r in RANKS for n in (1600, 3200)]
    expected = [found.law.predict(point.rank, point.length) for point in found.points]
    assert list(found.predicted) == expected
    measured = [point.loss_reduction for point in found.points]
    by_hand = 100 * sum(abs(p - m) / m for p, m in zip(expected, measured, strict=True)) / len(measured)
    assert found.mape == pytest.approx(by_hand)
    assert 0 < found.mape < 10


def test_ranks_can_be_held_out_too_and_without_noise_nothing_is_lost() -> None:
    assert held_out(made(), lambda point: point.rank != 4).mape < 1e-5


def test_holding_out_nothing_is_refused() -> None:
    with pytest.raises(LawError, match="nothing to predict"):
        held_out([*made(), Point(99, 10, 3.0, 0.1)], lambda point: point.rank < 50)


# --- means over texts


def on_three_texts() -> list[Point]:
    """Per length an easier, a harder and a middling text, which differ by as much at every rank; on average by none."""
    return [
        dataclasses.replace(point, base_loss=point.base_loss + ease)
        for point in points_at([(r, n) for r in (1, 2, 4, 8) for n in (200, 400, 800, 1600)])
        for ease in (-0.3, 0.1, 0.2)
    ]


def test_means_over_texts_are_what_the_law_is_about() -> None:
    points = on_three_texts()
    law, middle = fit(points), fit(points_at([(r, n) for r in (1, 2, 4, 8) for n in (200, 400, 800, 1600)]))
    assert law.constants == pytest.approx(middle.constants, rel=1e-4)
    assert law.mape > 3
    found = means_agreement(law, points)
    assert found is not None
    assert (found.r_squared, found.mape, found.cells) == (pytest.approx(1), pytest.approx(0, abs=1e-3), 16)
    beyond = held_out(points, lambda point: point.length <= 400)
    assert beyond.of_means is not None
    assert beyond.of_means.cells == 8
    assert beyond.of_means.mape < 0.1 < beyond.mape


def test_a_mean_with_a_saturated_point_in_it_does_not_count() -> None:
    points = on_three_texts()
    law, full = fit(points), dataclasses.replace(points[0], final_loss=SATURATED - 0.01)
    found = means_agreement(law, [full, *points[1:]])
    assert found is not None
    assert found.cells == 15


def test_points_that_are_not_repeated_have_no_means() -> None:
    points = points_at([(r, n) for r in (1, 2, 4, 8) for n in (200, 400, 800, 1600)])
    assert means_agreement(fit(points), points) is None
    assert means_agreement(fit(points), [*points, points[0]]) is None


def test_means_that_do_not_differ_have_nothing_to_explain() -> None:
    law = fit(points_at([(r, n) for r in (1, 2, 4, 8) for n in (200, 400, 800, 1600)]))
    alike = [Point(rank, 400, BASE, BASE - 1) for rank in (1, 2)]
    assert means_agreement(law, alike * 2) is None
