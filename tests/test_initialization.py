"""A starts along the preconditioned gradient: against a dense computation, sums by hand, and the loss it is for."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loramem import WriterSettings
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel, load_base_model
from loramem.models.batches import answer_logits
from loramem.models.placement import Placement
from loramem.models.trunk import Trunk
from loramem.records.prompts import encode_records
from loramem.records.record import as_records
from loramem.training import trainer
from loramem.training.initialization import DAMPING, OVERSAMPLING, Moments, aligned_rows, collect_moments

from .conftest import numbers

# --- directions


def moments_of(outputs: int, inputs: int, count: int = 200) -> Moments:
    """Inputs with a large common mean, as in a language model, and gradients whose directions decay by a tenth."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x = 3 * normal(1, inputs) + normal(count, inputs) * torch.linspace(0.2, 2, inputs)
    g = (normal(count, outputs) + x @ normal(inputs, outputs)) @ torch.diag(0.9 ** torch.arange(outputs))
    return Moments(x.T @ x, g.T @ x, count)


def dense_rows(moments: Moments, rank: int) -> Tensor:
    """The docstring of `loramem.training.initialization` in float64: C = L Lᵀ, M L⁻ᵀ = U S Vᵀ, A = Vᵣᵀ L⁻¹."""
    covariance = moments.inputs.double() / moments.count
    damping = DAMPING * covariance.diagonal().mean()
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariance + damping * torch.eye(len(covariance))))
    return torch.linalg.svd(moments.gradient.double() / moments.count @ inverse.T).Vh[:rank] @ inverse


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles between two row spaces; all 1 if they are the same."""
    one, other = (torch.linalg.qr(rows.double().T).Q for rows in (first, second))
    return torch.linalg.svdvals(one.T @ other)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"),
    [(16, 24, 1), (16, 24, 8), (12, 24, 12), (24, 16, 10), (48, 32, 16), (96, 96, 4)],
)
def test_rows_span_the_leading_directions_of_the_preconditioned_gradient(outputs: int, inputs: int, rank: int) -> None:
    moments = moments_of(outputs, inputs)
    rows = aligned_rows(moments, rank, seeded())
    assert rows.shape == (rank, inputs)
    found = cosines(rows, dense_rows(moments, rank))
    assert found.min() > 1 - 1e-5
    # Directions of the gradient alone are others: the preconditioner is felt.
    unconditioned = torch.linalg.svd(moments.gradient).Vh[:rank]
    assert cosines(rows, unconditioned).min() < 0.99


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_outputs_have_unit_mean_square(rank: int) -> None:
    moments = moments_of(16, 24)
    rows = aligned_rows(moments, rank, seeded())
    mean_squares = torch.einsum("ri,ij,rj->r", rows, moments.inputs / moments.count, rows)
    assert float(mean_squares.mean()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(16, 24, 40), (6, 24, 20), (24, 6, 20), (1, 24, 9)])
def test_a_rank_beyond_what_the_gradient_has_gives_full_rank_all_the_same(outputs: int, inputs: int, rank: int) -> None:
    moments = moments_of(outputs, inputs)
    rows = aligned_rows(moments, rank, seeded())
    assert rows.shape == (rank, inputs)
    assert torch.isfinite(rows).all()
    assert torch.linalg.matrix_rank(rows) == min(rank, inputs)
    leading = min(outputs, inputs, rank)
    assert cosines(rows[:leading], dense_rows(moments, leading)).min() > 1 - 1e-4


def test_fewer_positions_than_inputs_are_enough() -> None:
    rows = aligned_rows(moments_of(16, 24, count=3), 8, seeded())
    assert torch.isfinite(rows).all()
    assert torch.linalg.matrix_rank(rows) == 8


def test_inputs_that_are_always_zero_are_left_alone() -> None:
    moments = moments_of(16, 24)
    moments.inputs[:, 5] = moments.inputs[5] = moments.gradient[:, 5] = 0
    rows = aligned_rows(moments, 8, seeded())
    assert torch.isfinite(rows).all()
    assert rows[:, 5].abs().max() < 1e-6


def test_the_scale_of_the_loss_does_not_matter() -> None:
    moments = moments_of(16, 24)
    louder = Moments(moments.inputs, 1000 * moments.gradient, moments.count)
    one, other = aligned_rows(moments, 4, seeded()), aligned_rows(louder, 4, seeded())
    assert cosines(one, other).min() > 1 - 1e-5
    torch.testing.assert_close(one.norm(), other.norm(), rtol=1e-3, atol=0)


def test_the_same_seed_gives_the_same_rows() -> None:
    moments, rank = moments_of(6, 24), 6 + OVERSAMPLING  # beyond the gradient, so that some rows are random
    rows = aligned_rows(moments, rank, seeded(1))
    assert rows.numpy().tobytes() == aligned_rows(moments, rank, seeded(1)).numpy().tobytes()
    assert not torch.equal(rows, aligned_rows(moments, rank, seeded(2)))


# --- moments


class Pipeline(nn.Module):
    """Two linear modules with a bend between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.upper = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(torch.tanh(self.lower(x)))


