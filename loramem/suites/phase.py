"""Whether p > 0.5 is recalled: the transition itself, in adapters taken at some stage of their training.

Long records have an adapter each, taken at a random one of its training steps, so that most fail somewhere. Books are
many short records in one adapter, looked at whenever more of their tokens are learned. They are trained where writes
begin. Every p is teacher-forced: of features, where these give the model's own logits, otherwise of all layers; all
decoding is free-running, through every layer.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loramem.errors import RecordError, TooLong
from loramem.suites.phase_report import Reading, counter_examples, plots, table, tally
from loramem.suites.runner import Known, Result, SuiteOptions, public_name

if TYPE_CHECKING:
    from torch import Tensor

    from loramem.models.adapters import AdaptedModel
    from loramem.models.features import Features
    from loramem.records.prompts import EncodedRecord
    from loramem.training.progress import WriteProgress

__all__ = ["Cell", "cells", "plots", "run", "table"]

OPTIONS = ("records", "lengths", "ranks", "model")
LONG_KINDS, LENGTHS, RANKS = ("text", "mixed", "random"), (50, 100, 200, 300), (1, 2, 4, 8)
RUNS, LONG_STEPS = 6, 120
"""Long records per cell; steps after which they are not trained further, certified or not."""
BOOK, BOOKS, BOOK_STEPS = 200, 3, 200
"""Phone numbers in a book; books per rank; steps as above."""
SHARES = (0.3, 0.6, 0.8, 0.9, 0.97)
"""Of a book's tokens, as training last saw them: whenever so many are at p >= 0.6 the book is looked at."""
NAME = "phase"


@dataclass(frozen=True)
class Cell:
    """A few long records with an adapter each, or one book."""

    part: str
    """"long" or "book"."""
    kind: str
    """Of the values."""
    size: int
    """Answer tokens of a long record; records of a book."""
    rank: int
    repeats: int
    """Long records; 1 of a book."""
    seed: int
    """Of the records, their training and all draws; every long record has the next one."""
    model: str
    device: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        size = f"{self.repeats} × {self.size} tokens" if self.part == "long" else f"{self.size} records"
        return f"{self.part}, {self.kind}, {size}, rank {self.rank}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Long records over kinds, lengths and ranks; books over ranks.

    No two long records have the same seed; those of one kind and length differ in their text as far as there are texts.
    """
    quick, where = request.quick, (request.model, request.device)
    ranks = request.ranks or ((1, 2) if quick else RANKS)
    runs, seed = 2 if quick else RUNS, 0
    for kind in LONG_KINDS[:1] if quick else LONG_KINDS:
        for length in request.lengths or ((30,) if quick else LENGTHS):
            for rank in ranks:
                for _cell in range(request.seeds or 1):
                    yield Cell("long", kind, length, rank, runs, seed, *where)
                    seed += runs
    for records in request.records or ((20,) if quick else (BOOK,)):
        for rank in ranks[-1:] if quick else ranks:
            for seed in range(request.seeds or (1 if quick else BOOKS)):
                yield Cell("book", "phonebook", records, rank, 1, seed, *where)


def run(cell: Cell) -> Result:
    """Train, take the adapter as it was at some stages, and set what it decodes against its p."""
    from loramem.models.adapters import AdaptedModel
    from loramem.models.base_model import load_base_model
    from loramem.suites.timing import clock, conditions

    adapted = AdaptedModel(load_base_model(cell.model, device=cell.device))
    started = clock(adapted.base.device)
    measured = {"long": long_records, "book": book}[cell.part](cell, adapted)
    seconds = round(clock(adapted.base.device) - started, 1)
    return {"seconds": seconds, **measured, "base": conditions(adapted.base)}


def long_records(cell: Cell, adapted: "AdaptedModel") -> Result:
    """Independent runs, each read at a random step of its training and at its end.

    Raises:
        InputError: There is no text of this length.
        TooLong: It does not fit the base model's context.
    """
    from loramem.planning.calibrate import encode_sample

    at_stage: list[Reading] = []
    at_end: list[Reading] = []
    steps: list[Result] = []
    refused: list[Result] = []
    for seed in range(cell.seed, cell.seed + cell.repeats):
        try:
            records = encode_sample(adapted.base, cell.kind, cell.size, seed)
        except TooLong:  # no draw of this length can be written: the question is wrong
            raise
        except RecordError as error:  # the tokenizer cannot express this draw
            refused.append({"seed": seed, "error": type(error).__name__})
            continue
        sample = Sample.of(adapted, records)
        stages = train(adapted, sample, cell.rank, seed, LONG_STEPS, at_random(random.Random(seed)))
        at_end += read(adapted, sample)
        stage = stages[-2:][0]  # the end, where training had nothing to do
        take(adapted, stage)
        at_stage += read(adapted, sample)
        steps.append({"seed": seed, "step": stage.step, "steps": stages[-1].step})
    runs = [
        {
            **step,
            "tokens": len(stage.answer_ids) - 1,
            "stubborn": stage.stubborn,
            "failure": stage.failure,
            "end_stubborn": end.stubborn,
            "end_failure": end.failure,
        }
        for step, stage, end in zip(steps, at_stage, at_end, strict=True)
    ]
    return {
        **_transition(adapted, at_stage + at_end),
        "runs": runs,
        "refused": refused,
    }


def book(cell: Cell, adapted: "AdaptedModel") -> Result:
    """Many records in one adapter, read at several stages of one training."""
    from loramem.planning.samples import generate
    from loramem.records.prompts import encode_records

    base = adapted.base
    generated = generate(cell.kind, cell.size, cell.seed)
    records = encode_records(generated, base.tokenizer, base.template, base.max_tokens, base.unreachable)
    sample = Sample.of(adapted, records)
    stages = train(adapted, sample, cell.rank, cell.seed, BOOK_STEPS, at_shares(SHARES))
    readings: list[Reading] = []
    told: list[Result] = []
    for stage in stages:
        take(adapted, stage)
        found = read(adapted, sample)
        readings += found
        told.append(
            {
                "step": stage.step,
                "exact": sum(reading.failure is None for reading in found),
                "lowest_p": round(min(min(reading.probs) for reading in found), 4),
                "pairs": [[one.stubborn, one.failure] for one in found if one.failure is not None],
            }
        )
    return {**_transition(adapted, readings), "stages": told}


@dataclass(frozen=True)
class Sample:
    """Records, with their features where a write would train on these."""

    records: Sequence["EncodedRecord"]
    features: "Features | None"

    @classmethod
    def of(cls, adapted: "AdaptedModel", records: Sequence["EncodedRecord"]) -> "Sample":
        from loramem.training.shard_training import features_of

        found = features_of([adapted], records, adapted.ladder[0])
        return cls(records, None if found is None else found[0].to(adapted.model.dtype))


@dataclass(frozen=True)
class Stage:
    """The adapter's weights after some step of its training."""

    step: int
    weights: dict[str, "Tensor"]


