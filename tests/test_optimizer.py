"""Rates that mean the same everywhere: what one step changes, whatever the size of a module and the rank."""

import pytest
import torch
from torch import nn

from loramem.training.optimizers import A_SHARE, MORE_RANK, make_optimizer, set_rate


def matrices(rank: int, size: float = 1.0) -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(size * torch.randn(rank, 12)), nn.Parameter(torch.zeros(8, rank))


def first_step(pairs: list[tuple[nn.Parameter, nn.Parameter]], scales: list[float], rate: float) -> list[float]:
    """How far Adam's first step moves an entry of every matrix: by its rate, whatever the gradient."""
    optimizer = make_optimizer(pairs, scales)
    parameters = [parameter for pair in pairs for parameter in pair]
    before = [parameter.detach().clone() for parameter in parameters]
    for place, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 10.0**place)
    set_rate(optimizer, rate)
    optimizer.step()
    return [float((old - new.detach()).abs().max()) for old, new in zip(before, parameters, strict=True)]


@pytest.mark.parametrize("rank", [1, 16])
def test_a_step_moves_b_in_proportion_to_the_outputs_and_a_to_itself(rank: int) -> None:
    small, large = matrices(rank), matrices(rank, size=50.0)
    moved = first_step([small, large], [0.25, 100.0], 0.06)
    rms = float(small[0].detach().square().mean().sqrt())
    expected_a = 0.06 * A_SHARE * rms / (rank + MORE_RANK) ** 0.5
    assert moved[0] == pytest.approx(expected_a, rel=0.05)
    assert moved[1] == pytest.approx(0.06 * 0.25 / (rank + MORE_RANK), rel=1e-3)
    assert moved[2] == pytest.approx(50 * moved[0], rel=0.01)
    assert moved[3] == pytest.approx(400 * moved[1], rel=1e-3)


def test_the_rate_of_the_next_step_is_the_one_that_was_set() -> None:
    optimizer = make_optimizer([matrices(4)], [2.0])
    set_rate(optimizer, 0.06)
    first = [group["lr"] for group in optimizer.param_groups]
    set_rate(optimizer, 0.03)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in first])


def test_nothing_decays_on_its_own() -> None:
    pair = matrices(4)
    optimizer = make_optimizer([pair], [1.0])
    set_rate(optimizer, 1.0)
    before = pair[0].detach().clone()
    for parameter in pair:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(pair[0].detach(), before)
