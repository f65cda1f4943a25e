"""Neurons of the last MLP: which of them a base hardly uses, and what others in their place would compute.

A LoRA adapter of rank r on all projections of an MLP can put r new neurons in the place of r old ones and touch no
other: B of the projections into it, and A of the one out of it, pick the neurons; the other matrices say what these
become. A gate that is shut at a position adds nothing there, and the base is what it was but for the neurons that were
taken, of which it has many that matter to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramem.errors import UnsupportedBaseModel
from loramem.models.layers import LastLayer, features, linear_paths
from loramem.models.trunk import Forward, replaced_forwards

TOLERANCE = 1e-3
"""Of the parts of an MLP taken together, as a share of what it gives: more than rounding is another kind of MLP."""


@dataclass(frozen=True)
class LastMlp:
    """The one dense MLP of the last layer."""

    block: nn.Module
    paths: tuple[str, ...]
    """Of its linear modules in it: those that lead into its neurons, and at last the one that leads out."""
    width: int
    """How many neurons it has."""
    outputs: tuple[int, ...]
    """Outputs per neuron of each module that leads in: two where gate and value are one matrix."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LastMlp":
        """
        Raises:
            UnsupportedBaseModel: The last layer has no such MLP: one of experts, or one that mixes its neurons before
                the last projection.
        """
        blocks, kind = LastLayer.of(model).blocks, type(model).__name__
        found = list(linear_paths(blocks[0])) if len(blocks) == 1 else []
        if len(found) < 2 or not all(path for path, _ in found):
            raise UnsupportedBaseModel(
                f"{kind} has no single dense MLP in its last layer, and only there can an adapter spare the base. "
                "Write without keep_base, and route by key."
            )
        width = features(found[-1][1])[0]
        mlp = cls(
            blocks[0],
            tuple(path for path, _ in found),
            width,
            tuple(features(module)[1] // width for _, module in found[:-1]),
        )
        if not mlp._is_sum_of_its_neurons():
            raise UnsupportedBaseModel(
                f"The last MLP of {kind} is not the sum of its neurons, so that an adapter cannot replace some of them "
                "and spare the others. Write without keep_base, and route by key."
            )
        return mlp

    @property
    def ranks_per_neuron(self) -> int:
        """Of an adapter on all its modules: one rank is one row of each."""
        return max(self.outputs)

    def rows(self, module: int, neurons: Tensor) -> Tensor:
        """Rows (n, outputs per neuron) of a module that leads in, which belong to these neurons."""
        return neurons[:, None] + self.width * torch.arange(self.outputs[module], device=neurons.device)

    def weights(self, neurons: Tensor) -> list[Tensor]:
        """What the base's modules hold of some neurons: (n · outputs per neuron, d) in, at last (d, n) out; float32."""
        every = [_matrix(module) for module in self._linears()]
        into = [matrix[self.rows(index, neurons).flatten()] for index, matrix in enumerate(every[:-1])]
        return [each.float() for each in (*into, every[-1][:, neurons])]

    @torch.no_grad()
    def roles(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Which rows of a neuron are its gate, and which its value, where it has one: a module that leads in, and which
        of its outputs per neuron. A neuron's output is affine in its value, and in no gate.

        Raises:
            UnsupportedBaseModel: There is not one gate.
        """
        neurons = torch.arange(min(8, self.width), device=_matrix(self._linears()[0]).device)
        weights = self.weights(neurons)
        hidden = torch.randn(16, weights[0].shape[1], generator=torch.Generator().manual_seed(0)).to(weights[0])
        affine = dict[tuple[int, int], bool]()
        for module, outputs in enumerate(self.outputs):
            for output in range(outputs):
                scaled = list[Tensor]()
                for factor in (0.0, 1.0, 2.0):
                    changed = weights[module].clone()
                    changed[output::outputs] *= factor
                    scaled.append(self.given(hidden, neurons, [*weights[:module], changed, *weights[module + 1 :]]))
                bend = (scaled[2] - 2 * scaled[1] + scaled[0]).abs().max()
                affine[module, output] = bool(bend <= TOLERANCE * (scaled[2] - scaled[0]).abs().max())
        gates, values = ([row for row, is_affine in affine.items() if is_affine == kind] for kind in (False, True))
        if len(gates) != 1 or len(values) > 1:
            raise UnsupportedBaseModel(
                f"Neurons of the last MLP have {len(gates)} gates and {len(values)} values, and only those with one "
                "gate can be shut where the base is to be kept. Write without keep_base, and route by key."
            )
        return gates[0], values[0] if values else None

    def given(self, hidden: Tensor, neurons: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What neurons with such weights would add to the MLP's output (n, d) in the place of some of the base's.

        Args:
            hidden: (n, d) what enters the MLP.
            neurons: Whose place, for the sake of biases, which no adapter has.
            weights: As `weights` gives them.
        """
        places: dict[nn.Module, Forward] = {}
        for index, (path, module) in enumerate(zip(self.paths, self._linears(), strict=True)):
            matrix, bias = weights[index], module.bias if isinstance(module.bias, Tensor) else None
            if index < len(self.outputs):
                # (n, k) rows of neurons to k blocks, one per kind of output, as the code that splits them expects
                order = torch.arange(len(matrix), device=matrix.device).view(-1, self.outputs[index]).T.flatten()
                matrix = matrix[order]
                bias = None if bias is None else bias[self.rows(index, neurons).T.flatten()].float()
            else:
                bias = None  # it is there once, whatever the neurons
            places[self.block.get_submodule(path)] = _linear(matrix, bias)
        with replaced_forwards(places):
            output: Tensor = self.block(hidden[:, None])
        return output[:, 0]

    def use(self, hidden: Tensor, metric: Tensor | None = None) -> Tensor:
        """How much of the MLP's output (squared, summed over positions) is each neuron's, (width,).

        Args:
            metric: (out, out) by which outputs are measured: a length of d is dᵀ·metric·d; plain length if None.
        """
        seen = list[Tensor]()
        out = self.block.get_submodule(self.paths[-1])
        handle = out.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            self.block(hidden[:, None])
        finally:
            handle.remove()
        out_of = _matrix(self._linears()[-1]).float()
        lengths = ((out_of if metric is None else metric @ out_of) * out_of).sum(0)
        return seen[0].flatten(0, -2).float().square().sum(0) * lengths

    @torch.no_grad()
    def _is_sum_of_its_neurons(self) -> bool:
        into = self._linears()[0]
        if not all(features(module)[1] == self.width * many for module, many in self._leading_in()) or any(
            features(module)[0] != features(into)[0] for module, _ in self._leading_in()
        ):
            return False
        hidden = torch.randn(4, features(into)[0], generator=torch.Generator().manual_seed(0)).to(_matrix(into))
        every = torch.arange(self.width, device=hidden.device)
        try:
            whole = self.block(hidden[:, None])[:, 0].float()
            halves = [self.given(hidden.float(), part, self.weights(part)) for part in (every[::2], every[1::2])]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        bias = self._linears()[-1].bias
        parts = halves[0] + halves[1] + (bias.float() if isinstance(bias, Tensor) else 0.0)
        tolerance = TOLERANCE if hidden.dtype == torch.float32 else 2e-2
        return float((parts - whole).abs().max()) <= tolerance * float(whole.abs().max())

    def _leading_in(self) -> list[tuple[nn.Module, int]]:
        return list(zip(self._linears()[:-1], self.outputs, strict=True))

    def _linears(self) -> list[nn.Module]:
        """The frozen linear modules, whether or not an adapter wraps them."""
        return [module for _, module in linear_paths(self.block)]


def _matrix(module: nn.Module) -> Tensor:
    """Weight (out, in) of a linear module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _linear(matrix: Tensor, bias: Tensor | None) -> Forward:
    return lambda hidden, *_, **__: linear(hidden, matrix, bias)
