"""LoRA adapters on a base model: create, grow, save, load.

The saved form is the portable contract: a plain PEFT LoRA (uniform rank, no bias, no rsLoRA, no DoRA, nothing else
saved), safetensors and a config written by ourselves with sorted keys, since PEFT's own differs from run to run.
"""

import hashlib
import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramem.errors import UnsupportedBaseModel
from loramem.models.adapter_header import CONFIG, WEIGHTS
from loramem.models.base_model import DTYPES, BaseModel
from loramem.models.dtypes import Dtype
from loramem.models.feature_cache import FeatureCache
from loramem.models.module_names import adapted_paths
from loramem.models.placement import Placement

CARD = "README.md"
STORED_DTYPE: Dtype = "float32"  # of every saved adapter; PEFT keeps it on a base of any dtype
MAX_LOADED = 64  # 170 KB each at rank 20 behind SmolLM2-135M, 2.4 MB at rank 32 behind a model of 8 G parameters
ALPHA_PER_RANK = 2  # alpha = 2·r: the scaling alpha/r stays 2 when the rank grows, so growth keeps the function


class AdaptedModel:
    """A base model that adapters are attached to, one of them active at a time.

    Not safe to share between threads without a lock: which adapter is active is state of the model.

    Args:
        max_loaded: Saved adapters kept in memory.
        adapter_dtype: What saved adapters are cast to when they are loaded; None leaves them to PEFT, which keeps
            float32 and raises less to it, whatever the base's dtype.
    """

    def __init__(self, base: BaseModel, max_loaded: int = MAX_LOADED, adapter_dtype: Dtype | None = None) -> None:
        self.base = base
        self.max_loaded = max_loaded
        self.adapter_dtype = None if adapter_dtype is None else DTYPES[adapter_dtype]
        kept = adapter_dtype is None or adapter_dtype == "q8_0"
        self.dtypes: dict[str, str] = {"base": base.dtype, "adapter": STORED_DTYPE if kept else str(adapter_dtype)}
        """What certificates name: dtypes of the base model and of adapters that are loaded from disk."""
        self.kept_features = FeatureCache()
        self.ends_alone: bool | None = None
        """Whether the end of the model alone gives what all of it gives (`features_of`); None until it was tried."""
        self._peft: PeftModel | None = None
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._attached: list[LoraLayer] | None = None
        """The modules that carry adapters; None until they are looked for again."""

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM, through whose adapted modules the active adapter acts."""
        return self.base.model

    @cached_property
    def ladder(self) -> list[Placement]:
        """See `Placement.ladder`."""
        return Placement.ladder(self.model)

    def is_behind_attention(self, placement: Placement) -> bool:
        """Whether an adapter there changes no attention: keys and values are the base's then, whatever the adapter."""
        return placement in self.ladder[:-1]

    def create(self, name: str, rank: int, placement: Placement, seed: int) -> None:
        """Attach a fresh trainable adapter (A random, B zero: the base's function) and activate it.

        One of the same name, left by an interrupted training, is replaced.

        Raises:
            UnsupportedBaseModel: PEFT attaches to other modules than those of the placement.
        """
        config = LoraConfig(
            r=rank,
            lora_alpha=ALPHA_PER_RANK * rank,
            target_modules=list(placement.modules),
            layers_to_transform=list(placement.layers),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), _no_future_warnings():
            if self._peft is not None and name in self._peft.peft_config:
                self.remove(name)
            torch.default_generator.manual_seed(seed)  # not of a device: nothing is drawn there, and it is the caller's
            if self._peft is None:
                self._peft = get_peft_model(self.base.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        if (attached := adapted_paths(self.model, name)) != set(placement.paths(self.model)):
            self.remove(name)
            raise UnsupportedBaseModel(
                f"PEFT attaches to {', '.join(sorted(attached)) or 'nothing'} of {type(self.model).__name__}, not to "
                f"{', '.join(placement.modules)} of layers {', '.join(map(str, placement.layers))} alone. Use the "
                "version of PEFT that the store was made with, or write a new store."
            )
        self._activate(name, trainable=True)

    def grow(self, name: str, rank: int, placement: Placement, seed: int) -> None:
        """Raise an adapter's rank without changing its function: new rows of A random, new columns of B zero."""
        old = self.weights(name)
        self.remove(name)
        self.create(name, rank, placement, seed)
        with torch.no_grad():
            for key, tensor in self.weights(name).items():
                previous = old[key]
                if ".lora_A." in key:
                    tensor[: previous.shape[0]] = previous
                else:
                    tensor[:, : previous.shape[1]] = previous

    def load(self, name: str, folder: Path) -> None:
        """Activate a saved adapter, reading it from disk unless it is loaded already; the least used one leaves."""
        if name not in self._loaded:
            place = str(self.model.device)  # PEFT would look for another: a base on the CPU does not touch a GPU
            with _no_future_warnings():
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(
                        self.base.model, folder, adapter_name=name, torch_device=place
                    )
                else:
                    self._peft.load_adapter(str(folder), adapter_name=name, torch_device=place)
            self._attached = None
            if self.adapter_dtype is not None:
                for layer in self.lora_layers(name):
                    layer.lora_A[name].to(self.adapter_dtype)
                    layer.lora_B[name].to(self.adapter_dtype)
            while len(self._loaded) >= self.max_loaded:
                self.remove(next(iter(self._loaded)))
            self._loaded[name] = None
            self._activate(name, trainable=False)
        self._loaded.move_to_end(name)
        for layer in self._carriers():  # what `_activate` does, without a walk over all modules
            layer.enable_adapters(True)
            layer.set_adapter(name, inference_mode=True)

    def is_loaded(self, name: str) -> bool:
        return name in self._loaded

    def remove(self, name: str) -> None:
        """Detach an adapter and free its memory."""
        assert self._peft is not None
        self._loaded.pop(name, None)
        self._attached = None
        others = [other for other in self._peft.peft_config if other != name]
        if not others:
            # PEFT would go on holding the deleted adapter for the active one, and looks it up at the next load.
            self._peft.base_model.unload()
            self._peft = None
            return
        # PEFT warns when the active adapter is deleted.
        self._activate(next(reversed(self._loaded)) if self._loaded else others[-1], trainable=False)
        self._peft.delete_adapter(name)

    def deactivate(self) -> None:
        """Make the model the plain base until an adapter is activated; loaded ones stay in memory."""
        for layer in self._carriers():
            layer.enable_adapters(False)

    @contextmanager
    def mixed(self, names: Sequence[str]) -> Iterator[None]:
        """Within this context each row of a batch goes through its own adapter; afterwards the model is the base.

        The arithmetic is that of one adapter in PEFT, which for mixed batches rounds once more in half precision.

        Args:
            names: An adapter that is loaded for each row of every pass; fastest with equal ones side by side.
        """
        alike = [(name, len(list(rows))) for name, rows in groupby(names)]
        ends = accumulate(count for _, count in alike)
        runs = [(name, slice(end - count, end)) for (name, count), end in zip(alike, ends, strict=True)]

        def adapted(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
            assert isinstance(layer, LoraLayer)
            parts = []
            for name, rows in runs:
                part = result[rows]
                if name in layer.lora_A:
                    down, up = layer.lora_A[name], layer.lora_B[name]
                    lora = up(down(args[0][rows].to(down.weight.dtype))) * layer.scaling[name]
                    part = (part + lora).to(result.dtype)
                parts.append(part)
            return torch.cat(parts)

        self.deactivate()
        with ExitStack() as hooks:
            for layer in self._carriers():
                hooks.callback(layer.register_forward_hook(adapted).remove)
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is the plain base."""
        if self._peft is None:
            yield
        else:
            with self._peft.disable_adapter():
                yield

    def weights(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors by PEFT name; shared with the model, not copied."""
        assert self._peft is not None
        state: dict[str, Tensor] = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        return dict(sorted(state.items()))

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the active adapter that training may change, in a fixed order."""
        assert self._peft is not None
        return [p for _, p in sorted(self._peft.named_parameters()) if p.requires_grad]

    def lora_layers(self, name: str) -> list[LoraLayer]:
        """The adapted linear modules of an adapter, in a fixed order; its matrices are ``lora_A[name].weight``…"""
        return [layer for layer in self._carriers() if name in layer.lora_A]

    def _carriers(self) -> list[LoraLayer]:
        if self._attached is None:
            modules = sorted(self.model.named_modules())
            self._attached = [module for _, module in modules if isinstance(module, LoraLayer)]
        return self._attached

    def _activate(self, name: str, *, trainable: bool) -> None:
        assert self._peft is not None
        self._attached = None
        self._peft.base_model.enable_adapter_layers()  # makes what was active before trainable, so it comes first
        self._peft.set_adapter(name, inference_mode=not trainable)
        self._peft.eval()


@contextmanager
def _no_future_warnings() -> Iterator[None]:
    """PEFT calls names that transformers has deprecated; nobody who uses loramem can act on that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def serialize(weights: dict[str, Tensor], base: BaseModel, placement: Placement) -> dict[str, bytes]:
    """The files of an adapter, byte for byte the same for the same weights: name -> content.

    Weights are float32, the precision they were trained and certified in.
    """
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(weights.items())}
    rank = next(len(tensor) for name, tensor in tensors.items() if ".lora_A." in name)
    return {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        CONFIG: config_content(rank, placement, base.id, base.revision),
        CARD: _card(base.id, rank).encode(),
    }


def config_content(rank: int, placement: Placement, base_id: str, revision: str | None) -> bytes:
    """`portable_config` as it is saved."""
    config = portable_config(rank, placement, base_id, revision)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def portable_config(rank: int, placement: Placement, base_id: str, revision: str | None) -> dict[str, Any]:
    """adapter_config.json: the fields every LoRA loader knows, and no others."""
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_id,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": list(placement.layers),
        "lora_alpha": ALPHA_PER_RANK * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": revision,
        "target_modules": sorted(placement.modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def adapter_id(files: dict[str, bytes], namespace: str) -> str:
    """Hash of weights, config and namespace: 32 hex digits.

    Equal records in two namespaces give equal files; each namespace has an adapter of its own all the same.
    """
    weights, config = (hashlib.sha256(files[name]).hexdigest() for name in (WEIGHTS, CONFIG))
    return adapter_id_of(weights, config, namespace)


def adapter_id_of(weights_sha256: str, config_sha256: str, namespace: str) -> str:
    """The same of files whose hashes are known."""
    digest = hashlib.sha256(bytes.fromhex(weights_sha256 + config_sha256))
    digest.update(hashlib.sha256(namespace.encode()).digest())
    return digest.hexdigest()[:32]


def count_parameters(weights: dict[str, Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in weights.values())


def load_weights(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into an attached adapter of the same shape."""
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def rank_choices(rank: int, limit: int) -> Sequence[int]:
    """The ranks a write goes through, from ``rank`` up to ``limit``: one more up to six, then half as much again."""
    ranks = [rank]
    while ranks[-1] < limit:
        ranks.append(min(ranks[-1] + 1 if ranks[-1] < 6 else math.ceil(ranks[-1] * 1.5), limit))
    return ranks


def _card(base_id: str, rank: int) -> str:
    return f"""---
base_model: {base_id}
library_name: peft
tags: [lora, loramem]
---
A LoRA adapter of rank {rank} for `{base_id}`, written by loramem. It holds facts verbatim: whoever has it can
extract them. Load it with `peft.PeftModel.from_pretrained`, give the key as the user's message, decode greedily.
"""
