"""A joint law shares C, α and β between kinds of data and gives each its own b."""

import random

import pytest

from loramem.errors import DegeneratePoints
from loramem.planning.joint_law import fit_joint
from loramem.planning.law import Point

OFFSETS = {"text": -0.2, "random": 3.5, "mixed": 1.0}
GRID = [(rank, length) for rank in (1, 2, 3, 5) for length in (500, 900, 2000)]


def points(b: float, base_loss: float, noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng = random.Random(seed)
    reductions = [(r, n, 120 * r**0.7 * n**-0.8 + b + rng.gauss(0, noise)) for r, n in GRID]
    return [Point(r, n, base_loss, base_loss - reduction) for r, n, reduction in reductions]


def test_exact_points_give_the_constants_back_whatever_the_base_losses() -> None:
    law = fit_joint({kind: points(b, 6 + 2 * b) for kind, b in OFFSETS.items()})
    assert (law.C, law.alpha, law.beta) == pytest.approx((120, 0.7, 0.8), rel=1e-4)
    assert law.b == pytest.approx(OFFSETS, abs=1e-4)
    assert (law.r_squared, law.mape, law.points) == pytest.approx((1, 0, 36), abs=1e-4)
    assert law.one_offset < 0.7  # what a single b makes of the same points


def test_noise_stays_in_the_residuals() -> None:
    law = fit_joint({kind: points(b, 12, 0.05, seed) for seed, (kind, b) in enumerate(OFFSETS.items())})
    assert law.alpha == pytest.approx(0.7, abs=0.1)
    assert law.beta == pytest.approx(0.8, abs=0.1)
    assert 0.98 < law.r_squared < 1


def test_saturated_points_are_left_out() -> None:
    kinds = {kind: points(b, 12) for kind, b in OFFSETS.items()}
    kinds["text"].append(Point(64, 500, 12, 0.1))
    assert fit_joint(kinds).points == 36


def test_one_kind_has_a_law_of_its_own() -> None:
    with pytest.raises(DegeneratePoints, match="two kinds"):
        fit_joint({"text": points(0, 12), "random": [Point(1, 10, 1.0, 0.1)]})
