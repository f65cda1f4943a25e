"""Which placement and which engine a shard is trained with.

Behind the last attention a write is an optimisation over features, many times cheaper than any that runs layers; what
that cannot hold is trained again one rung up the ladder of placements, at last through the tail of the network.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramem._util.out_of_memory import is_out_of_memory
from loramem.errors import UnsupportedBaseModel
from loramem.models.adapters import AdaptedModel
from loramem.models.batches import Batches, answer_logits, make_batch, shuffled
from loramem.models.ending import Ending
from loramem.models.features import PASS_TOKENS, Features, collect, collect_decoding
from loramem.models.layers import linear_paths
from loramem.models.neurons import LastMlp
from loramem.models.placement import Placement
from loramem.models.rounded_inputs import disturbed, in_eight_bits
from loramem.models.trunk import SPLIT_TOLERANCE
from loramem.records.prompts import EncodedRecord
from loramem.training.feature_writer import train_on_features
from loramem.training.keeping import train_keeping
from loramem.training.neutral import Neutral
from loramem.training.progress import ProgressCallback, Training
from loramem.training.settings import WriterSettings
from loramem.training.trainer import train_adapter

log = logging.getLogger(__name__)

CLIMB_RANK, CLIMB_GROWTH = 32, 2.25
"""A shard grows at one placement up to this rank, or to this many times the one it began with, before it climbs."""
FEW = 0.1
"""Share of the records that may be stubborn before the whole shard climbs: they get an adapter of their own."""
OTHER_BATCH_RECORDS = 7
OUTCOMES = 3
"""Of rounding to eight bits, that training sees."""
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
    *,
    features: Sequence[Features] | None = None,
    adapter_dtypes: Sequence[torch.dtype] = (),
    caution: float = 1.0,
    outcomes: Sequence[Features] = (),
    one_adapter: bool = False,
    neutral: Neutral | None = None,
    begin_at: Mapping[str, Tensor] | None = None,
) -> ShardTraining:
    """Train a new adapter ``name`` until every token of every record is certified, or no placement holds them.

    The adapter is left attached and active as training left it, certified or not.

    Args:
        placement: Where to begin.
        features: From `features_of`, of the records in every dtype that is to be served; None runs layers.
        adapter_dtypes: See `train_on_features`.
        caution: Factor on how much features deviate in training from one dtype to another.
        outcomes: See `train_on_features`.
        one_adapter: A shard climbs as long as any record is stubborn, as none may get an adapter of its own.
        neutral: To train with where the base is to be kept; only one placement can, and no shard climbs.
        begin_at: Weights of an adapter of this rank and placement, to go on with behind the last attention.

    Raises:
        UnsupportedBaseModel: The base is to be kept, and cannot be.
        TrainingDiverged: NaN or Inf, again after several restarts at lower learning rates.
    """
    ladder = adapted.ladder
    if neutral is not None:
        return _keeping(adapted, name, records, rank, settings, progress, features, adapter_dtypes, caution, neutral)
    behind = ladder[:-1]
    if features is None:  # where layers are run anyway, the placement that holds most costs no more
        placement = ladder[-1] if placement in behind else placement
        training = train_adapter(adapted, name, records, rank, placement, settings, progress)
        return ShardTraining(training, placement, on_features=False)
    alike, rounded = ([each.to(adapted.model.dtype) for each in some] for some in (features, outcomes))
    spent = list[Training]()  # in vain
    for rung in behind[behind.index(placement) :]:
        within = replace(settings, max_rank=min(settings.max_rank, max(CLIMB_RANK, math.ceil(CLIMB_GROWTH * rank))))
        try:
            training = train_on_features(
                adapted,
                name,
                alike,
                len(records),
                rank,
                rung,
                within,
                progress,
                adapter_dtypes=adapter_dtypes,
                caution=caution,
                outcomes=rounded,
                begin_at=begin_at if rung == placement else None,
            )
        except NOT_UNDERSTOOD as error:
            if is_out_of_memory(error):
                raise
            log.warning(
                "%s behind its last attention: %s; layers are run in training", type(adapted.model).__name__, error
            )
            adapted.remove(name)
            break
        if len(training.stubborn) <= (0 if one_adapter else FEW * len(records)):
            return ShardTraining(training.after(spent), rung, climbed=rung != placement)
        log.info("%d of %d records are stubborn at %s", len(training.stubborn), len(records), ", ".join(rung.modules))
        spent.append(training)
        adapted.remove(name)
    training = train_adapter(adapted, name, records, rank, ladder[-1], settings, progress)
    return ShardTraining(training.after(spent), ladder[-1], climbed=True, on_features=False)


def _keeping(
    adapted: AdaptedModel,
    name: str,
    records: Sequence[EncodedRecord],
    rank: int,
    settings: WriterSettings,
    progress: ProgressCallback | None,
    features: Sequence[Features] | None,
    adapter_dtypes: Sequence[torch.dtype],
    caution: float,
    neutral: Neutral,
) -> ShardTraining:
    """`train_shard` where the base is to be kept."""
    if features is None:
        raise UnsupportedBaseModel(
            f"{type(adapted.model).__name__} is not run from its last attention on, and only there can an adapter "
            "spare the base. Write without keep_base, and route by key."
        )
    with adapted.disabled():  # one that an earlier proof left attached is no part of the base
        mlp = LastMlp.of(adapted.model)
    paths = [module for _, module in linear_paths(mlp.block)]
    placement = next((rung for rung in adapted.ladder if {*rung.paths(adapted.model).values()} == set(paths)), None)
    if placement is None:
        raise UnsupportedBaseModel(
            f"PEFT cannot attach to all of the last MLP of {type(adapted.model).__name__} and nothing else, and only "
            "so can an adapter spare the base. Write without keep_base, and route by key."
        )
    alike = [each.to(adapted.model.dtype) for each in features]
    training = train_keeping(
        adapted,
        name,
        alike,
        len(records),
        rank,
        placement,
        settings,
        neutral,
        progress,
        adapter_dtypes=adapter_dtypes,
        caution=caution,
    )
    return ShardTraining(training, placement)


@torch.no_grad()
def features_of(
    models: Sequence[AdaptedModel], records: Sequence[EncodedRecord], placement: Placement
) -> list[Features] | None:
    """Features from every model, each in its own dtype.

    None where the placement is not behind the last attention, or the features do not give the model's own logits, or
    the model has no such end. Exhausted memory is raised as it is.
    """
    if placement not in models[0].ladder[:-1]:
        return None
    found = list[Features]()
    for each in models:
        if (kept := each.kept_features.pop(records)) is not None:
            found.append(kept)
            continue
        with each.disabled():
            try:
                if each.ends_alone is None:
                    each.ends_alone = _gives_the_models_logits(each.model, records)
                if not each.ends_alone:
                    return None
                found.append(collect(each.model, records))
            except NOT_UNDERSTOOD as error:
                if is_out_of_memory(error):
                    raise
                name = type(each.model).__name__
                log.warning("%s is not run from its last attention on (%s); layers are run in training", name, error)
                return None
    return found


def with_other_batches(
    models: Sequence[AdaptedModel], records: Sequence[EncodedRecord], features: list[Features] | None
) -> list[Features] | None:
    """Of one model in half precision the features of other batches as well: it rounds otherwise in every company of
    records, as models of other dtypes do, and of these there are none to train over."""
    if features is None or len(models) > 1 or models[0].model.dtype == torch.float32:
        return features
    with models[0].disabled():
        return [*features, collect(models[0].model, records, shuffled(records, OTHER_BATCH_RECORDS, PASS_TOKENS))]


def outcomes_of(adapted: AdaptedModel, records: Sequence[EncodedRecord], count: int = OUTCOMES) -> list[Features]:
    """Features of a few outcomes of rounding to eight bits, which a model that is served in "q8_0" does itself."""
    found = list[Features]()
    with adapted.disabled(), nullcontext() if adapted.base.dtype == "q8_0" else in_eight_bits(adapted.model):
        for number in range(count):
            with disturbed(adapted.model, number) if number else nullcontext():
                found.append(collect(adapted.model, records))
    return found


@torch.no_grad()
def as_decoded(
    models: Sequence[AdaptedModel], records: Sequence[EncodedRecord], features: Sequence[Features], batches: Batches
) -> list[Features]:
    """Features that decoding meets in these batches, of every model that rounds to less than float32.

    No adapter behind the last attention changes them: trained over, they are what a proof that decodes so will see.

    Args:
        features: From `features_of`, of the same models and records.
    """
    found = list[Features]()
    for each, known in zip(models, features, strict=False):
        if each.base.dtype != "float32":
            with each.disabled():
                found.append(collect_decoding(each.model, records, known, batches))
    return found


def _gives_the_models_logits(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> bool:
    """Whether the end of the model alone gives what all of it gives, tried on the shortest and the longest record."""
    by_length = sorted(records, key=lambda record: record.total_tokens)
    for record in (by_length[0], by_length[-1]):
        full = answer_logits(model, make_batch([record], model.device))
        mine = Ending(model, collect(model, [record])).logits(slice(None))
        difference = float((full - mine).abs().max() / full.abs().max())
        if not difference <= SPLIT_TOLERANCE[model.dtype]:  # NaN is not equal
            log.warning(
                "%s behind its last attention differs by %.1e of the logits' scale; its layers are run in training",
                type(model).__name__,
                difference,
            )
            return False
    return True
