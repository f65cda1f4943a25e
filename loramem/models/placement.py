"""Where an adapter sits: which linear modules of which decoder layers."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from loramem.errors import ArgumentError, UnsupportedBaseModel
from loramem.models.layers import LastLayer, adaptable, decoder_layers, features, linear_paths
from loramem.models.module_names import exact_names, is_named, module_paths
from loramem.models.shard_sizes import Size

LAST_LAYERS = 2  # measured, docs/engine.md


@dataclass(frozen=True)
class Placement:
    """Which linear modules of which decoder layers carry the adapter."""

    modules: tuple[str, ...]
    """As PEFT's target_modules, sorted: names without path, or with as much of the path as tells them apart."""
    layers: tuple[int, ...]
    """0-based decoder layers."""

    @classmethod
    def default(cls, model: PreTrainedModel) -> "Placement":
        """All attention and MLP projections of the last two layers that have any which PEFT can attach to.

        Raises:
            UnsupportedBaseModel: No layer has, or there is not one stack of decoder layers.
        """
        layers = len(decoder_layers(model))
        last = tuple(range(max(0, layers - LAST_LAYERS), layers))
        names, found = exact_names(model, _adaptable(model, last), last)
        if len(_layers_of(model, found)) < len(last):
            # Layers differ (attention in some of them only), or PEFT reads all names of a layer as something else.
            reached = dict[int, set[str]]()
            for layer in reversed(range(layers)):
                if len(reached) < LAST_LAYERS and (alone := exact_names(model, _adaptable(model, [layer]), [layer])[1]):
                    reached[layer] = alone
            last = tuple(sorted(reached))
            names, found = exact_names(model, set[str]().union(*reached.values()), last)
        if not found:
            raise UnsupportedBaseModel(
                f"{type(model).__name__} has no projection of attention or of a dense or shared MLP that a PEFT "
                "adapter can sit on. Use a model with attention layers."
            )
        return cls(names, last)

    @classmethod
    def named(cls, model: PreTrainedModel, modules: Sequence[str], layers: Sequence[int]) -> "Placement":
        """These modules of these layers (0-based).

        Raises:
            ArgumentError: The model has no such linear module or layer, or PEFT takes the name for something else.
        """
        every = decoder_layers(model)
        if not layers or not all(0 <= layer < len(every) for layer in layers):
            raise ArgumentError(
                f"The layers are 0 to {len(every) - 1}, not {', '.join(map(str, layers)) or 'none'}.",
                argument="layers",
                value=tuple(layers),
            )
        layers = tuple(sorted(set(layers)))
        known = _adaptable(model, layers)
        meant = {path: module for path, module in known.items() if is_named(path, modules)}
        if not modules or not all(any(is_named(path, [name]) for path in known) for name in modules):
            names = sorted({path.rpartition(".")[2] for path in known})
            raise ArgumentError(
                f"The linear modules are {', '.join(names)}, not {', '.join(modules) or 'none'}.",
                argument="modules",
                value=tuple(modules),
            )
        exact, found = exact_names(model, meant, layers)
        if found != set(meant):
            raise ArgumentError(
                f"PEFT cannot attach to {min(set(meant) - found)} of {type(model).__name__} alone.",
                argument="modules",
                value=tuple(modules),
            )
        return cls(exact, layers)

    @classmethod
    def ladder(cls, model: PreTrainedModel) -> "list[Placement]":
        """Placements that hold more and more, for writes that find the one before too small.

        First those behind the last attention, where training needs no pass through the network
        (`loramem.models.features`): the last projection of the last MLP, all of its projections, that of the attention
        as well. A last MLP of experts offers the attention's alone. Then `default`.

        Raises:
            UnsupportedBaseModel: See `default`.
        """
        widest = cls.default(model)
        try:
            last = LastLayer.of(model)
        except UnsupportedBaseModel:
            return [widest]
        layer, paths = len(decoder_layers(model)) - 1, module_paths(model)
        allowed = {module for _, module in adaptable(last.layer)}
        mlp = [module for block in last.blocks for _, module in linear_paths(block)]
        dense = mlp if mlp and set(mlp) <= allowed else []
        attention = [last.projection] if last.projection is not None and last.projection in allowed else []
        steps = [dense[-1:], dense, [*dense, *attention]] if dense else [attention]
        rungs = list[Placement]()
        for modules in steps:
            with suppress(ArgumentError):  # PEFT cannot attach there alone
                rung = cls.named(model, [paths[module] for module in modules], [layer])
                rungs += [rung] if rung not in rungs else []
        return [*rungs, widest]

    def paths(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The adapted linear modules by their path in the model, layer by layer."""
        layers, paths = decoder_layers(model), module_paths(model)
        return {
            paths[module]: module
            for layer in self.layers
            for _, module in linear_paths(layers[layer])
            if is_named(paths[module], self.modules)
        }

    def parameters_per_rank(self, model: PreTrainedModel) -> int:
        """Adapter parameters that one rank costs: Σ (inputs + outputs) over the adapted modules."""
        return sum(sum(features(module)) for module in self.paths(model).values())

    def size(self, model: PreTrainedModel) -> Size:
        """Parameters per rank, and over how many matrices."""
        return Size(self.parameters_per_rank(model), 2 * len(self.paths(model)))


def _adaptable(model: PreTrainedModel, layers: Iterable[int]) -> dict[str, nn.Module]:
    """What may carry an adapter in these layers, by path in the model."""
    stack, paths = decoder_layers(model), module_paths(model)
    return {paths[module]: module for layer in layers for _, module in adaptable(stack[layer])}


def _layers_of(model: PreTrainedModel, paths: set[str]) -> set[int]:
    """The layers that hold these modules."""
    names = module_paths(model)
    return {
        layer
        for layer, held in enumerate(decoder_layers(model))
        if any(names[module] in paths for _, module in linear_paths(held))
    }


def tensor_shapes(model: PreTrainedModel, placement: Placement, rank: int) -> dict[str, tuple[int, int]]:
    """The tensors of a saved adapter: PEFT name -> shape, lora_A (rank, inputs) and lora_B (outputs, rank)."""
    shapes = dict[str, tuple[int, int]]()
    for path, module in placement.paths(model).items():
        inputs, outputs = features(module)
        shapes[f"base_model.model.{path}.lora_A.weight"] = (rank, inputs)
        shapes[f"base_model.model.{path}.lora_B.weight"] = (outputs, rank)
    return shapes
