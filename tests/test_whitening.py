"""Whitened coordinates: the factor, what a step does in them, and what a gradient that is not finite does not."""

import math

import pytest
import torch
from torch import Tensor, nn

from loramem.training.whitening import BETAS, DAMPING, Site, WhitenedAdam, random_rows, whitening_factor

RANK, INPUTS, OUTPUTS = 3, 5, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments() -> Tensor:
    """Of inputs whose mean outweighs what they differ by."""
    inputs = drawn(20, INPUTS, seed=0) * torch.tensor([0.01, 0.1, 1.0, 3.0, 0.5]) + 2.0
    return inputs.T @ inputs / len(inputs)


def site(scale: float = 0.7) -> Site:
    a, b = nn.Parameter(drawn(RANK, INPUTS, seed=1)), nn.Parameter(drawn(OUTPUTS, RANK, seed=2))
    return Site(a, b, whitening_factor(moments()), scale)


def with_gradients(one: Site, seed: int = 3) -> tuple[Tensor, Tensor]:
    one.a.grad, one.b.grad = drawn(RANK, INPUTS, seed=seed), drawn(OUTPUTS, RANK, seed=seed + 10)
    return one.a.grad.clone(), one.b.grad.clone()


def test_the_factor_is_the_cholesky_factor_of_the_damped_moments() -> None:
    given = moments()
    before, factor = given.clone(), whitening_factor(given)
    assert torch.equal(given, before)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() > 0).all()
    expected = given + DAMPING * given.trace() / INPUTS * torch.eye(INPUTS)
    torch.testing.assert_close(factor @ factor.T, expected)


def test_inputs_that_are_all_zero_have_a_factor() -> None:
    assert torch.isfinite(whitening_factor(torch.zeros(INPUTS, INPUTS))).all()


def test_whitened_inputs_are_uncorrelated() -> None:
    inputs = drawn(200, INPUTS, seed=4) @ drawn(INPUTS, INPUTS, seed=5) + 3.0
    found = inputs.T @ inputs / len(inputs)
    white = torch.linalg.solve(whitening_factor(found, damping=0.0), inputs.T).T
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(INPUTS), atol=1e-3, rtol=0)


def test_random_rows_are_random_in_whitened_coordinates_and_the_same_for_the_same_seed() -> None:
    factor = whitening_factor(moments())
    rows = random_rows(400, factor, seed=6)
    white = rows @ factor
    assert float(white.var()) == pytest.approx(1 / INPUTS, rel=0.1)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(INPUTS) / INPUTS, atol=0.04, rtol=0)
    assert torch.equal(rows, random_rows(400, factor, seed=6))
    assert not torch.equal(rows, random_rows(400, factor, seed=7))


def adam(start: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    """Adam with its usual ε, from the formulas."""
    value, first, second = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient.double()
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.double() ** 2
        value = value - rate * (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
    return value.float()


def test_steps_are_adam_on_the_whitened_matrix_and_on_b() -> None:
    one, rate, factors, gradient_scale = site(), 0.3, [1.0, 0.25], 0.5
    white, b = (one.a @ one.factor).detach(), one.b.detach().clone()
    optimizer = WhitenedAdam([one], rate)
    of_a, of_b = [], []
    for step, factor in enumerate(factors):
        gradient_a, gradient_b = with_gradients(one, seed=20 + step)
        # d loss / d Ã = (d loss / d A) · L⁻ᵀ, as A = Ã · L⁻¹.
        of_a.append(gradient_scale * gradient_a @ torch.linalg.inv(one.factor).T)
        of_b.append(gradient_scale * gradient_b)
        assert optimizer.step(factor, gradient_scale)
        assert (one.a.grad, one.b.grad) == (None, None)
    expected = adam(white, of_a, [rate * factor / math.sqrt(INPUTS) for factor in factors])
    torch.testing.assert_close(optimizer.white[0].detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.a.detach(), expected @ torch.linalg.inv(one.factor), rtol=1e-4, atol=1e-4)
    rates = [rate * factor * one.scale / math.sqrt(RANK) for factor in factors]
    torch.testing.assert_close(one.b.detach(), adam(b, of_b, rates), rtol=1e-4, atol=1e-5)


def test_the_whitened_gradient_is_that_of_autograd() -> None:
    one, inputs = site(), drawn(6, INPUTS, seed=8)
    white = (one.a @ one.factor).detach().requires_grad_()
    (inputs @ (white @ torch.linalg.inv(one.factor)).T @ one.b.detach().T).square().sum().backward()
    (inputs @ one.a.T @ one.b.T).square().sum().backward()
    optimizer = WhitenedAdam([one], 0.1)
    assert optimizer.step(1.0)
    assert white.grad is not None
    torch.testing.assert_close(optimizer.white[0].grad, white.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.01, 50.0])
def test_rates_are_relative(scale: float) -> None:
    """Adam's first step moves every entry by its rate."""
    one, rate = site(scale), 0.2
    white, b = (one.a @ one.factor).detach(), one.b.detach().clone()
    optimizer = WhitenedAdam([one], rate)
    with_gradients(one)
    assert optimizer.step(0.5)
    moved = (optimizer.white[0].detach() - white).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * rate / math.sqrt(INPUTS)), rtol=1e-3, atol=0)
    moved = (one.b.detach() - b).abs()
    expected = torch.full_like(moved, 0.5 * rate * scale / math.sqrt(RANK))
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_at_any_site(where: str, value: float) -> None:
    sites = [site(), site()]
    optimizer = WhitenedAdam(sites, 0.3)
    for one in sites:
        with_gradients(one)
    assert optimizer.step(1.0)
    before = [tensor.detach().clone() for one in sites for tensor in (one.a, one.b)]
    white = [tensor.detach().clone() for tensor in optimizer.white]
    for one in sites:
        with_gradients(one)
    gradient = (sites[1].a if where == "a" else sites[1].b).grad
    assert gradient is not None
    gradient[0, 0] = value
    assert not optimizer.step(1.0)
    after = [tensor for one in sites for tensor in (one.a, one.b)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(white, optimizer.white, strict=True))
    for one in sites:
        with_gradients(one)
    assert optimizer.step(1.0)  # and Adam's averages are as they were
    assert all(torch.isfinite(tensor).all() for one in sites for tensor in (one.a, one.b))


def test_after_a_step_the_modules_hold_rounded_values_and_the_optimiser_goes_on_from_exact_ones() -> None:
    one = site()
    optimizer = WhitenedAdam([one], 1e-4, torch.bfloat16)
    start = one.b.detach().clone()
    for _ in range(100):  # none of which moves B by as much as it is rounded
        one.a.grad, one.b.grad = torch.ones_like(one.a), torch.ones_like(one.b)
        optimizer.step(1.0)
        assert torch.equal(one.b, one.b.bfloat16().float())
        assert torch.equal(one.a, one.a.bfloat16().float())
    assert (one.b < start).all()
