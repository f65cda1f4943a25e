"""Whether an adapter fits a base model: its tensors against those that PEFT makes there, without weights.

The model is built from its config.json on torch's meta device, which has shapes and no numbers, so that eight billion
parameters take a second.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from loramem import embedded
from loramem.errors import BaseModelNotFound, UnsupportedBaseModel
from loramem.models.adapter_header import AdapterHeader
from loramem.models.find_base import is_gguf
from loramem.models.gguf_file import check_gguf
from loramem.models.pretrained import read_config

Shapes = dict[str, tuple[int, ...]]
SAMPLER = "lora_monteclora_sampler"
"""What PEFT saves for going on with training, and does not make for inference."""

SAID_CHARACTERS = 200


@dataclass(frozen=True)
class BaseShape:
    """A base model without its weights."""

    name: str
    config: PreTrainedConfig

    @property
    def architecture(self) -> str | None:
        """First of "architectures" in its config.json."""
        names = self.config.architectures
        return str(names[0]) if names else None

    def misfits(self, adapter: AdapterHeader) -> list[str]:
        """What of an adapter's tensors PEFT would not put into this model, or would miss; in words, with shapes."""
        base = f"base model {self.name!r}"
        try:
            found, expected, every = _shapes(self.config, adapter)
        # A config may hold anything, and PEFT says no with whatever its code runs into: KeyError, RuntimeError…
        except Exception as error:
            return [f"PEFT does not adapt {base} as the config says ({_line(error)})"]
        strange = [name for name in found if name not in every]
        shaped = [name for name in found if every.get(name, found[name]) != found[name]]
        missing = [name for name in expected if name not in found]
        return [
            *_first([f"tensor {name}, of shape {found[name]}, fits no module of {base}" for name in strange]),
            *_first([f"tensor {name} has shape {found[name]}, {base} takes {every[name]}" for name in shaped]),
            *_first([f"tensor {name}, of shape {expected[name]} on {base}, is not there" for name in missing]),
        ]


def base_shape(name: str) -> BaseShape:
    """The shape of a base model named by Hub id, local folder, GGUF file or "loramem-tiny"; of the Hub its config
    alone.

    Raises:
        BaseModelNotFound: No such folder, and the Hub does not give a config.json.
        UnsupportedBaseModel: It is no causal language model that transformers builds without code of its folder.
    """
    folder = embedded.base_path() if name == embedded.NAME else Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BaseModelNotFound(f"{name!r} has no config.json. Give the folder of a model of transformers.")
    try:
        if is_gguf(folder):
            check_gguf(folder, name)
            return BaseShape(name, read_config(folder, name))
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
    except OSError as error:
        raise BaseModelNotFound(
            f"Base model {name!r} is neither a local folder nor available from the Hub ({_line(error)})."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UnsupportedBaseModel(f"The config.json of {name!r} cannot be read ({_line(error)}).") from None
    shape = BaseShape(name, config)
    try:
        _build(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UnsupportedBaseModel(
            f"{name!r} cannot be built as a causal language model from its config.json ({_line(error)})."
        ) from None
    return shape


def _build(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _shapes(config: PreTrainedConfig, adapter: AdapterHeader) -> tuple[Shapes, Shapes, Shapes]:
    """An adapter as PEFT reads it; what it would save of one with this config; all that the adapted model has."""
    wanted: dict[str, Any] = json.loads(json.dumps(dict(adapter.config)))  # PEFT changes what it is given
    wanted.pop("runtime_config", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = PeftConfig.from_peft_type(**wanted)
        given.init_lora_weights, given.inference_mode = True, True  # where it starts changes no shape
        peft = PeftModel(_build(config), given, low_cpu_mem_usage=True)
        saved = get_peft_model_state_dict(peft, save_embedding_layers=False)
        found = _renamed(
            peft,
            given,
            {
                name: torch.empty(header.shape, device="meta")
                for name, header in adapter.tensors.items()
                if SAMPLER not in name
            },
        )
    expected = _sizes(saved)
    return _sizes(found), expected, _sizes(peft.state_dict()) | expected


def _renamed(peft: PeftModel, config: PeftConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as this transformers calls them: experts that had a module each may have become one parameter."""
    renamed: dict[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(peft, config, tensors)
    return renamed


def _sizes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _first(found: list[str]) -> list[str]:
    """The first of many alike, and how many there are."""
    return [found[0] if len(found) == 1 else f"{found[0]} ({len(found) - 1} more like this)"] if found else []


def _line(error: Exception) -> str:
    """What it says, in one line that fits a terminal."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= SAID_CHARACTERS else f"{said[:SAID_CHARACTERS]}…"
