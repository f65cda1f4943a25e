"""What a pulled adapter must be before a store takes it. Nothing here is loaded into a model or unpickled.

An adapter from elsewhere is untrusted: its config may hold the fields that loramem writes and no others, its tensors
are the ones that the config implies.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from loramem.hub.publication import Publication, PublishedAdapter
from loramem.models.adapter_header import CONFIG, SAVED, WEIGHTS
from loramem.models.adapters import adapter_id_of, portable_config
from loramem.models.module_names import is_named
from loramem.models.placement import Placement

Shapes = Mapping[str, tuple[int, int]]


def inspect_adapter(
    folder: Path, adapter: PublishedAdapter, publication: Publication, shapes: Shapes | None = None
) -> None:
    """Check the files of an adapter against what was published of it.

    Args:
        folder: Of this adapter.
        shapes: The tensors as the base model implies them; None where it is not at hand, which leaves to check that
            they come in pairs of the right rank, in every layer and for every module of the placement.

    Raises:
        ValueError: What is wrong, in words, naming the file.
    """
    for name, file in adapter.files.items():
        path = folder / name
        if path.stat().st_size != file.size_bytes:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes, not the {file.size_bytes:,} published")
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                raise ValueError(f"{name} has another sha256 than the one published")
    placement = placement_of(adapter, publication)
    base = publication.base_model
    _check_config(folder / CONFIG, portable_config(adapter.rank, placement, base.id, base.revision))
    _check_tensors(folder / WEIGHTS, adapter, placement, shapes)
    if publication.key_salt is None:  # otherwise what is hashed is the namespace that is not told
        expected = adapter_id_of(adapter.files[WEIGHTS].sha256, adapter.files[CONFIG].sha256, adapter.namespace)
        if adapter.id != expected:
            raise ValueError(f"its content has the id {expected}")


def _check_config(path: Path, expected: Mapping[str, object]) -> None:
    try:
        found = json.loads(path.read_bytes())
        names = set(found)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{CONFIG} is not a JSON object") from None
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} is not a JSON object")
    if strange := sorted(names - set(expected)):
        raise ValueError(f"{CONFIG} has {strange[0]!r}, which loramem never writes")
    for name, value in expected.items():
        if name not in found or type(found[name]) is not type(value) or found[name] != value:
            raise ValueError(f"{CONFIG} has {name} = {found.get(name)!r}, where {value!r} was published")


def placement_of(adapter: PublishedAdapter, publication: Publication) -> Placement:
    """Where an adapter sits."""
    published = adapter.placement or publication.placement
    return Placement(tuple(published.modules), tuple(published.layers))


def _check_tensors(path: Path, adapter: PublishedAdapter, placement: Placement, shapes: Shapes | None) -> None:
    try:
        with safe_open(path, framework="np") as file:
            described = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            found = {name: tuple(tensor.get_shape()) for name, tensor in described.items()}
            if other := [name for name, tensor in described.items() if tensor.get_dtype() != "F32"]:
                raise ValueError(f"{WEIGHTS}: {other[0]!r} is {described[other[0]].get_dtype()}, not F32")
            _check_shapes(found, adapter, placement, shapes)
            for name in found:
                if not np.isfinite(file.get_tensor(name)).all():
                    raise ValueError(f"{WEIGHTS}: {name} holds NaN or Inf")
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is not a safetensors file ({error})") from None


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], adapter: PublishedAdapter, placement: Placement, shapes: Shapes | None
) -> None:
    pairs = dict[str, set[str]]()
    for name, shape in found.items():
        if (
            (place := _place(name)) is None
            or place[0] not in placement.layers
            or not is_named(place[1], placement.modules)
        ):
            raise ValueError(f"{WEIGHTS} has a tensor {name!r} that its config does not imply")
        pairs.setdefault(place[1], set()).add(place[2])
        if len(shape) != 2 or shape[0 if place[2] == "A" else 1] != adapter.rank:
            raise ValueError(f"{WEIGHTS}: {name} has shape {shape}, which is not of rank {adapter.rank}")
    # Layers may differ in what they hold, so that without the base each name and each layer need occur only once.
    if alone := sorted(path for path, sides in pairs.items() if len(sides) == 1):
        raise ValueError(f"{WEIGHTS} has no lora_{min({'A', 'B'} - pairs[alone[0]])} of {alone[0]}")
    if absent := sorted(module for module in placement.modules if not any(is_named(path, [module]) for path in pairs)):
        raise ValueError(f"{WEIGHTS} has no matrices of {absent[0]}")
    if bare := sorted(set(placement.layers) - {place[0] for name in found if (place := _place(name))}):
        raise ValueError(f"{WEIGHTS} has no matrices in layer {bare[0]}")
    if (parameters := sum(map(math.prod, found.values()))) != adapter.parameters:
        raise ValueError(f"{WEIGHTS} has {parameters:,} parameters, not the {adapter.parameters:,} published")
    if shapes is not None and found != dict(shapes):
        name = min(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise ValueError(f"{WEIGHTS}: {name} has shape {found.get(name)}, the base model implies {shapes.get(name)}")


def _place(name: str) -> tuple[int, str, str] | None:
    """Layer, path and side of a tensor: the first number in its path, the path, A or B."""
    if (match := SAVED.fullmatch(name)) is None:
        return None
    path = match["module"]
    number = next((part for part in path.split(".") if part.isdecimal()), "")
    return (int(number), path, match["matrix"]) if 0 < len(number) < 10 else None
