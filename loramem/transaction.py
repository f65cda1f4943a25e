"""One write: admit, plan, train, prove, commit. Everything before the commit can be thrown away."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from loramem import calibrations, timings
from loramem.adapters import AdaptedModel, Placement
from loramem.boundary import Outcome
from loramem.capacity import ANY_RANK, Basis, Plan, Price, RankLimits, ShardPlan, plan_groups
from loramem.errors import ConflictingRecord, PromptCollision, RecallError, StubbornRecords, WriteError
from loramem.files import move_synced
from loramem.index import FAILED, Index, prompt_digest, stored_record
from loramem.jobs import run_jobs
from loramem.pricing import costs_bits
from loramem.prompts import EncodedRecord, PromptTemplate, encode_records
from loramem.recall import answer_probabilities
from loramem.records import Record, deduplicate
from loramem.reports import WriteReport
from loramem.settings import WriterSettings
from loramem.shards import Shard, ShardJob, ShardResult, stored_adapter
from loramem.staging import NAME as STAGING
from loramem.staging import clean
from loramem.writer import ProgressCallback, autocast_dtype

log = logging.getLogger(__name__)


class Transaction:
    """The steps of a write to one store; the caller holds its locks."""

    def __init__(
        self, store: Path, index: Index, adapted: AdaptedModel, template: PromptTemplate, placement: Placement
    ) -> None:
        self.store, self.index, self.adapted = store, index, adapted
        self.template, self.placement = template, placement

    def admit(self, records: Sequence[Record]) -> tuple[list[EncodedRecord], int]:
        """New records as token ids, and how many were there already.

        Raises:
            RecordError: A record cannot be written, or its key has another value; see the subclasses.
        """
        fresh, repeated = deduplicate(records)
        new = []
        for record in fresh:
            known = self.index.find(record.namespace, record.key)
            if known is None:
                new.append(record)
            elif known.holds(record.value):
                repeated.append(record)
            else:
                raise ConflictingRecord(
                    f"Key {record.key!r} is in the store with another value; this one would replace it. "
                    "Use another key or another store.",
                    key=record.key,
                    line=record.line,
                )
        if repeated:
            log.info("%d records are in the store already and were skipped", len(repeated))
        return self.encode(new), len(repeated)

    def encode(self, records: Sequence[Record]) -> list[EncodedRecord]:
        """Records as token ids, grouped by namespace: a shard never mixes them, as equal keys are equal prompts."""
        base = self.adapted.base
        encoded = encode_records(records, base.tokenizer, self.template, base.max_tokens, base.unreachable)
        for entry in encoded:
            record = entry.record
            other = self.index.find_prompt(record.namespace, prompt_digest(entry.prompt_ids))
            if other is not None and other != record.key:
                raise PromptCollision(
                    f"Key {record.key!r} gives the same prompt token ids as the stored key {other!r}. Rename it.",
                    other=other,
                    key=record.key,
                    line=record.line,
                )
        return sorted(encoded, key=lambda entry: entry.record.namespace)

    def plan(
        self,
        encoded: Sequence[EncodedRecord],
        goal: str,
        rank: int | None,
        limits: RankLimits = ANY_RANK,
        kind: str | None = None,
    ) -> Plan:
        """Shards and ranks for encoded records.

        Args:
            kind: Of data, whose law is asked; the calibrated one that costs most nearly as much if None.

        Raises:
            DoesNotFit: See `plan_write`.
        """
        probs, values = self.base_probabilities(encoded), [entry.answer_ids[:-1] for entry in encoded]

        def price(first: int, last: int) -> Price:
            tokens = [prob for each in probs[first:last] for prob in each]
            loss = -sum(math.log(max(prob, 1e-30)) for prob in tokens) / len(tokens)
            return Price(sum(costs_bits(values[first:last], probs[first:last])), loss)

        groups = groupby(encoded, key=lambda entry: entry.record.namespace)
        sizes = [len(list(group)) for _, group in groups]
        basis = (
            self.basis(price(0, len(encoded)), sum(map(len, values)), kind) if encoded else self.basis(None, 0, kind)
        )
        return plan_groups(sizes, [len(value) for value in values], price, basis, goal=goal, rank=rank, limits=limits)

    def basis(self, price: Price | None, length: int, kind: str | None) -> Basis:
        """What a plan rests on: what is known of the base model and what this store's writes taught.

        Args:
            price: Of ``length`` answer tokens, by which the law's kind is chosen unless it is given.
        """
        base, place = self.adapted.base, (self.placement.modules, self.placement.layers)
        weights = base.fingerprint.weights[:12]
        known = calibrations.load(weights)
        if kind is None and known is not None and price is not None:
            kind = calibrations.nearest_kind(known, price.cost_bits, length)
        return calibrations.basis(
            known,
            place,
            self.placement.parameters_per_rank(self.adapted.model),
            kind,
            self.index.outcomes(),
            timings.seconds_per_visit(weights, base.device.type),
        )

    def base_probabilities(self, encoded: Sequence[EncodedRecord]) -> list[list[float]]:
        """Probability of every answer token under the plain base, each record on its own."""
        base = self.adapted.base
        cast = autocast_dtype("auto", base.device)  # an estimate may be half precise
        with self.adapted.disabled(), torch.autocast(base.device.type, cast, enabled=cast is not None):
            probs = dict(answer_probabilities(self.adapted.model, encoded))
        return [probs[index][:-1].tolist() for index in range(len(encoded))]

    def run(
        self,
        write_id: int,
        encoded: Sequence[EncodedRecord],
        plan: Plan,
        request: Mapping[str, Any],
        skipped: int,
        progress: ProgressCallback | None,
        executor: Executor | None,
        *,
        started: float,
    ) -> WriteReport:
        """Train, prove and commit a journalled write; shards that an interrupted run had proved are kept.

        A typed error closes the journal entry; anything else (an interrupt, a crash) leaves it to be resumed.

        Raises:
            StubbornRecords, TrainingDiverged, RecallError: Nothing was committed.
        """
        clean(self.store, self.index, keep_staged=True)
        settings, learnt = WriterSettings(**request["settings"]), list[Outcome]()
        try:
            jobs = self._jobs(plan, encoded, settings)
            results = run_jobs(jobs, self.adapted, executor, progress)
            learnt = [
                one
                for planned, result in zip(plan.shards, results, strict=True)
                for one in outcomes(planned, result, plan.kind)
            ]
            written = [
                _Written(job, shard, planned.cost_bits * len(shard.indices) / planned.records)
                for job, planned, result in zip(jobs, plan.shards, results, strict=True)
                for shard in result.shards
            ]
            given_up = [job.records[i] for job, result in zip(jobs, results, strict=True) for i in result.failed]
            if given_up and not (request["partial"] and written):
                raise _stubborn(given_up, settings.max_rank)
        except (WriteError, RecallError):
            self.index.end_write(write_id, FAILED, learnt)
            clean(self.store, self.index)
            raise
        finally:
            self.adapted.rest()
        self._commit(write_id, written, learnt)
        clean(self.store, self.index)
        if executor is None:  # workers share the cores: their times are not those of a write alone
            self._note_time(written)
        return _report(written, given_up, skipped, time.monotonic() - started)

    def _jobs(self, plan: Plan, encoded: Sequence[EncodedRecord], settings: WriterSettings) -> list[ShardJob]:
        base = self.adapted.base
        return [
            ShardJob(
                location=base.location,
                revision=base.revision,
                device=str(base.device),
                dtype=base.dtype,
                fingerprint=base.fingerprint,
                records=tuple(encoded[planned.first : planned.first + planned.records]),
                rank=planned.rank,
                placement=self.placement,
                settings=settings,
                staging=self.store / STAGING,
            )
            for planned in plan.shards
        ]

    def _note_time(self, written: Sequence["_Written"]) -> None:
        base = self.adapted.base
        tokens = sum(one.shard.training.visits * mean(entry.length for entry in one.records) for one in written)
        seconds = sum(one.shard.training.elapsed_s for one in written)
        timings.note_time(base.fingerprint.weights[:12], base.device.type, seconds, max(tokens, 1))

    def _commit(self, write_id: int, written: Sequence["_Written"], learnt: Sequence[Outcome]) -> None:
        """Files first (they were synced in staging), then one transaction."""
        target = self.store / "adapters"
        target.mkdir(mode=0o700, exist_ok=True)
        for one in written:
            move_synced(one.job.folder / one.shard.adapter, target / one.shard.adapter)
        self.index.commit(
            write_id,
            [stored_adapter(one.job, one.shard, target / one.shard.adapter, one.cost_bits) for one in written],
            [
                stored_record(entry.record, entry.prompt_ids, entry.length, one.shard.adapter, min_prob)
                for one in written
                for entry, min_prob in zip(one.records, one.shard.proof.min_probs, strict=True)
            ],
            learnt,
        )


@dataclass(frozen=True)
class _Written:
    """A proved shard, the job that made it, and what its values cost in bits."""

    job: ShardJob
    shard: Shard
    cost_bits: float

    @property
    def records(self) -> list[EncodedRecord]:
        return [self.job.records[index] for index in self.shard.indices]


def outcomes(planned: ShardPlan, result: ShardResult, kind: str | None) -> list[Outcome]:
    """What a shard teaches the success boundary: whether its first rank did, and if not, the one that did.

    Args:
        kind: Of data that it was planned as; None where no kind is known.
    """

    def outcome(rank: int, certified: bool, visits: float | None = None) -> Outcome:
        parameters = planned.parameters * rank // planned.rank
        known_as = kind or calibrations.UNKNOWN
        return Outcome(known_as, rank, planned.length, parameters, planned.cost_bits, certified, visits)

    if result.failed or len(result.shards) != 1:
        return [outcome(planned.rank, False)]
    training = result.shards[0].training
    if training.rank == planned.rank:
        return [outcome(planned.rank, True, training.visits / planned.records)]
    return [outcome(planned.rank, False), outcome(training.rank, True)]


def _report(
    shards: Sequence[_Written], given_up: Sequence[EncodedRecord], skipped: int, elapsed_s: float
) -> WriteReport:
    written = sum(len(one.shard.indices) for one in shards)
    trainings = [one.shard.training for one in shards]
    return WriteReport(
        written=written,
        skipped=skipped,
        failed=tuple(entry.record.key for entry in given_up),
        adapters=tuple(one.shard.adapter for one in shards),
        rank=max(training.rank for training in trainings),
        exact_match=written / (written + len(given_up)),
        min_prob=min(one.shard.proof.min_prob for one in shards),
        parameters=sum(training.parameters for training in trainings),
        cost_bits=sum(one.cost_bits for one in shards),
        steps=sum(training.steps for training in trainings),
        visits=sum(training.visits for training in trainings),
        training_s=sum(training.elapsed_s for training in trainings),
        elapsed_s=elapsed_s,
    )


def _stubborn(records: Sequence[EncodedRecord], rank: int) -> StubbornRecords:
    keys = [entry.record.key for entry in records]
    shown = ", ".join(map(repr, keys[:5])) + (" …" if len(keys) > 5 else "")
    return StubbornRecords(
        f"{len(keys)} records could not be certified, at rank {rank} and on their own: {shown}. Nothing was committed; "
        "partial=True (--partial) commits the others.",
        keys=keys,
        rank=rank,
    )
