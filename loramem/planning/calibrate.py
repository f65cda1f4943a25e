"""Calibration: converged runs over a grid of ranks and lengths, which the memory law of a base model is fitted to.

The law is about plain cross-entropy trained until it no longer improves. The writer does that when its objective is
"sft" and it is not allowed to begin again: its rate halves whenever the loss has not fallen by 1 % for a while, and it
ends when that happened several times without effect. Behind the last attention it is a run over features
(`loramem.planning.feature_runs`). With any other objective a run is a write as the store does it,
except that the rank stays and training never begins again: it ends when every token is certified or progress stops,
which is what the success boundary is fitted to. The ranks of one length share one trunk.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from loramem._util.choices import check_choice
from loramem.errors import ArgumentError, InputError
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel
from loramem.models.decoding import answer_probabilities
from loramem.models.features import Features
from loramem.models.placement import Placement
from loramem.models.trunk import Trunk
from loramem.planning.calibration import Calibration
from loramem.planning.cost import costs_bits
from loramem.planning.feature_samples import CONDITIONS, FeatureSample
from loramem.planning.long_text import long_text
from loramem.planning.rank_law import KindSamples, Sample
from loramem.planning.runs import KINDS, LAW_OBJECTIVE, Run, append_run, identity, read_runs
from loramem.planning.samples import generate
from loramem.planning.variety import effective_vocabulary
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import Record
from loramem.training.feature_writer import train_on_features
from loramem.training.settings import OBJECTIVES, ObjectiveName, WriterSettings
from loramem.training.shard_training import features_of
from loramem.training.trainer import BATCH_RECORDS, NetworkSchedule, train_adapter

log = logging.getLogger(__name__)

NOISE = {"text": 0.0, "r20": 0.2, "mixed": 0.4, "r60": 0.6, "r80": 0.8, "random": 1.0}
"""Share of random tokens in one long text; the paper's r0 to r100."""
DIGITS = 10  # of a phone number: its tokens where every digit is one
RANKS = (1, 2, 3, 4, 6)
LAW_BITS, WRITE_BITS = (1.5, 2.0, 2.7, 3.5, 4.6, 6.0), (0.4, 0.8, 1.6, 3.2)
"""Bits per parameter of rank 1 that lengths are chosen for: runs of the law end above 0.69 nats from about 1.1 bits of
cost per parameter upwards; writes begin to fail between a half and one."""
PROBE = 500  # answer tokens by which a kind's cost is known before the lengths are
IDLE_PASSES, IDLE_STEPS = 12, 90
"""Without progress for as many passes and steps a run has converged: by then the rate has been halved six times."""
LEARNING_RATE = 0.2
"""Where one module is adapted: it alone is to change more than many do. 500 tokens at ranks 1 and 4 of one down_proj
end 2 to 10 % lower than at the writer's 0.06, and within 3 % of 0.6. With the writer's default placement it is too
high: 400 phone numbers at rank 1 stay at 2.29 nats per token, and end at 0.19 at 0.06."""


