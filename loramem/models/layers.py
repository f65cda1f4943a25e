"""The decoder layers of a causal language model and the linear modules in them, whatever the architecture."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramem.errors import UnsupportedBaseModel

# Blocks whose linear modules may carry an adapter, by the names that transformers gives them. What is not here is no
# attention over all positions and no MLP that every position passes: experts, routers, recurrences, indexers.
ATTENTION = frozenset(
    {"attn", "attention", "self_attn", "self_attention", "self", "multi_head_attention", "output", "mixer"}
)
MLP = frozenset(
    {"mlp", "ffn", "feed_forward", "mlp_block", "intermediate", "w_in", "shared_mlp", "shared_expert"}
    | {"shared_experts"}
)
ATTENTION_OUTPUT = frozenset({"o_proj", "out_proj", "c_proj", "dense", "wo"})
"""Names of an attention's output projection; the order in which modules are defined does not tell it."""
OF_LAYER = frozenset({"fc1", "fc2"})
"""An MLP that is no block of its own."""
NEVER = frozenset({"experts", "router", "gate", "crossattention", "adapter_modules"})


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers, whatever the architecture calls it.

    Raises:
        UnsupportedBaseModel: None, or more than one, has the configured number of layers.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [stack for stack in stacks if len(stack) == wanted]
    if len(found) != 1:
        raise UnsupportedBaseModel(
            f"{type(model).__name__} has {len(found)} lists of {wanted} layers; exactly one stack of decoder layers "
            "is needed to place an adapter."
        )
    return found[0]


def linear_modules(layer: nn.Module) -> tuple[str, ...]:
    """Sorted names of a layer's linear modules, without path."""
    return tuple(sorted({name for name, _ in linears(layer)}))


def linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A layer's linear modules by name without path; of an adapted one the frozen original."""
    for path, module in linear_paths(layer):
        yield path.rpartition(".")[2], module


def linear_paths(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A layer's linear modules by path within it; of an adapted one the frozen original."""
    # PEFT wraps a linear module and keeps the original below it as "base_layer": the wrapper's name is the answer.
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name:
            yield name.removesuffix(".base_layer"), module


def adaptable(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear modules of a layer that an adapter may sit on, by path within it.

    These are the projections of attention, and of the MLP that every position passes (dense, or the shared one beside
    experts). Not: routers and gates of experts, single experts, whatever a recurrence or convolution is made of, and
    attention to an encoder.
    """
    for path, module in linear_paths(layer):
        parent, _, name = path.rpartition(".")
        parts = parent.split(".")
        if NEVER.intersection([*parts, name]) or name.endswith("_gate") or parts[0].endswith("layernorm"):
            continue
        known = parts[-1] in ATTENTION | MLP and not _convolves(layer.get_submodule(parent))
        if (known or path in OF_LAYER) and _is_plain(module):
            yield path, module


def _convolves(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv1d) for module in block.modules())


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    """Whether a linear module gives W x + b and nothing else: a router may be a subclass that returns a tuple."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    assert isinstance(module, nn.Linear)
    inputs = torch.ones(1, module.in_features).to(module.weight)
    try:
        outputs: object = module(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    expected = linear(inputs, module.weight, module.bias)
    return isinstance(outputs, Tensor) and outputs.shape == expected.shape and torch.allclose(outputs, expected)


def position_wise_blocks(layer: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a decoder layer that treat every position by itself: the MLP, dense or of experts.

    Attention is told masks and positions; a block that takes hidden states and nothing else cannot mix positions that
    it does not know apart.
    """
    for block in layer.children():
        own = dict(block.named_children()).get("base_layer", block)  # a linear module may be a block, and be adapted
        if next(linears(block), None) is not None and len(signature(own.forward).parameters) == 1:
            yield block


def features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module.weight, Tensor)
    inputs, outputs = module.weight.shape  # Conv1D of GPT-2 stores the transpose
    return int(inputs), int(outputs)


@dataclass(frozen=True)
class LastLayer:
    """The parts of the last decoder layer."""

    layer: nn.Module
    attention: nn.Module
    projection: nn.Module | None
    """The output projection of the attention, by its name: what it gives is what the attention gives."""
    blocks: tuple[nn.Module, ...]
    """Position-wise: the MLP, dense or of experts."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LastLayer":
        """The last layer's parts.

        Raises:
            UnsupportedBaseModel: Other than one attention beside the position-wise blocks.
        """
        layer = decoder_layers(model)[-1]
        blocks = tuple(position_wise_blocks(layer))
        others = [block for block in layer.children() if block not in blocks and next(linears(block), None)]
        if len(others) != 1:
            raise UnsupportedBaseModel(f"{type(layer).__name__} has {len(others)} attentions where one is expected.")
        projections = [module for name, module in linears(others[0]) if name in ATTENTION_OUTPUT]
        return cls(layer, others[0], projections[0] if len(projections) == 1 else None, blocks)
