"""The published methods and this package's writer as one: train an adapter on records, and attach it to be asked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramem.suites.runner import UNITS, SuiteOptions

if TYPE_CHECKING:
    from loramem.models.base_model import BaseModel
    from loramem.records.prompts import EncodedRecord
    from loramem.suites.paper_schedule import Schedule

OWN = "loramem"
"""The method that is not published: no unit of its own, no schedule, no fixed number of steps."""


@dataclass(frozen=True)
class Taken:
    """What an adapter took."""

    placement: str
    """Where its matrices are, in words."""
    rank: int
    parameters: int
    steps: int
    visits: int
    """Times a record was in a training batch, over all records."""
    seconds: float
    certified: int | None
    """Records that the writer certified; None for a published method, which does not look."""
    curve: tuple[tuple[int, float], ...]
    """(step, share of all answer and end tokens that are ordered) at some steps: p > 0.5 when a published method last
    saw them, p ≥ 0.6 for the writer."""

    @property
    def where(self) -> str:
        """The placement; for the writer, whose rank is its own, that too."""
        return self.placement if self.certified is None else f"{self.placement}, rank {self.rank}"


def unit_of(request: SuiteOptions, method: str) -> tuple[str, int | None]:
    """Unit and layer of a method's cell: the branch unless another is asked for; the writer has its own layers."""
    return request.unit or UNITS[0], None if method == OWN else request.layer


def labels(cells: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str]:
    """Names of the methods of cells, with unit and layer where these are not the same for all.

    The writer has no unit, but as many parameters as that one.
    """
    published = {(cell["unit"], cell["layer"]) for cell in cells if cell["method"] != OWN}
    several = len(published) > 1 or len({cell["unit"] for cell in cells}) > 1

    def label(cell: Mapping[str, Any]) -> str:
        if not several:
            return str(cell["method"])
        where = cell["unit"] if cell["layer"] is None else f"{cell['unit']}, layer {cell['layer']}"
        return f"{cell['method']} ({where})"

    return label


@contextmanager
def trained_adapter(
    base: "BaseModel",
    records: "Sequence[EncodedRecord]",
    method: str,
    rank: int,
    schedule: "Schedule",
    *,
    seed: int,
    unit: str,
    layer: int | None,
    cut: int = 1,
) -> Iterator[Taken]:
    """Train an adapter; within this context the base computes with it. For the writer the base is spent afterwards.

    Args:
        rank: Of the published unit. The writer's adapter has as many parameters within 10 % (`equal_placement`), and
            its rank stays: what it cannot certify is asked for as it is.
        schedule: Of the published methods.
        unit: One of `UNITS`.
        layer: Of the unit; None at the paper's depth.
        cut: The writer's patience is divided by it where it trains through the network, as a shortened schedule's
            epochs are.
    """
    from loramem.models.adapters import AdaptedModel
    from loramem.models.layers import decoder_layers, linear_modules
    from loramem.suites.paper_unit import PaperUnit
    from loramem.suites.placements import describe, equal_placement
    from loramem.suites.published import moments, train_published
    from loramem.training.feature_writer import train_on_features
    from loramem.training.progress import WriteProgress
    from loramem.training.settings import WriterSettings
    from loramem.training.shard_training import features_of, with_other_batches
    from loramem.training.trainer import NetworkSchedule, train_adapter

    if method != OWN:
        trained = train_published(base, records, method, rank, schedule, seed=seed, unit=unit, layer=layer)
        with trained.attached():
            yield Taken(
                placement=f"{unit} of layer {trained.unit.layer}",
                rank=rank,
                parameters=trained.parameters,
                steps=trained.steps,
                visits=trained.visits,
                seconds=trained.seconds,
                certified=None,
                curve=trained.curve,
            )
        return
    curve: list[tuple[int, float]] = []

    def watch(told: WriteProgress) -> None:
        curve.append((told.step, round(told.tokens_ordered / told.tokens_total, 4)))

    allowed = PaperUnit(base.model, rank, seed, unit, layer).parameter_count
    placement, own_rank = equal_placement(base.model, allowed)
    adapted, settings = AdaptedModel(base), WriterSettings(max_rank=own_rank, seed=seed)
    features = with_other_batches([adapted], records, features_of([adapted], records, placement))
    if features is not None:
        alike = [each.to(base.model.dtype) for each in features]
        training = train_on_features(adapted, "suite", alike, len(records), own_rank, placement, settings, watch)
    else:
        patient = NetworkSchedule(patience_passes=max(1, NetworkSchedule.patience_passes // cut))
        training = train_adapter(adapted, "suite", records, own_rank, placement, settings, watch, schedule=patient)
    yield Taken(
        placement=describe(placement, linear_modules(decoder_layers(base.model)[-1])),
        rank=training.rank,
        parameters=training.parameters,
        steps=training.steps,
        visits=training.visits,
        seconds=training.elapsed_s,
        certified=len(records) - len(training.stubborn),
        curve=tuple(curve[step - 1] for step in moments(len(curve))),
    )
