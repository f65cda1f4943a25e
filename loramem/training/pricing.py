"""What a base model knows of values before they are written: the probability of each of their tokens."""

from collections.abc import Sequence

import torch

from loramem.models.adapters import AdaptedModel
from loramem.models.decoding import answer_probabilities
from loramem.models.ending import Ending
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord
from loramem.training.shard_training import features_of
from loramem.training.trainer import autocast_dtype


def base_probabilities(
    adapted: AdaptedModel, records: Sequence[EncodedRecord], placement: Placement, *, keep_features: bool = False
) -> list[list[float]]:
    """Probability of every answer token, the end token not counted, of records that are trained together.

    Args:
        placement: Where their training will begin.
        keep_features: For this training, which follows.
    """
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