@dataclass(frozen=True)
class CalibrationGrid:
    """What is to be calibrated.

    Raises:
        ArgumentError: No such kind or objective, or no rank or length.
    """

    kind: str
    """One of `KINDS`, or a name for ``data``."""
    placement: Placement
    lengths: tuple[int, ...]
    """Answer tokens."""
    ranks: tuple[int, ...] = RANKS
    seed: int = 0
    learning_rate: float = LEARNING_RATE
    """Of plain cross-entropy; writes take the writer's own."""
    objective: ObjectiveName = LAW_OBJECTIVE
    data: tuple[Record, ...] = ()
    """Records of your own, drawn from without replacement."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if not self.data:
            check_choice("kind", self.kind, KINDS)
        for name, numbers in (("ranks", self.ranks), ("lengths", self.lengths)):
            if min(numbers, default=0) < 1:
                raise ArgumentError(
                    f"{name} must be whole numbers above 0, at least one, not {numbers}", argument=name, value=numbers
                )

    def is_known(self, done: Iterable[Run], rank: int, length: int) -> bool:
        """Whether runs that were made leave one of this rank and length nothing to say: lower ranks were enough, here
        or for more."""
        law = self.objective == LAW_OBJECTIVE
        enough = (run for run in done if (run.saturated if law else run.certified))
        return any(run.rank <= rank and run.length >= length for run in enough)


def calibrate(
    base: BaseModel,
    grid: CalibrationGrid,
    out: Path,
    *,
    budget_s: float = math.inf,
    progress: Callable[[Run, float], None] | None = None,
) -> list[Run]:
    """Make the runs of a grid that ``out`` does not hold yet, and append each as it is done.

    The lengths furthest apart come first, so that a run out of time has spanned the range. Ranks go upwards; once one
    is saturated at some length, higher ones are left out there, and everywhere shorter: they say nothing.

    Args:
        out: JSON lines, created with its folder.
        budget_s: No run is begun that would probably end later than this many seconds from now.
        progress: Told of every run that was made, and how many seconds all others would take at its pace.

    Returns:
        The runs of this grid, old and new.

    Raises:
        TooLong: A text of this length does not fit the base model's context.
        RecordError: The base model's tokenizer cannot express this kind of data.
        InputError: The data are shorter than a length.
    """
    started, slowest = time.monotonic(), 0.0  # seconds per answer token
    known = {run.identity: run for run in read_runs(out)}
    adapted, done = AdaptedModel(base), list[Run]()
    ahead = sum(grid.lengths) * len(set(grid.ranks))  # answer tokens of all runs that are left
    for length in spread(grid.lengths):
        bench = Bench(adapted, grid, length)
        for rank in sorted(set(grid.ranks)):
            ahead -= length
            if grid.is_known(done, rank, bench.length):
                continue
            name = bench.identity(rank)
            if name not in known:
                if time.monotonic() - started + slowest * bench.length > budget_s:
                    log.info("no time left for rank %d at %d tokens", rank, length)
                    return done
                known[name] = run = bench.run(rank)
                slowest = max(slowest, run.elapsed_s / bench.length)
                append_run(out, run)
                if progress is not None:
                    progress(run, slowest * ahead)
            done.append(known[name])
    return done


def price_sample(base: BaseModel, kind: str, length: int, data: Sequence[Record] = ()) -> KindSamples:
    """What about ``length`` answer tokens of a kind are to the base model, by one pass over a sample of them.

    Raises what `calibrate` raises.
    """
    records = encode_sample(base, kind, length, 0, data)
    found = dict(answer_probabilities(base.model, records))
    before = [found[index][:-1] for index in range(len(found))]
    cost = sum(costs_bits([record.answer_ids[:-1] for record in records], [probs.tolist() for probs in before]))
    counted = sum(record.length for record in records)
    loss = float(-torch.cat(before).log().mean())
    return KindSamples(kind, (Sample(counted, loss, cost, effective_vocabulary(_tokens(records))),))


def bare_calibration(base: BaseModel) -> Calibration:
    """The base model as a calibration begins: nothing measured yet."""
    placement, *above = Placement.ladder(base.model)  # where writes begin, and where they climb to
    return Calibration(
        base.id,
        base.fingerprint.weights[:12],
        base.max_tokens,
        placement.modules,
        placement.layers,
        placement.parameters_per_rank(base.model),
        above=tuple(each.size(base.model) for each in above),
    )


def default_rate(placement: Placement) -> float:
    """Of plain cross-entropy: the writer's, or `LEARNING_RATE` where a single module is adapted."""
    alone = len(placement.modules) * len(placement.layers) == 1
    return LEARNING_RATE if alone else NetworkSchedule.learning_rate


def default_lengths(
    base: BaseModel,
    kind: str,
    placement: Placement,
    objective: ObjectiveName = LAW_OBJECTIVE,
    data: Sequence[Record] = (),
) -> tuple[int, ...]:
    """Lengths at which runs with this placement say something: see `LAW_BITS` and `WRITE_BITS`.

    Raises what `calibrate` raises.
    """
    (probe,) = price_sample(base, kind, PROBE, data).samples
    tokens_per_bit = placement.parameters_per_rank(base.model) * probe.length / max(probe.cost_bits, 1.0)
    wanted = [bits * tokens_per_bit for bits in (LAW_BITS if objective == LAW_OBJECTIVE else WRITE_BITS)]
    return tuple(sorted({max(1, round(length, 1 - math.floor(math.log10(length)))) for length in map(round, wanted)}))


def encode_sample(
    base: BaseModel, kind: str, length: int, seed: int, data: Sequence[Record] = ()
) -> list[EncodedRecord]:
    """About ``length`` answer tokens as token ids: of a kind (see `sample`), or of the first of shuffled data.

    Raises what `calibrate` raises.
    """

    def encode(records: Sequence[Record]) -> list[EncodedRecord]:
        return encode_records(
            records, base.tokenizer, base.template, base.max_tokens, base.unreachable, base.vocabulary
        )

    if not data:
        return encode(sample(kind, length, base.tokenizer, seed, base.unreachable))
    shuffled = encode(random.Random(seed).sample(list(data), len(data)))
    ends = list(accumulate(entry.length for entry in shuffled))
    if ends[-1] < length:
        raise InputError(f"The data have {ends[-1]:,} answer tokens, {length:,} are asked for. Give --lengths.")
    return shuffled[: next(count for count, end in enumerate(ends, start=1) if end >= length)]


def sample(
    kind: str, length: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0, excluded: Collection[int] = ()
) -> list[Record]:
    """About ``length`` answer tokens of a kind: phone numbers, or one long text (see `NOISE`)."""
    if kind == "phonebook":
        return generate("phonebook", max(1, round(length / DIGITS)), seed)
    return [Record("the text", long_text(tokenizer, length, NOISE[kind], seed, excluded))]


def spread(numbers: Sequence[int]) -> list[int]:
    """The numbers in an order in which every next one is, in its logarithm, furthest from those before it."""
    left = sorted(set(numbers))
    chosen = [left.pop()]
    while left:
        furthest = max(left, key=lambda number: min(abs(math.log(number / other)) for other in chosen))
        left.remove(furthest)
        chosen.append(furthest)
    return chosen


