"""One write: admit, plan, train, prove, commit. Everything before the commit can be thrown away."""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from loramem._util.events import tell
from loramem._util.files import make_directory, publish_directory
from loramem._util.layout import ADAPTERS, STAGING
from loramem.errors import ConflictingRecord, PromptCollision, RecallError, WriteError
from loramem.index.commits import commit_write, end_write
from loramem.index.index import Index
from loramem.index.rows import FAILED, StoredAdapter, prompt_digest, stored_record
from loramem.models.adapters import AdaptedModel
from loramem.models.decoding import answer_probabilities
from loramem.models.dtypes import Dtype
from loramem.models.ending import Ending
from loramem.models.placement import Placement
from loramem.models.shard_sizes import cut_groups
from loramem.planning import calibration, timings
from loramem.planning.cost import costs_bits
from loramem.planning.plan import ANY_RANK, Basis, GoalName, Plan, Price, RankLimits, plan_groups
from loramem.records.outcome import Outcome
from loramem.records.prompts import EncodedRecord, encode_records
from loramem.records.record import Record, deduplicate
from loramem.results import WriteReport
from loramem.store.manifest import Manifest
from loramem.store.staging import clean, take_back
from loramem.store.written import Trained, Written, misrecalled_alone, more_careful, report_of, stubborn
from loramem.training.executors import run_jobs
from loramem.training.progress import ProgressCallback
from loramem.training.settings import WriterSettings
from loramem.training.shard_training import features_of
from loramem.training.shards import ShardJob, stored_adapter
from loramem.training.trainer import autocast_dtype

log = logging.getLogger(__name__)