def train(
    adapted: "AdaptedModel",
    sample: Sample,
    rank: int,
    seed: int,
    steps: int,
    wanted: Callable[["WriteProgress"], bool],
) -> list[Stage]:
    """Train as a write does, at one rank, for at most so many steps.

    Args:
        wanted: Asked after every step whether to keep its weights.

    Returns:
        What was kept, in order, and last the end of training, which the adapter is left at.
    """
    from loramem.training.feature_writer import train_on_features
    from loramem.training.settings import WriterSettings
    from loramem.training.trainer import NetworkSchedule, train_adapter

    stages: list[Stage] = []
    step = 0

    def keep() -> None:
        weights = {name: tensor.detach().clone() for name, tensor in adapted.weights(NAME).items()}
        stages.append(Stage(step, weights))

    def watch(told: "WriteProgress") -> None:
        nonlocal step
        step = told.step
        if wanted(told):
            keep()
        if step >= steps:
            raise _LongEnough

    settings, records, place = WriterSettings(seed=seed, max_rank=rank), sample.records, adapted.ladder[0]
    with suppress(_LongEnough):
        if sample.features is not None:
            train_on_features(adapted, NAME, [sample.features], len(records), rank, place, settings, watch)
        else:  # another start would have other weights
            schedule = NetworkSchedule(restarts=0)
            train_adapter(adapted, NAME, records, rank, adapted.ladder[-1], settings, watch, schedule=schedule)
    keep()
    return stages


class _LongEnough(Exception):
    pass


def at_random(draw: random.Random) -> Callable[["WriteProgress"], bool]:
    """Says yes so that the last step it said yes to is any of the steps, each with the same chance."""
    return lambda told: draw.random() * told.step < 1


def at_shares(shares: Sequence[float]) -> Callable[["WriteProgress"], bool]:
    """Says yes whenever the share of tokens with p >= 0.6 has first reached one of these."""
    ahead = sorted(shares)

    def wanted(told: "WriteProgress") -> bool:
        reached = [share for share in ahead if told.tokens_ordered >= share * told.tokens_total]
        del ahead[: len(reached)]
        return bool(reached)

    return wanted


def take(adapted: "AdaptedModel", stage: Stage) -> None:
    """Give the active adapter the weights of a stage."""
    from loramem.models.adapters import load_weights

    load_weights(adapted.weights(NAME), stage.weights)


def read(adapted: "AdaptedModel", sample: Sample) -> list[Reading]:
    """Every record under teacher forcing and as it is decoded, from the adapter as it is."""
    from loramem.models.batches import group_by_length
    from loramem.models.decoding import DECODE_RECORDS, DECODE_TOKENS, decode_records

    records, probs = sample.records, _teacher_forced(adapted, sample)
    batches = group_by_length(records, range(len(records)), DECODE_RECORDS, DECODE_TOKENS)
    decoded = dict(decode_records(adapted.model, records, batches))
    return [
        Reading(
            record.record.key,
            record.answer_ids,
            tuple(probs[index].tolist()),
            (*decoded[index], record.answer_ids[-1])[: len(record.answer_ids)],
        )
        for index, record in enumerate(records)
    ]


def _teacher_forced(adapted: "AdaptedModel", sample: Sample) -> "Mapping[int, Tensor]":
    """Probabilities of every record's answer tokens and end token, by its index."""
    from loramem.models.decoding import answer_probabilities
    from loramem.models.ending import Ending

    if sample.features is None:
        return dict(answer_probabilities(adapted.model, sample.records))
    losses, _ = Ending(adapted.model, sample.features, adapted.lora_layers(NAME)).scores()
    return dict(enumerate((-losses).exp().split([len(record.answer_ids) for record in sample.records])))


def _transition(adapted: "AdaptedModel", readings: Sequence[Reading]) -> Result:
    found = list(counter_examples(readings))
    for one in found:
        for name in ("expected", "decoded"):
            one[name] = adapted.base.tokenizer.convert_ids_to_tokens(one[f"{name}_id"])
    return {"tally": tally(readings), "counter_examples": found}
