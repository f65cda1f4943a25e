"""The decoder layers of a causal language model and the linear modules in them, whatever the architecture."""

from collections.abc import Iterator
from inspect import signature

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramem.errors import UnsupportedBaseModel


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
    # PEFT wraps a linear module and keeps the original below it as "base_layer": the wrapper's name is the answer.
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name:
            yield name.removesuffix(".base_layer").rpartition(".")[2], module


def position_wise_blocks(layer: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a decoder layer that treat every position by itself: the MLP, dense or of experts.

    Attention is told masks and positions; a block that takes hidden states and nothing else cannot mix positions that
    it does not know apart.
    """
    for block in layer.children():
        if next(linears(block), None) is not None and len(signature(block.forward).parameters) == 1:
            yield block


def features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module.weight, Tensor)
    inputs, outputs = module.weight.shape  # Conv1D of GPT-2 stores the transpose
    return int(inputs), int(outputs)