class Transaction:
    """The steps of a write to one store; the caller holds its locks."""

    def __init__(
        self,
        store: Path,
        index: Index,
        manifest: Manifest,
        adapted: AdaptedModel,
        served: Callable[[Dtype], AdaptedModel],
    ) -> None:
        self.store, self.index, self.adapted, self.serve, self._served = store, index, adapted, manifest.serve, served
        self.template, self.placement = manifest.template(), manifest.placed()
        self.keep_values = manifest.keep_values

    def admit(self, records: Sequence[Record], on_conflict: str = "error") -> tuple[list[EncodedRecord], int]:
        """Records to write as token ids, and how many are not written.

        Args:
            on_conflict: What becomes of a record whose key is there with another value: "error", "skip" or "replace".

        Raises:
            RecordError: A record cannot be written, or its key has another value; see the subclasses.
        """
        fresh, repeated = deduplicate(records)
        new = []
        for record in fresh:
            known = self.index.find(record.namespace, record.key)
            if known is None:
                new.append(record)
            elif known.holds(record.value) or on_conflict == "skip":
                repeated.append(record)
            elif on_conflict == "replace":
                new.append(record)
            else:
                raise ConflictingRecord(
                    f"Key {record.key!r} is in the store with another value. Replace it "
                    '(on_conflict="replace", --on-conflict replace), skip it, or use another key.',
                    key=record.key,
                    line=record.line,
                )
        if repeated:
            log.info("%d records are in the store already and were skipped", len(repeated))
        return self.encode(new), len(repeated)

    def encode(
        self, records: Sequence[Record], kept: Mapping[tuple[str, str], Mapping[str, Any]] | None = None
    ) -> list[EncodedRecord]:
        """Records as token ids, grouped by namespace: a shard never mixes them, as equal keys are equal prompts.

        Args:
            kept: Prompts of records that are written anew, by namespace and key.
        """

        def holder(record: Record, prompt_ids: Sequence[int]) -> str | None:
            other = self.index.find_prompt(record.namespace, prompt_digest(prompt_ids))
            return None if other == record.key else other

        encoded = encode_records(
            records,
            (base := self.adapted.base).tokenizer,
            self.template,
            base.max_tokens,
            base.unreachable,
            base.vocabulary,
            kept=kept,
            taken=lambda record, prompt_ids: holder(record, prompt_ids) is not None,
        )
        for entry in encoded:
            record = entry.record
            if (other := holder(record, entry.prompt_ids)) is not None:
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
        goal: GoalName,
        rank: int | None,
        limits: RankLimits = ANY_RANK,
        kind: str | None = None,
        *,
        one_adapter: bool = False,
        as_new: bool = False,
        keep_features: bool = False,
    ) -> Plan:
        """Shards and ranks for encoded records.

        Args:
            kind: Of data, whose law is asked; the calibrated one that costs most nearly as much if None.
            one_adapter: One shard for each namespace.
            as_new: Plan as a new store would, with nothing learnt from the writes to this one.
            keep_features: See `base_probabilities`.

        Raises:
            DoesNotFit: See `plan_write`.
        """
        groups = groupby(encoded, key=lambda entry: entry.record.namespace)
        sizes = [len(list(group)) for _, group in groups]
        values = [entry.answer_ids[:-1] for entry in encoded]
        most = None if one_adapter else self.placement.size(self.adapted.model).shard_tokens()
        probs = [
            prob
            for first, last in cut_groups(sizes, [len(entry.answer_ids) for entry in encoded], most)
            for prob in self.base_probabilities(encoded[first:last], keep_features=keep_features)
        ]

        def price(first: int, last: int) -> Price:
            tokens = [prob for each in probs[first:last] for prob in each]
            loss = -sum(math.log(max(prob, 1e-30)) for prob in tokens) / len(tokens)
            return Price(sum(costs_bits(values[first:last], probs[first:last])), loss)

        learnt = [] if as_new else self.index.outcomes()
        whole = price(0, len(encoded)) if encoded else None
        basis = self.basis(whole, sum(map(len, values)), kind, learnt)
        lengths = [len(value) for value in values]
        return plan_groups(sizes, lengths, price, basis, goal=goal, rank=rank, limits=limits, one_adapter=one_adapter)

    def basis(self, price: Price | None, length: int, kind: str | None, learnt: Sequence[Outcome]) -> Basis:
        """What a plan rests on: what is known of the base model and what this store's writes taught.

        Args:
            price: Of ``length`` answer tokens, by which the law's kind is chosen unless it is given.
            learnt: Outcomes of the store's writes.
        """
        base, model, place = self.adapted.base, self.adapted.model, (self.placement.modules, self.placement.layers)
        weights = base.fingerprint.weights[:12]
        known = calibration.load(weights)
        if kind is None and known is not None and price is not None:
            kind = calibration.nearest_kind(known, price.cost_bits, length)
        return calibration.basis(
            known,
            place,
            self.placement.parameters_per_rank(model),
            kind,
            learnt,
            timings.seconds_per_visit(weights, base.device.type),
            [each.size(model) for each in self._ladder()[1:]],
        )

    def _ladder(self) -> list[Placement]:
        """The store's placement and those that hold more."""
        ladder = self.adapted.ladder
        return ladder[ladder.index(self.placement) :] if self.placement in ladder else [self.placement]

    def base_probabilities(self, encoded: Sequence[EncodedRecord], *, keep_features: bool = False) -> list[list[float]]:
        """Probability of every answer token under the plain base, of records that are trained together.

        Args:
            keep_features: For this training, which follows.
        """
        adapted = self.adapted
        if (features := features_of([adapted], encoded, self.placement)) is not None:
            if keep_features:
                adapted.kept_features.keep(encoded, features[0])
            with adapted.disabled():
                losses, _ = Ending(adapted.model, features[0]).scores()
            answers = torch.exp(-losses).split([len(entry.answer_ids) for entry in encoded])
            return [each[:-1].tolist() for each in answers]
        cast = autocast_dtype(adapted.base.device)  # an estimate may be half precise
        with adapted.disabled(), torch.autocast(adapted.base.device.type, cast, enabled=cast is not None):
            probs = dict(answer_probabilities(adapted.model, encoded))
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
        settings, learnt = WriterSettings.saved(request["settings"]), list[Outcome]()
        try:
            trained = self.train(encoded, plan, settings, progress, executor)
            learnt = trained.outcomes
            if trained.given_up and not (request["partial"] and trained.written):
                raise stubborn(trained.given_up, settings.max_rank, len(encoded) if plan.one_adapter else None)
        except (WriteError, RecallError):
            end_write(self.index, write_id, FAILED, learnt)
            clean(self.store, self.index)
            raise
        adapters = self.publish(trained.written, request)
        records = [
            stored_record(
                entry.record,
                entry.prompt_ids,
                entry.length,
                one.shard.adapter,
                min_prob,
                keep_value=self.keep_values,
                prompt=entry.prompt,
            )
            for one in trained.written
            for entry, min_prob in one.proved()
        ]
        # An older journal has no "ended"; a tuple is no JSON key, so they are rows of namespace, key, how and new key.
        ended = {(namespace, key): (how, new) for namespace, key, how, new in request.get("ended", ())}
        commit_write(self.index, write_id, adapters, records, learnt, ended)
        tell("committed", adapters=len(adapters), records=len(records))
        clean(self.store, self.index)
        if executor is None:  # workers share the cores: their times are not those of a write alone
            self._note_time(trained.written)
        report = report_of(trained, skipped, time.monotonic() - started)
        return replace(report, beside=self._beside(report.adapters)) if plan.one_adapter else report

    def train(
        self,
        encoded: Sequence[EncodedRecord],
        plan: Plan,
        settings: WriterSettings,
        progress: ProgressCallback | None,
        executor: Executor | None,
    ) -> Trained:
        """Train and prove every shard of a plan; what was staged for the same records before is taken as it is.

        Raises:
            TrainingDiverged, RecallError: See `write_shard`.
        """
        take_back(self.store, self.index)
        make_directory(self.store / STAGING)
        jobs = self._jobs(plan, encoded, settings)
        try:
            served = {dtype: self._served(dtype) for dtype in self.serve}
            while True:
                results = run_jobs(jobs, self.adapted, served, executor, progress)  # those done before are found done
                trained = Trained.of(jobs, plan, results, self.placement)
                refused = misrecalled_alone(trained.written, [self.adapted, *served.values()])
                if refused is None:
                    break
                written, error = refused
                log.info("%s; its shard is trained again with more caution", error)
                jobs[jobs.index(written.job)] = more_careful(written, error)
        finally:
            self.adapted.rest()
            self.adapted.kept_features.clear()
        tell("trained", shards=len(jobs), records=len(encoded))
        return trained

    def publish(self, written: Sequence[Written], request: Mapping[str, Any]) -> list[StoredAdapter]:
        """Put proved adapters, synced in staging, where the rows that are committed next will look for them."""
        target = self.store / ADAPTERS
        make_directory(target)
        asked = {"goal": request["goal"], "rank": request["rank"], "one_adapter": request.get("one_adapter", False)}
        rows = [stored_adapter(one.job, one.shard, one.cost_bits, asked) for one in written]
        for one in written:
            publish_directory(one.job.folder / one.shard.adapter, target / one.shard.adapter)
        tell("published", adapters=len(rows))
        return rows

    def _jobs(self, plan: Plan, encoded: Sequence[EncodedRecord], settings: WriterSettings) -> list[ShardJob]:
        base, ladder = self.adapted.base, self._ladder()
        return [
            ShardJob(
                location=base.location,
                base_id=base.id,
                revision=base.revision,
                device=str(base.device),
                dtype=base.dtype,
                fingerprint=base.fingerprint,
                serve=self.serve,
                records=tuple(encoded[planned.first : planned.first + planned.records]),
                rank=planned.rank,
                placement=ladder[planned.rung],
                settings=settings,
                staging=self.store / STAGING,
                one_adapter=plan.one_adapter,
            )
            for planned in plan.shards
        ]

    def _beside(self, adapters: Collection[str]) -> int:
        """How many others the namespaces of these adapters have."""
        every = list(self.index.adapters())
        namespaces = {adapter.namespace for adapter in every if adapter.id in adapters}
        return sum(adapter.namespace in namespaces for adapter in every) - len(adapters)

    def _note_time(self, written: Sequence[Written]) -> None:
        """For plans: a visit takes another time where a shard climbs to, or begins because it must hold all."""
        usual = [one for one in written if not one.shard.climbed and one.job.placement == self.placement]
        base = self.adapted.base
        if not usual:
            return
        tokens = sum(one.shard.training.visits * mean(entry.length for entry in one.records) for one in usual)
        seconds = sum(one.shard.training.elapsed_s for one in usual)
        timings.note_time(base.fingerprint.weights[:12], base.device.type, seconds, max(tokens, 1))
