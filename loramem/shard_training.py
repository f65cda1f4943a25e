"""Which placement and which engine a shard is trained with.

Behind the last attention a write is an optimisation over features, many times cheaper than any that runs layers; what
that cannot hold is trained again one rung up the ladder of placements, at last through the tail of the network.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loramem.adapters import AdaptedModel
from loramem.batches import answer_logits, make_batch
from loramem.errors import UnsupportedBaseModel
from loramem.feature_writer import train_on_features
from loramem.features import Ending, Features, collect
from loramem.out_of_memory import is_out_of_memory
from loramem.placement import Placement
from loramem.prompts import EncodedRecord
from loramem.settings import WriterSettings
from loramem.trunk import SPLIT_TOLERANCE
from loramem.writer import ProgressCallback, Training, train_adapter

log = logging.getLogger(__name__)

CLIMB_RANK, CLIMB_GROWTH = 32, 2.25
"""A shard grows at one placement up to this rank, or to this many times the one it began with, before it climbs."""
FEW = 0.1
"""Share of the records that may be stubborn before the whole shard climbs: they get an adapter of their own."""
NOT_UNDERSTOOD = (
    *(UnsupportedBaseModel, RuntimeError, TypeError, ValueError),
    *(AttributeError, KeyError, IndexError),
)
"""What the code of an architecture raises where its end alone is run and it has no such end."""


@dataclass(frozen=True)
class ShardTraining:
    """How a shard was trained."""

    training: Training
    placement: Placement
    climbed: bool = False
    """Whether the placement that it began with left too many records stubborn."""
    on_features: bool = True
    """Whether it knows what its dtypes do; the engine that runs layers trains in one."""


def train_shard(
    adapted: AdaptedModel,
    name: str,
    records: Sequence[EncodedRecord],
    rank: int,
    placement: Placement,
    settings: WriterSettings,
    progress: ProgressCallback | None = None,
    served: Sequence[AdaptedModel] = (),
    caution: float = 1.0,
) -> ShardTraining:
    """Train a new adapter ``name`` until every token of every record is certified, or no placement holds them.

    The adapter is left attached and active as training left it, certified or not.

    Args:
        placement: Where to begin.
        served: The base model in other dtypes that the adapter will be served in; their features are trained on too.
        caution: Factor on how much features deviate in training from one dtype to another.

    Raises:
        TrainingDiverged: NaN or Inf, again after several restarts at lower learning rates.
    """
    ladder = Placement.ladder(adapted.model)
    behind = ladder[:-1]
    features = features_of([adapted, *served], records) if placement in behind else None
    if features is None:  # where layers are run anyway, the placement that holds most costs no more
        placement = ladder[-1] if placement in behind else placement
        training = train_adapter(adapted, name, records, rank, placement, settings, progress)
        return ShardTraining(training, placement, on_features=False)
    dtypes = [each.adapter_dtype or torch.float32 for each in (adapted, *served)]
    steps, visits, elapsed_s = 0, 0, 0.0  # of what was tried in vain
    for rung in behind[behind.index(placement) :]:
        within = replace(settings, max_rank=min(settings.max_rank, max(CLIMB_RANK, math.ceil(CLIMB_GROWTH * rank))))
        try:
            training = train_on_features(
                adapted,
                name,
                features,
                len(records),
                rank,
                rung,
                within,
                progress,
                adapter_dtypes=dtypes,
                caution=caution,
            )
        except NOT_UNDERSTOOD as error:
            if is_out_of_memory(error):
                raise
            log.warning(
                "%s behind its last attention: %s; layers are run in training", type(adapted.model).__name__, error
            )
            adapted.remove(name)
            break
        done = _with(training, steps, visits, elapsed_s)
        if len(training.stubborn) <= FEW * len(records):
            return ShardTraining(done, rung, climbed=rung != placement)
        log.info("%d of %d records are stubborn at %s", len(training.stubborn), len(records), ", ".join(rung.modules))
        steps, visits, elapsed_s = done.steps, done.visits, done.elapsed_s
        adapted.remove(name)
    training = train_adapter(adapted, name, records, rank, ladder[-1], settings, progress)
    done = _with(training, steps, visits, elapsed_s)
    return ShardTraining(done, ladder[-1], climbed=True, on_features=False)


def _with(training: Training, steps: int, visits: int, elapsed_s: float) -> Training:
    """A training with what went before it."""
    return replace(
        training,
        steps=training.steps + steps,
        visits=training.visits + visits,
        elapsed_s=training.elapsed_s + elapsed_s,
    )


@torch.no_grad()
def features_of(models: Sequence[AdaptedModel], records: Sequence[EncodedRecord]) -> list[Features] | None:
    """Features from every model, or None where they do not give the model's own logits, or the model has no such end.

    Exhausted memory is raised as it is.
    """
    found = list[Features]()
    for each in models:
        with each.disabled():
            try:
                features = collect(each.model, records)
                if not found and not _gives_the_models_logits(each, features, records):
                    return None
            except NOT_UNDERSTOOD as error:
                if is_out_of_memory(error):
                    raise
                name = type(each.model).__name__
                log.warning("%s is not run from its last attention on (%s); layers are run in training", name, error)
                return None
            found.append(features.to(models[0].model.dtype))
    return found


def _gives_the_models_logits(adapted: AdaptedModel, features: Features, records: Sequence[EncodedRecord]) -> bool:
    """Whether the end of the model alone gives what all of it gives, tried on the shortest and the longest record."""
    model, by_length = adapted.model, sorted(range(len(records)), key=lambda index: records[index].total_tokens)
    for index in {by_length[0], by_length[-1]}:
        full = answer_logits(model, make_batch([records[index]], model.device))
        rows = (features.owners == index).nonzero().flatten()
        mine = Ending(model, features).logits(slice(int(rows[0]), int(rows[-1]) + 1))
        difference = float((full - mine).abs().max() / full.abs().max())
        if not difference <= SPLIT_TOLERANCE[model.dtype]:  # NaN is not equal
            log.warning(
                "%s behind its last attention differs by %.1e of the logits' scale; its layers are run in training",
                type(model).__name__,
                difference,
            )
            return False
    return True
