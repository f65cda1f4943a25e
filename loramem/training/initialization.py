"""Where training starts: the A matrices of a fresh adapter, chosen from the data.

A usual LoRA starts with random A and zero B, and spends most of a short training finding directions in which records
differ at all: the inputs of a linear module at answer positions share one large mean and differ little. Here A spans
the directions along which the loss falls fastest *per unit of input variation*. B stays zero, so that the adapter
still begins as the base's function.

With x the inputs and g the output gradients of a module at the positions that carry a gradient, C = E[x xᵀ] + λI
and M = E[g xᵀ] its full gradient, a preconditioned gradient step is M C⁻¹. Writing C = L Lᵀ, the best rank-r
approximation of M L⁻ᵀ = U S Vᵀ gives A = Vᵣᵀ L⁻¹. (Gradient alignment is the idea of LoRA-GA, arXiv 2407.05000; the
preconditioner is what makes it pay here, docs/lab/engine.md.)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import cholesky, solve_triangular

DAMPING = 0.1  # λ as a share of the mean input variance; 0.03 to 1 do as well
OVERSAMPLING = 8  # extra directions of the randomised SVD


@dataclass
class Moments:
    """Second moments of one linear module at positions that carry a gradient: sums over ``count`` positions.

    x are its inputs, y its outputs, g the gradient at the outputs.
    """

    inputs: Tensor
    """Σ x xᵀ (in, in)."""
    gradient: Tensor
    """Σ g xᵀ (out, in)."""
    count: int = 0
    outputs: float = 0.0
    """Σ ‖y‖² / out."""

    @property
    def finite(self) -> bool:
        """Whether there is something to start from."""
        sums = (self.inputs, self.gradient, torch.tensor(self.outputs))
        return self.count > 0 and all(bool(torch.isfinite(found).all()) for found in sums)

    @property
    def output_scale(self) -> float:
        """Root mean square of the outputs."""
        return math.sqrt(self.outputs / self.count)


@contextmanager
def collect_moments(modules: Sequence[nn.Module], shapes: Sequence[tuple[int, int]]) -> Iterator[list[Moments]]:
    """Within this context every forward and backward pass adds to the modules' moments.

    Args:
        modules: Linear modules with (B, T, in) inputs.
        shapes: Inputs and outputs of each.
    """
    device = next(modules[0].parameters()).device
    found = [Moments(torch.zeros(i, i, device=device), torch.zeros(o, i, device=device)) for i, o in shapes]
    handles = [module.register_forward_hook(_adder(found[place])) for place, module in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def aligned_rows(moments: Moments, rank: int, generator: torch.Generator) -> Tensor:
    """A (rank, in) along the leading directions of the preconditioned gradient, with unit mean-square outputs.

    Directions beyond what the gradient has (rank above the module's width) are random in the whitened space.
    """
    covariance = moments.inputs / moments.count
    damped = covariance.clone()
    damped.diagonal().add_(DAMPING * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny)
    factor = cholesky(damped)
    preconditioned = solve_triangular(factor, (moments.gradient / moments.count).T, upper=False).T
    directions = _leading_directions(preconditioned, rank, generator)
    rows: Tensor = solve_triangular(factor.T, directions.T, upper=True).T
    mean_square: Tensor = ((rows @ covariance) * rows).sum(1).mean()
    return rows / mean_square.clamp(min=torch.finfo(rows.dtype).tiny).sqrt()


def _leading_directions(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Right singular vectors (rank, in) of the largest singular values, by randomised subspace iteration."""
    width = matrix.shape[1]
    probes = torch.randn(width, rank + OVERSAMPLING, generator=generator).to(matrix)
    available = min(rank + OVERSAMPLING, *matrix.shape)
    basis = torch.linalg.qr(matrix @ probes[:, :available]).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    leading = torch.linalg.svd(basis.T @ matrix, full_matrices=False).Vh[:rank]
    extra = probes[:, available : available + rank - len(leading)].T / math.sqrt(width)
    return torch.cat([leading, extra])


def _adder(moments: Moments) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def forward_hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs, outputs = (values.detach().flatten(0, -2).float() for values in (args[0], output))
        output.register_hook(lambda gradient: add(inputs, outputs, gradient.detach().flatten(0, -2).float()))

    def add(inputs: Tensor, outputs: Tensor, gradient: Tensor) -> None:
        moved = gradient.abs().sum(1) > 0
        inputs, outputs, gradient = inputs[moved], outputs[moved], gradient[moved]
        moments.inputs += inputs.T @ inputs
        moments.gradient += gradient.T @ inputs
        moments.outputs += float(outputs.square().mean(1).sum())
        moments.count += len(inputs)

    return forward_hook
