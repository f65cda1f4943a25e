"""Where our own adapter goes when it may spend as many parameters as a published unit, within a tenth.

Placement is part of a method, so ours is free. It is chosen by parameters alone, from a short list in a fixed order.
"""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from loramem.errors import UnsupportedBaseModel
from loramem.models.layers import decoder_layers, linear_modules
from loramem.models.placement import Placement
from loramem.suites.paper_unit import paper_layer

TOLERANCE = 0.1


def equal_placement(model: PreTrainedModel, parameters: int) -> tuple[Placement, int]:
    """The first placement of `candidates` with a rank that costs as many parameters within 10 %, and the nearest one.

    Raises:
        UnsupportedBaseModel: None has.
    """
    places = candidates(model)
    found = first_within([place.parameters_per_rank(model) for place in places], parameters)
    if found is None:
        raise UnsupportedBaseModel(
            f"No placement of {type(model).__name__} has a rank that costs {parameters:,} parameters within 10 %. Use "
            "higher ranks."
        )
    return places[found[0]], found[1]


def first_within(per_rank: Sequence[int], parameters: int, tolerance: float = TOLERANCE) -> tuple[int, int] | None:
    """Index of the first cost of one rank that has a multiple within ``tolerance`` of ``parameters``, and that rank.

    >>> first_within([9344, 1920, 512], 4096)
    (1, 2)
    """
    for place, cost in enumerate(per_rank):
        rank = max(1, round(parameters / cost))
        if abs(rank * cost - parameters) <= tolerance * parameters:
            return place, rank
    return None


def candidates(model: PreTrainedModel) -> list[Placement]:
    """Placements, those where writes begin and climb to first, those of single modules at the paper's depth last."""
    return list(dict.fromkeys(_candidates(model)))


def _candidates(model: PreTrainedModel) -> Iterator[Placement]:
    layers = decoder_layers(model)
    last, deep, modules = len(layers) - 1, paper_layer(len(layers)), linear_modules(layers[-1])
    yield from Placement.ladder(model)
    yield Placement(modules, (last,))
    if "down_proj" in modules:
        yield Placement(("down_proj",), tuple(range(max(0, last - 1), last + 1)))
    first = [name for name in ("o_proj", "down_proj") if name in modules]
    for name in [*first, *(name for name in modules if name not in first)]:
        yield Placement((name,), (deep,))


def describe(placement: Placement, all_modules: Sequence[str]) -> str:
    """In a few words, such as "o_proj of layer 4"."""
    modules = "all linear modules" if set(placement.modules) == set(all_modules) else ", ".join(placement.modules)
    layers = ", ".join(map(str, placement.layers))
    return f"{modules} of layer{'s' * (len(placement.layers) > 1)} {layers}"
