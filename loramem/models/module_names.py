"""Names under which PEFT attaches to exactly the linear modules that are meant.

PEFT's target_modules are ends of paths, and for the fused experts of some architectures it reads gate_proj, up_proj and
down_proj as parameters of the experts, wherever else these names stand. What it would do is not guessed: it is tried on
a stand-in of the model, which has the same paths and no weights.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

STAND_IN = "stand-in"


def is_named(path: str, names: Iterable[str]) -> bool:
    """Whether a path is, or ends in, one of these names, as PEFT matches target_modules."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """The path of every module as it is without adapters."""
    return {module: path.replace(".base_layer", "") for path, module in model.named_modules() if ".lora_" not in path}


def adapted_paths(model: nn.Module, adapter: str) -> set[str]:
    """Paths of the modules that an adapter is attached to, those of other kinds than plain linear ones among them."""
    return {
        path.replace(".base_layer", "")
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def exact_names(
    model: PreTrainedModel, meant: Collection[str], layers: Sequence[int]
) -> tuple[tuple[str, ...], set[str]]:
    """The shortest target_modules, sorted, with which PEFT attaches to modules in ``meant`` and to no others.

    Args:
        meant: Paths of linear modules in these layers.

    Returns:
        The names, and the paths among ``meant`` that they reach: those that no name reaches alone are missing.
    """
    leaves = sorted({path.rpartition(".")[2] for path in meant})
    if _attached(model, leaves, layers) == set(meant):
        return tuple(leaves), set(meant)
    names, found = set[str](), set[str]()
    for leaf in leaves:
        paths = {path for path in meant if path.rpartition(".")[2] == leaf}
        best = dict[str, set[str]]()
        for depth in range(1, max(path.count(".") for path in paths) + 1):
            ends = {".".join(path.split(".")[-depth:]) for path in paths}
            attached = {end: _attached(model, [end], layers) for end in ends}
            good = {end: places for end, places in attached.items() if places and places <= paths}
            if len(set().union(*good.values())) > len(set().union(*best.values())):
                best = good
            # With more of the path a name means less, but never what it did not mean with less of it.
            if not any(attached.values()) or set().union(*best.values()) == paths:
                break
        names |= set(best)
        found |= set().union(*best.values())
    if found and _attached(model, sorted(names), layers) != found:
        return (), set()
    return tuple(sorted(names)), found


def _attached(model: PreTrainedModel, names: Sequence[str], layers: Sequence[int]) -> set[str]:
    """Where PEFT attaches for these target_modules and loads again what it saved; nowhere if it refuses them.

    What it attaches to and does not load again stands here with a "!", which is no path.
    """
    if not names:
        return set()
    config = LoraConfig(r=1, target_modules=list(names), layers_to_transform=list(layers))
    stand_in = _stand_in(model, names, layers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, stand_in, STAND_IN)
            # It renames tensors of some architectures as they were renamed between versions of transformers.
            saved = get_peft_model_state_dict(stand_in, adapter_name=STAND_IN, save_embedding_layers=False)
            loaded = set_peft_model_state_dict(stand_in, saved, STAND_IN)
    except (ValueError, AttributeError):
        return set()
    lost = {name.partition(".lora_")[0] for name in loaded.missing_keys if ".lora_" in name}
    return {f"!{path}" if path in lost else path for path in adapted_paths(stand_in, STAND_IN)}


class _Anything(nn.Linear):
    """What PEFT can attach to, made without drawing weights."""

    def reset_parameters(self) -> None:
        pass


def _stand_in(model: PreTrainedModel, names: Sequence[str], layers: Sequence[int]) -> nn.Module:
    """The modules at the same paths; those that a name could mean could carry an adapter, whatever they are."""
    leaves, made = {name.rpartition(".")[2] for name in names}, dict[str, nn.Module]()
    modules = {path: module for module, path in module_paths(model).items()}

    def make(path: str) -> nn.Module:
        if path not in made:
            parent, _, name = path.rpartition(".")
            made[path] = _Anything(1, 1, bias=False, device="meta") if name in leaves else _shell(modules[path])
            if path:
                make(parent).add_module(name, made[path])
        return made[path]

    for path in modules:
        # As PEFT finds the layer: the first number in the path.
        number = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        if number is None or int(number[1]) in layers:
            make(path)
    return made[""]


def _shell(module: nn.Module) -> nn.Module:
    """An empty module; of a transformers model one of its class, by which PEFT tells architectures."""
    if not isinstance(module, PreTrainedModel):
        return nn.Module()
    shell: PreTrainedModel = type(module).__new__(type(module))
    nn.Module.__init__(shell)
    shell.config = module.config
    return shell