class Bench:
    """The records of one length on one trunk, and the runs made with them.

    Args:
        length: Answer tokens, about; the attribute says how many there are.

    Raises what `calibrate` raises.
    """

    def __init__(self, adapted: AdaptedModel, grid: CalibrationGrid, length: int) -> None:
        self.adapted, self.grid = adapted, grid
        self.records = encode_sample(adapted.base, grid.kind, length, grid.seed, grid.data)
        self.conditions = _conditions(adapted.base, grid)
        self.length = sum(record.length for record in self.records)
        self.steps_per_pass = math.ceil(len(self.records) / BATCH_RECORDS)

    def identity(self, rank: int) -> str:
        """`Run.identity` of the run that `run` would make."""
        grid, placement = self.grid, self.grid.placement
        return identity(grid.kind, rank, self.length, grid.seed, placement.modules, placement.layers, self.conditions)

    def run(self, rank: int) -> Run:
        """Train an adapter of this rank to convergence (see the module), look at all probabilities, and drop it.

        Raises:
            TrainingDiverged: NaN or Inf; training of the law does not begin again.
        """
        grid, started = self.grid, time.monotonic()
        if grid.objective == LAW_OBJECTIVE and self.features is not None:
            alike = self.features[0].to(self.adapted.model.dtype)
            sample = FeatureSample.of(self.adapted, grid.kind, self.records, alike)
            return sample.run(self.adapted, rank, grid.placement, self.conditions, grid.seed)
        before, _ = self._probabilities()
        settings = WriterSettings(objective=grid.objective, max_rank=rank, seed=grid.seed)
        schedule = NetworkSchedule(restarts=0)
        if grid.objective == LAW_OBJECTIVE:
            patience = max(IDLE_PASSES, math.ceil(IDLE_STEPS / self.steps_per_pass))
            schedule = NetworkSchedule(grid.learning_rate, patience, restarts=0)
        if self.features is None:
            placement, trunk = grid.placement, self.trunk
            training = train_adapter(
                self.adapted, "run", self.records, rank, placement, settings, trunk=trunk, schedule=schedule
            )
        else:  # as a write trains
            training = train_on_features(
                self.adapted, "run", self.features, len(self.records), rank, grid.placement, settings
            )
        after, lowest = self._probabilities()
        self.adapted.remove("run")
        return Run(
            kind=grid.kind,
            rank=rank,
            length=self.length,
            seed=grid.seed,
            modules=grid.placement.modules,
            layers=grid.placement.layers,
            records=len(self.records),
            parameters=training.parameters,
            bits=round(float((-torch.cat(before).log2() - 1).clamp(min=0).sum()), 1),
            cost_bits=round(sum(self._costs(before)), 1),
            base_loss=float(-torch.cat(before).log().mean()),
            final_loss=float(-torch.cat(after).log().mean()),
            ordered=round(float((torch.cat(after) > 0.5).float().mean()), 4),
            certified=lowest >= settings.certify_threshold,
            steps=training.steps,
            visits=training.visits,
            training_s=round(training.elapsed_s, 2),
            elapsed_s=round(time.monotonic() - started, 2),
            conditions=self.conditions,
            vocabulary=effective_vocabulary(_tokens(self.records)),
        )

    @cached_property
    def features(self) -> list[Features] | None:
        """What a write at this placement trains on, if it lies behind the last attention."""
        return features_of([self.adapted], self.records, self.grid.placement)

    @cached_property
    def trunk(self) -> Trunk:
        return Trunk(self.adapted.model, self.records, min(self.grid.placement.layers))

    def _probabilities(self) -> tuple[list[torch.Tensor], float]:
        """Of every record's answer tokens, and the lowest of all these and the end tokens."""
        found = dict(answer_probabilities(self.adapted.model, self.records))
        answers = [found[index][:-1] for index in range(len(found))]
        return answers, min(float(probs.min()) for probs in found.values())

    def _costs(self, before: Sequence[torch.Tensor]) -> list[float]:
        return costs_bits([record.answer_ids[:-1] for record in self.records], [probs.tolist() for probs in before])


def _tokens(records: Iterable[EncodedRecord]) -> Iterator[int]:
    """Answer and end tokens."""
    return (token for record in records for token in record.answer_ids)


def _conditions(base: BaseModel, grid: CalibrationGrid) -> dict[str, Any]:
    behind, law = grid.placement in Placement.ladder(base.model)[:-1], grid.objective == LAW_OBJECTIVE
    training: dict[str, Any] = {"learning_rate": grid.learning_rate if law else NetworkSchedule.learning_rate}
    if behind:
        training = CONDITIONS if law else {"feature_rate": WriterSettings.feature_rate}
    elif law:
        training["converged"] = [IDLE_PASSES, IDLE_STEPS]
    return {**base_conditions(base), "objective": grid.objective, **training}


def base_conditions(base: BaseModel) -> dict[str, Any]:
    """What a run of any kind was made on."""
    return {
        "base_model": base.id,
        "base_weights": base.fingerprint.weights[:12],
        "dtype": base.dtype,
        "device": base.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
