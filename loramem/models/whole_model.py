"""Whether all of a loaded model came from its files: transformers draws at random what it does not find, and goes on.

A certificate of random weights holds until the process ends. So whatever is missing or of another shape is refused,
and what is left over too, where it says that the model was read as something else than it is.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from loramem.errors import UnsupportedBaseModel

LARGER = 4
"""A model of this many times the values of its files is another one; they are not even tried, since what is missing
would be drawn first, and may not fit into memory. Tied weights count twice, which is within it."""
OLD_BUFFERS = {"bias", "masked_bias", "rotary_emb.inv_freq"}
REMEDY = "Save the model again with its own transformers class, or give another copy of it."


def check_size(values: int, model: PreTrainedModel, name: str) -> None:
    """Compare a model without weights, as config.json describes it, with what its files hold.

    Raises:
        UnsupportedBaseModel: The files can only be those of another model.
    """
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > LARGER * values:
        raise UnsupportedBaseModel(
            f"config.json of {name!r} describes a model of {described:,} parameters, its safetensors hold {values:,}. "
            "They belong to different models: give the config.json that belongs to the weights."
        )


def check_whole(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> None:
    """Refuse a model of which a tensor was not read from its files, or that was read as another one.

    Args:
        info: What transformers says of loading it (``output_loading_info``); tied weights and buffers that older
            versions saved are left out there.

    Raises:
        UnsupportedBaseModel: Names the tensors.
    """
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise UnsupportedBaseModel(
            f"The weights of {name!r} lack {_named(missing)}, which would be drawn at random.{_renamed(missing, left)} "
            f"{REMEDY} tie_word_embeddings in config.json says whether the unembedding is the embedding."
        )
    if info["mismatched_keys"]:
        others = sorted(info["mismatched_keys"])
        key, found, wanted = others[0]
        raise UnsupportedBaseModel(
            f"The weights of {name!r} are not of the shapes that config.json describes: {len(others)} tensors, such "
            f"as {key} of {tuple(found)} in place of {tuple(wanted)}. Give the config.json that belongs to the weights."
        )
    if misread := [key for key in left if _in_place(key, model)]:
        raise UnsupportedBaseModel(
            f"The weights of {name!r} hold {_named(misread)}, which {type(model).__name__} does not use, though it has "
            "the module around: they are of another architecture or configuration than config.json says. Give the "
            "config.json that belongs to the weights."
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := sorted(key for key, tensor in tensors if tensor.is_meta):
        raise UnsupportedBaseModel(f"{_named(empty)} of {name!r} were left without values. {REMEDY}")


def _in_place(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor that was left over belongs into a part that the model has.

    A vision tower, a head that predicts further tokens or another task's head stand beside the language model and
    change nothing of it. A bias of a Linear that was built without one, a norm in an attention that was built without
    one, or a further decoder layer are parts of what the weights were trained as.
    """
    modules = dict(model.named_modules())
    parts = key.split(".")
    owner = next(path for end in range(len(parts), -1, -1) if (path := ".".join(parts[:end])) in modules)
    if next(modules[owner].parameters(recurse=False), None) is not None:  # a Linear, a norm, an embedding
        return True
    if isinstance(modules[owner], nn.ModuleList):  # a further layer: one that predicts further tokens is named so
        return not model.config.get_text_config().to_dict().get("num_nextn_predict_layers")
    steps = owner.split(".")
    above = (".".join(steps[:end]) for end in range(1, len(steps) + 1))
    in_layer = any(isinstance(modules.get(path), nn.ModuleList) for path in above)
    # Older checkpoints hold the causal mask and frequencies of an attention as buffers of these names.
    return in_layer and key.removeprefix(f"{owner}.") not in OLD_BUFFERS


def _renamed(missing: Collection[str], left: Collection[str]) -> str:
    """A hint where a missing tensor is there under a name with a prefix."""
    for key in left:
        for wanted in missing:
            if key.endswith(f".{wanted}"):
                return f" The files call {wanted} {key}: remove the prefix {key.removesuffix(wanted)!r}."
    return ""


def _named(keys: Collection[str], most: int = 3) -> str:
    shown = ", ".join(list(keys)[:most])
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more tensors"