SHAPES = [(5, 4), (4, 3)]


def weighted_loss(output: Tensor, weights: Tensor) -> Tensor:
    """Σ w·y²/2 over positions (B, T), whose gradient at the output is w·y."""
    return (weights[..., None] * output**2).sum() / 2


def test_moments_are_the_sums_over_positions_with_a_gradient() -> None:
    pipeline = Pipeline()
    lower, upper = pipeline.lower, pipeline.upper
    passes = list[tuple[Tensor, Tensor]]()
    with collect_moments([lower, upper], SHAPES) as moments:
        for seed, size in [(1, (2, 3)), (2, (1, 4))]:
            x, weights = torch.randn(*size, 5, generator=seeded(seed)), torch.rand(size, generator=seeded(seed))
            weights[0, :2] = 0
            weighted_loss(pipeline(x), weights).backward()
            passes += zip(x.flatten(0, 1), weights.flatten(), strict=True)

    inputs, gradient = (torch.zeros(5, 5), torch.zeros(4, 4)), (torch.zeros(4, 5), torch.zeros(3, 4))
    squares = [0.0, 0.0]
    with torch.no_grad():
        for x, weight in passes:
            bent = torch.tanh(lower(x))
            at_upper = weight * upper(bent)
            at_lower = (upper.weight.T @ at_upper) * (1 - bent**2)
            for place, (value, slope) in enumerate([(x, at_lower), (bent, at_upper)]):
                if weight > 0:
                    inputs[place].add_(torch.outer(value, value))
                    squares[place] += float([lower, upper][place](value).square().mean())
                gradient[place].add_(torch.outer(slope, value))
    for place, found in enumerate(moments):
        assert found.finite
        assert found.output_scale == pytest.approx((squares[place] / 6) ** 0.5, rel=1e-5)
        assert found.count == 4 + 2  # of 6 and 4 positions two each have weight 0
        torch.testing.assert_close(found.inputs, inputs[place])
        torch.testing.assert_close(found.gradient, gradient[place])
    # The gradient moment is the gradient of the weights: dW = Σ g xᵀ.
    torch.testing.assert_close(moments[0].gradient, lower.weight.grad)


def test_each_module_counts_the_positions_of_its_own_gradient() -> None:
    """The upper module is mixed over time: what is below it gets a gradient at positions that are not supervised."""
    pipeline = Pipeline()
    weights = torch.tensor([[0.0, 0.0, 1.0]])
    with collect_moments([pipeline.lower, pipeline.upper], SHAPES) as moments:
        mixed = torch.tanh(pipeline.lower(torch.randn(1, 3, 5, generator=seeded()))).cumsum(1)
        weighted_loss(pipeline.upper(mixed), weights).backward()
    assert [found.count for found in moments] == [3, 1]


def test_moments_are_summed_in_single_precision() -> None:
    lower = Pipeline().lower.to(torch.bfloat16)
    with collect_moments([lower], SHAPES[:1]) as moments:
        lower(torch.randn(2, 3, 5, generator=seeded()).bfloat16()).float().sum().backward()
    assert moments[0].inputs.dtype == moments[0].gradient.dtype == torch.float32
    assert moments[0].count == 6


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_without_a_usable_gradient_there_is_nothing_to_start_from(bad: float) -> None:
    pipeline = Pipeline()
    with collect_moments([pipeline.lower, pipeline.upper], SHAPES) as moments:
        (bad * weighted_loss(pipeline(torch.ones(1, 2, 5)), torch.ones(1, 2))).backward()
    assert not any(found.finite for found in moments)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_removed_afterwards(fails: bool) -> None:
    pipeline = Pipeline()
    x, weights = torch.ones(1, 2, 5), torch.ones(1, 2)
    try:
        with collect_moments([pipeline.lower, pipeline.upper], SHAPES) as moments:
            weighted_loss(pipeline(x), weights).backward()
            if fails:
                raise MemoryError
    except MemoryError:
        pass
    before = [(found.count, found.inputs.clone()) for found in moments]
    weighted_loss(pipeline(x), weights).backward()
    assert not any(module._forward_hooks for module in pipeline.modules())
    for found, (count, inputs) in zip(moments, before, strict=True):
        assert found.count == count == 2
        assert torch.equal(found.inputs, inputs)


