"""A training that certifies all but some records, whatever they are."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

from loramem.models.adapters import AdaptedModel
from loramem.records.prompts import EncodedRecord
from loramem.training.shard_training import ShardTraining, train_shard


def stubborn(*keys: str, times: int | None = None) -> Callable[..., ShardTraining]:
    """`train_shard` that calls the records of these keys stubborn, always or the first few times that it meets any."""
    left = repeat(True) if times is None else chain(repeat(True, times), repeat(False))

    def train(
        adapted: AdaptedModel, name: str, records: Sequence[EncodedRecord], *more: Any, **named: Any
    ) -> ShardTraining:
        trained = train_shard(adapted, name, records, *more, **named)
        found = tuple(number for number, record in enumerate(records) if record.record.key in keys)
        if found and next(left):
            return replace(trained, training=replace(trained.training, stubborn=found))
        return trained

    return train
