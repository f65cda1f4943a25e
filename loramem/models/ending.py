"""The end of a model, run over features: what comes after the last attention, with an adapter there.

The end is the architecture's own code, every position as a sequence of one token: layers below hand on what they are
given, the last attention hands back what it gave in the frozen pass, and norms, residuals, MLP, soft-capping and head
are computed as ever.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loramem.models.features import Features
from loramem.models.layers import LastLayer, decoder_layers
from loramem.models.trunk import Forward, replaced_forwards

LOOK_ROWS = 4096
SCORED_ROWS = 1024
"""Positions whose logits over the whole vocabulary are computed together."""


Head = Callable[[Tensor], Tensor]
"""What gives logits (…, V) of the last hidden states (…, d)."""


class Ending:
    """The model from its last attention on, over features, with whatever adapter is attached there.

    Frozen products whose inputs are constants are computed once: of every adapted module that no other adapted one
    feeds, the base's output; of an MLP that ends in the one adapted module, everything before it.

    Args:
        model: The base with an adapter attached to modules of the last layer, or without one.
        adapted: The PEFT layers of the active adapter; none below the last layer's attention projection.
        eight_bits: The last layer computes in eight bits now, within `loramem.models.rounded_inputs.in_eight_bits`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        features: Features,
        adapted: Sequence[LoraLayer] = (),
        *,
        eight_bits: bool = False,
    ) -> None:
        self.model, self.features, self.eight_bits = model, features, eight_bits
        self._layers, self._last = decoder_layers(model), LastLayer.of(model)
        self._projection = next((layer for layer in adapted if layer.get_base_layer() is self._last.projection), None)
        self._constant: dict[LoraLayer, Tensor] = {}
        """What the base gives at adapted modules with constant inputs, (N, out)."""
        self._inputs: dict[LoraLayer, Tensor] = {}
        """What enters the adapted modules, (N, in); a constant or as it is now."""
        self._ends: dict[LoraLayer, nn.Module] = {}
        """Adapted modules whose output is that of an MLP."""
        self._whole: LoraLayer | None = None
        """The one adapted module, where it ends an MLP: nothing else of that is run."""
        self._scales: dict[LoraLayer, float] = {}
        if adapted:
            self._look_at(adapted)
        self._deviations: list[_Deviations] = []
        self._first_outcome = 0
        self._own_sizes: _Values = {}
        """Of the values that deviate, at every position, (N, 1)."""
        self._dealt: list[tuple[Tensor, Tensor]] = []
        """Of each deviation: whose every position gets, (N,), and how much of it, (N, 1)."""
        self.has_outcome = torch.zeros(len(features), dtype=torch.bool, device=features.targets.device)
        """Positions (N,) that were dealt the deviation of an outcome."""

    def logits(self, rows: slice | Tensor, head: Head | None = None, *, deviating: bool = True) -> Tensor:
        """Logits (n, V) in float32 at some of the positions.

        Args:
            rows: Which of the N positions.
            head: In place of the model's, such as the rows of some tokens alone.
            deviating: With the deviations that `shuffle_deviations` dealt out.
        """
        here = self._values_at(rows, self._dealt if deviating else [])
        forwards: dict[nn.Module, Forward] = {
            layer.base_layer: _giving(here["output", layer]) for layer in self._constant
        }
        if (whole := self._whole) is not None:
            inputs = here["input", whole]
            forwards[self._ends[whole]] = lambda hidden: whole(_shaped_as(inputs, hidden))
        if head is not None:
            forwards[self.model.get_output_embeddings()] = head
        mixed = here["input", self._projection] if self._projection else None
        return self._run(rows, here["entering", None], mixed, forwards).float()

    def hidden(self, rows: slice | Tensor, outputs: Mapping[nn.Module, Tensor] | None = None) -> Tensor:
        """What enters the head (n, d) at some of the positions, for an end without an adapter.

        Args:
            outputs: What blocks of the last layer are to give there (n, d), in the place of what they compute.
        """
        forwards: dict[nn.Module, Forward] = {block: _giving(values) for block, values in (outputs or {}).items()}
        forwards[self.model.get_output_embeddings()] = lambda hidden: hidden
        return self._run(rows, self.features.entering[rows], None, forwards)

    @torch.no_grad()
    def block_values(self, block: nn.Module) -> tuple[Tensor, Tensor]:
        """What enters a block of the last layer and what it gives at all positions, (N, d) each."""
        seen = [self._seen(rows, ()) for rows in self.chunks(LOOK_ROWS)]
        return tuple(torch.cat([getattr(part, name)[block] for part in seen]) for name in ("inputs", "blocks"))  # type: ignore[return-value]

    @torch.no_grad()
    def scores(self) -> tuple[Tensor, Tensor]:
        """Of all positions: cross-entropy (N,) in nats of the target, and whether it is the likeliest token, (N,)."""
        losses, likeliest = list[Tensor](), list[Tensor]()
        for rows in self.chunks(SCORED_ROWS):
            logits, targets = self.logits(rows, deviating=False), self.features.targets[rows]
            losses.append(cross_entropy(logits, targets, reduction="none"))
            likeliest.append(logits.argmax(-1) == targets)
        return torch.cat(losses), torch.cat(likeliest)

    def chunks(self, size: int) -> Iterator[slice]:
        """Consecutive ranges of the positions, of ``size`` at most."""
        for first in range(0, len(self.features), size):
            yield slice(first, min(first + size, len(self.features)))

    def moments(self, layer: LoraLayer) -> Tensor:
        """Second moments (in, in) of what enters an adapted module."""
        inputs = self._inputs[layer].float()
        return inputs.T @ inputs / len(inputs)

    def scale(self, layer: LoraLayer) -> float:
        """Root mean square of what an adapted module's output is added to.

        That is the base's output there; for a module that ends a branch of the layer, the hidden states beside it if
        they are larger.
        """
        return self._scales[layer]

    def deviate(self, others: Sequence["Ending"], factor: float = 1.0, outcomes: Sequence["Ending"] = ()) -> None:
        """Train over how the same positions come out in other passes, such as one of another dtype, times a factor.

        Args:
            outcomes: Several passes of one arithmetic whose roundings come out otherwise in each. What they have in
                common is a position's own, the rest might have come to any position.
        """
        mine = self._values()
        self._own_sizes = {name: _sizes(values) for name, values in mine.items()}

        def deviations(other: Ending) -> _Values:
            return {name: (theirs - mine[name]) / self._own_sizes[name] for name, theirs in other._values().items()}

        self._deviations = [
            _Deviations({}, {name: factor * own for name, own in deviations(other).items()}) for other in others
        ]
        found = [deviations(outcome) for outcome in outcomes]
        common = {name: torch.stack([each[name] for each in found]).mean(0) for name in (mine if found else ())}
        # n outcomes differ from their mean by √(1 − 1/n) of what they differ from the true one, the next by √(1 + 1/n).
        whole = factor * math.sqrt((len(found) + 1) / max(len(found) - 1, 1))
        self._first_outcome = len(others)
        self._deviations += [
            _Deviations(common, {name: whole * (own - common[name]) for name, own in each.items()}) for each in found
        ]

    def shuffle_deviations(self, generator: torch.Generator) -> None:
        """Give a third of the positions none, a third their own deviation, a third that of some position in proportion
        to their sizes (of outcomes what they have in common, and the rest of some position), each from one of the
        passes; anew for each step. What has none or its own is what will be served, the rest is what else rounding may
        do."""
        count, own = len(self._deviations), torch.arange(len(self.features), device=generator.device)
        pass_of = torch.randint(count, own.shape, generator=generator, device=own.device) if count > 1 else 0 * own
        self._dealt, self.has_outcome = [], torch.zeros_like(self.has_outcome)
        for number in range(count):
            order = torch.randperm(len(own), generator=generator, device=own.device)
            chance = torch.rand(len(own), generator=generator, device=own.device)
            has = (chance < 2 / 3) & (pass_of == number)
            amount = has.to(self.features.entering.dtype)
            self._dealt.append((torch.where(chance < 1 / 3, own, order), amount[:, None]))
            if number >= self._first_outcome:
                self.has_outcome |= has

    def _values(self) -> "_Values":
        """All that is constant here and read by `logits`."""
        values: _Values = {("entering", None): self.features.entering}
        values |= {("output", layer): outputs for layer, outputs in self._constant.items()}
        if (read := self._whole or self._projection) is not None:
            values["input", read] = self._inputs[read]
        return values

    def _values_at(self, rows: slice | Tensor, dealt: Sequence[tuple[Tensor, Tensor]]) -> "_Values":
        """The values at some positions, with the deviations dealt out to them; made for these rows alone, as all
        positions at once are the largest tensors there are."""
        here = {name: values[rows] for name, values in self._values().items()}
        for deviations, (order, amount) in zip(self._deviations, dealt, strict=False):
            whose, share = order[rows], amount[rows]
            here = {
                name: torch.addcmul(values, deviations.at(name, rows, whose), share * self._own_sizes[name][rows])
                for name, values in here.items()
            }
        return here

    def _run(
        self, rows: slice | Tensor, entering: Tensor, mixed: Tensor | None, forwards: Mapping[nn.Module, Forward]
    ) -> Tensor:
        """What the model gives at ``rows``: logits (n, V), or (n, d) if the head hands on its input.

        Args:
            entering, mixed: At these rows; ``mixed`` is needed where the attention's projection is adapted.
        """
        attended = self.features.attended[rows, None]
        last_layer = self._last.layer.forward

        def attention(*_: Any, **__: Any) -> Any:
            if self._projection is None or mixed is None:
                return attended, None
            return self._projection(mixed[:, None]), None

        def enter(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            return last_layer(entering[:, None], *args, **kwargs)

        below: dict[nn.Module, Forward] = {layer: lambda hidden, *_, **__: hidden for layer in self._layers[:-1]}
        with replaced_forwards({**below, self._last.layer: enter, self._last.attention: attention, **forwards}):
            output = self.model(
                input_ids=self.features.tokens[rows, None],
                position_ids=self.features.positions[rows, None],
                use_cache=False,
            )
        logits: Tensor = output.logits[:, 0]
        return logits

    @torch.no_grad()
    def _look_at(self, adapted: Sequence[LoraLayer]) -> None:
        few = slice(0, 2)  # compared with one another: products of another shape round otherwise
        as_they_are, disturbed = self._seen(few, adapted), None
        with _disturbed(adapted):
            disturbed = self._seen(few, adapted)
        seen = [self._seen(rows, adapted) for rows in self.chunks(LOOK_ROWS)]
        self._inputs = {layer: torch.cat([part.inputs[layer] for part in seen]) for layer in adapted}
        given = {layer: torch.cat([part.base[layer] for part in seen]) for layer in adapted}
        self._constant = {
            layer: given[layer] for layer in adapted if torch.equal(as_they_are.inputs[layer], disturbed.inputs[layer])
        }
        self._ends = {
            layer: block
            for layer in adapted
            for block in self._last.blocks
            if layer is not block
            and layer in block.modules()
            and torch.equal(as_they_are.outputs[layer], as_they_are.blocks[block])
        }
        self._whole = adapted[0] if len(adapted) == 1 and adapted[0] in self._ends else None
        self._scales = {layer: self._scale(layer, given[layer]) for layer in adapted}

    def _seen(self, rows: slice, adapted: Sequence[LoraLayer]) -> "_Seen":
        seen = _Seen({}, {}, {}, {})
        with ExitStack() as hooks:
            for layer in adapted:
                hooks.callback(layer.base_layer.register_forward_hook(_keeper({}, seen.base, layer)).remove)
                # The base's own module may see inputs in eight bits, which its adapter does not.
                hooks.callback(layer.register_forward_hook(_keeper(seen.inputs, seen.outputs, layer)).remove)
            for block in self._last.blocks:
                hooks.callback(block.register_forward_hook(_keeper(seen.inputs, seen.blocks, block)).remove)
            handed_on: dict[nn.Module, Forward] = {self.model.get_output_embeddings(): lambda hidden: hidden}
            self._run(rows, self.features.entering[rows], self.features.mixed[rows], handed_on)
        return seen

    def _scale(self, layer: LoraLayer, given: Tensor) -> float:
        own = _root_mean_square(given)
        if layer is not self._projection and layer not in self._ends:
            return own
        return max(own, _root_mean_square(self.features.entering + self.features.attended))


_Values = dict[tuple[str, LoraLayer | None], Tensor]
"""Constants of the positions by what they are and, where it is an adapted module's, of which: (N, …)."""


@dataclass(frozen=True)
class _Deviations:
    """Of all positions in one pass, by their sizes."""

    common: _Values
    """What a position has in every outcome; nothing where there is one."""
    own: _Values
    """What it has beside that."""

    def at(self, name: tuple[str, LoraLayer | None], rows: slice | Tensor, others: Tensor) -> Tensor:
        """Of one value: the positions' common part and that of others beside it."""
        found = self.own[name][others]
        return found + self.common[name][rows] if self.common else found


@dataclass(frozen=True)
class _Seen:
    """What passed through modules: inputs and outputs by module, (n, …); ``base`` is without the adapter."""

    inputs: dict[Any, Tensor]
    base: dict[Any, Tensor]
    outputs: dict[Any, Tensor]
    blocks: dict[Any, Tensor]


def _keeper(inputs: dict[Any, Tensor], outputs: dict[Any, Tensor], module: nn.Module) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[module] = args[0].flatten(0, -2)
        outputs[module] = (output if isinstance(output, Tensor) else output[0]).flatten(0, -2)

    return keep


def _giving(values: Tensor) -> Forward:
    """Values (n, out) in the place of what a linear module computes: an architecture may flatten what it gives it."""
    return lambda inputs, *_, **__: _shaped_as(values, inputs)


def _shaped_as(values: Tensor, given: Tensor) -> Tensor:
    """Values (n, f) with the leading dimensions of a tensor of as many positions."""
    return values.reshape(*given.shape[:-1], values.shape[-1])


def _sizes(values: Tensor) -> Tensor:
    """Root mean square of every position, (N, 1); computed in float32, as squares overflow float16."""
    sizes = values.float().square().mean(1, keepdim=True).sqrt().to(values.dtype)
    return sizes.clamp(min=torch.finfo(values.dtype).tiny)


def _root_mean_square(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


@contextmanager
def _disturbed(adapted: Sequence[LoraLayer]) -> Iterator[None]:
    """Within this context the adapters change what their modules give."""
    weights = [layer.lora_B[name].weight for layer in adapted for name in layer.active_adapters if name in layer.lora_B]
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.add_(1.0)
    try:
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