# --- in training


RANK = 4


@pytest.fixture
def loaded(base: Path) -> BaseModel:
    return load_base_model(str(base))


def fresh_run(loaded: BaseModel, **settings: Any) -> trainer._Run:
    """What `train_adapter` has before its first step."""
    records = encode_records(as_records(numbers(6)), loaded.tokenizer, loaded.template, loaded.max_tokens)
    placement, chosen = Placement.default(loaded.model), WriterSettings(**settings)
    adapted = AdaptedModel(loaded)
    adapted.create("new", RANK, placement, chosen.seed)
    trunk = Trunk(loaded.model, records, min(placement.layers))
    return trainer._Run(adapted, "new", trunk, RANK, chosen, trainer.NetworkSchedule(), None, 0.0)


def random_rows(loaded: BaseModel) -> list[Tensor]:
    """A of every module as it is created, before it is aligned."""
    adapted = AdaptedModel(loaded)
    adapted.create("new", RANK, Placement.default(loaded.model), 0)
    return [tensor.clone() for name, tensor in adapted.weights("new").items() if ".lora_A." in name]


def matrices(run: trainer._Run, kind: str) -> list[Tensor]:
    found = [tensor.clone() for name, tensor in run.adapted.weights("new").items() if f".lora_{kind}." in name]
    assert len(found) == 14  # seven linear modules in two layers
    return found


def test_an_adapter_that_starts_along_the_gradient_is_still_the_base(loaded: BaseModel, base: Path) -> None:
    before = random_rows(load_base_model(str(base)))
    run = fresh_run(loaded)
    everything = range(len(run.records))
    batch = run.trunk.batch(everything)
    assert not any(bool(tensor.any()) for tensor in matrices(run, "B"))
    assert not any(torch.equal(old, new) for old, new in zip(before, matrices(run, "A"), strict=True))
    with torch.no_grad():
        with run.adapted.disabled():
            plain = answer_logits(loaded.model, batch)
        rounding = 1e-5 * float(plain.abs().max())
        assert torch.equal(answer_logits(loaded.model, batch), plain)
        torch.testing.assert_close(run.trunk.logits(everything, batch), plain, rtol=0, atol=rounding)
    # No step was taken, and no gradient of this pass is left for the first one.
    assert (run.step, run.visits, len(run.optimizer.state)) == (0, 0, 0)
    assert all(parameter.grad is None for parameter in run.parameters)


def test_what_was_aligned_is_what_training_falls_back_to(loaded: BaseModel) -> None:
    run = fresh_run(loaded)
    aligned = matrices(run, "A")
    for _ in range(2):  # while B is zero A has no gradient
        assert run.train_pass(range(len(run.records)))
    assert not torch.equal(matrices(run, "A")[0], aligned[0])
    run.recover()
    assert all(torch.equal(found, start) for found, start in zip(matrices(run, "A"), aligned, strict=True))


def test_the_start_depends_on_the_seed_alone(loaded: BaseModel, base: Path) -> None:
    starts = []
    for model, seed in [(loaded, 0), (load_base_model(str(base)), 0), (load_base_model(str(base)), 1)]:
        starts.append([tensor.numpy().tobytes() for tensor in matrices(fresh_run(model, seed=seed), "A")])
    assert starts[0] == starts[1] != starts[2]


def test_a_base_without_a_finite_gradient_starts_from_random_directions(
    loaded: BaseModel, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="loramem.training.trainer")
    before = random_rows(load_base_model(str(base)))
    whole = Trunk.logits
    monkeypatch.setattr(Trunk, "logits", lambda *args: whole(*args) * float("nan"))
    run = fresh_run(loaded)
    assert "random directions" in caplog.text
    assert all(torch.equal(old, new) for old, new in zip(before, matrices(run, "A"), strict=True))
    assert all(parameter.grad is None for parameter in run.parameters)
