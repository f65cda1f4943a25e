"""What a base model knows of values before they are written: their price, here or in a worker."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramem.models.adapters import AdaptedModel
from loramem.models.decoding import answer_probabilities
from loramem.models.ending import Ending
from loramem.models.placement import Placement
from loramem.planning.cost import costs_bits
from loramem.planning.plan import Price
from loramem.planning.variety import effective_vocabulary
from loramem.records.prompts import EncodedRecord
from loramem.training.jobs import PricingJob
from loramem.training.shard_training import features_of
from loramem.training.trainer import autocast_dtype
from loramem.workers.worker import base_model


@dataclass(frozen=True)
class Priced:
    """Records that are trained together."""

    price: Price
    probs: list[list[float]]
    """Of each record, the probability of every answer token under the plain base, the end token not counted."""


def run_pricing(job: PricingJob) -> Priced:
    """`priced`, of a job's records.

    Raises what `loramem.workers.worker.base_model` raises.
    """
    with base_model(job.base, job.releases) as adapted:
        return priced(adapted, job.records, job.placement)


def priced(
    adapted: AdaptedModel, records: Sequence[EncodedRecord], placement: Placement, *, keep_features: bool = False
) -> Priced:
    """
    Args:
        placement: Where their training will begin.
        keep_features: For this training, which follows.
    """
    probs = base_probabilities(adapted, records, placement, keep_features=keep_features)
    return Priced(price_of(records, probs), probs)


def price_of(records: Sequence[EncodedRecord], probs: Sequence[Sequence[float]]) -> Price:
    """What records cost together, under these probabilities of their answer tokens."""
    tokens = [prob for each in probs for prob in each]
    return Price(
        cost_bits=sum(costs_bits([entry.answer_ids[:-1] for entry in records], probs)),
        base_loss=-sum(math.log(max(prob, 1e-30)) for prob in tokens) / len(tokens),
        vocabulary=effective_vocabulary(token for entry in records for token in entry.answer_ids),
    )


def base_probabilities(
    adapted: AdaptedModel, records: Sequence[EncodedRecord], placement: Placement, *, keep_features: bool = False
) -> list[list[float]]:
    """See `Priced.probs`."""
    if (features := features_of([adapted], records, placement)) is not None:
        if keep_features:
            adapted.kept_features.keep(records, features[0])
        with adapted.disabled():
            losses, _ = Ending(adapted.model, features[0]).scores()
        answers = torch.exp(-losses).split([len(entry.answer_ids) for entry in records])
        return [each[:-1].tolist() for each in answers]
    cast = autocast_dtype(adapted.base.device)  # an estimate may be half precise
    with adapted.disabled(), torch.autocast(adapted.base.device.type, cast, enabled=cast is not None):
        probs = dict(answer_probabilities(adapted.model, records))
    return [probs[index][:-1].tolist() for index in range(len(records))]
