"""One write: admit, plan, journal, train, prove, commit. Everything before the commit can be thrown away."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean

from loramem._util.collection import uncollected
from loramem._util.events import log_event
from loramem._util.files import make_directory, rename_directories
from loramem._util.layout import ADAPTERS, STAGING
from loramem.errors import RecallError, WriteError
from loramem.index.commits import commit_write, end_write
from loramem.index.index import Index
from loramem.index.rows import FAILED, PendingWrite, StoredAdapter, now, stored_record
from loramem.models.adapters import AdaptedModel
from loramem.models.dtypes import Dtype
from loramem.planning import timings
from loramem.planning.plan import Plan
from loramem.records.outcome import Outcome
from loramem.records.prompts import EncodedRecord
from loramem.records.record import Record
from loramem.results import WriteReport
from loramem.store.manifest import Manifest
from loramem.store.planner import Planner
from loramem.store.request import OnConflict, WriteRequest
from loramem.store.staging import clean, take_back
from loramem.store.written import Trained, Written, misrecalled_alone, more_careful, report_of, stubborn
from loramem.training.jobs import Delivery, JobBase, ShardJob, releases
from loramem.training.progress import ProgressCallback
from loramem.training.settings import WriterSettings
from loramem.training.shards import stored_adapter
from loramem.workers.ahead import Ahead
from loramem.workers.executors import run_jobs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """Shards that are to be trained."""

    encoded: Sequence[EncodedRecord]
    plan: Plan
    jobs: Sequence[ShardJob]
    """Of each shard of the plan."""


@dataclass(frozen=True)
class Prepared:
    """A write before it is journalled: nothing is changed yet."""

    records: Sequence[Record]
    """As given."""
    request: WriteRequest
    skipped: int
    training: Training
    """Of what is new."""
    waiting: Iterator[ShardJob]
    """Its jobs, for whoever begins some of them earlier."""


@dataclass(frozen=True)
class Journalled:
    """A write as the journal has it: all that is settled before its training."""

    id: int
    training: Training
    request: WriteRequest


class Transaction:
    """Takes writes to one store from admission to commit; the caller holds its locks."""

    def __init__(
        self,
        store: Path,
        index: Index,
        manifest: Manifest,
        planner: Planner,
        served: Callable[[Dtype], AdaptedModel],
    ) -> None:
        self.store, self.index, self.planner, self.serve, self._served = store, index, planner, manifest.serve, served
        self.adapted, self.placement, self.keep_values = planner.adapted, planner.placement, manifest.keep_values

    def write(
        self,
        records: Sequence[Record],
        request: WriteRequest,
        on_conflict: OnConflict = "error",
        progress: ProgressCallback | None = None,
        executor: Executor | None = None,
        learnt: Sequence[Outcome] | None = None,
    ) -> WriteReport:
        """Write what of the records is new, once it stands in the journal.

        Args:
            learnt: See `Planner.plan`.

        Raises what `prepare` raises, before anything is changed.

        Raises:
            StubbornRecords, TrainingDiverged, RecallError: Nothing was committed, and the journal entry is closed.
        """
        started = time.monotonic()
        prepared = self.prepare(records, request, on_conflict, executor, learnt=learnt)
        return self._write(prepared, started, progress, executor)

    def prepare(
        self,
        records: Sequence[Record],
        request: WriteRequest,
        on_conflict: OnConflict = "error",
        executor: Executor | None = None,
        *,
        planner: Planner | None = None,
        learnt: Sequence[Outcome] | None = None,
    ) -> Prepared:
        """Admit and plan.

        Args:
            planner: Over another connection to the index, for another thread; the transaction's own if None.
            learnt: See `Planner.plan`.

        Raises what `Planner.admit`, `Planner.plan` and `training` raise.
        """
        planner = planner or self.planner
        if (keep := request.settings.keep_base) is not None and keep.unknown:
            planner.check_answer(keep.unknown)
        ended = {(each.namespace, each.key) for each in request.ended}
        encoded, skipped = planner.admit(records, on_conflict, executor, ended)
        if not encoded:
            nothing = Training((), Plan(request.goal, (), False, None), ())
            return Prepared(records, request, skipped, nothing, iter(()))
        plan = planner.plan(encoded, request, learnt=learnt, keep_features=executor is None, executor=executor)
        training = self.training(encoded, plan, request.settings)
        return Prepared(records, request, skipped, training, iter(training.jobs))

    def write_prepared(
        self,
        prepared: Prepared,
        request: WriteRequest,
        on_conflict: OnConflict,
        progress: ProgressCallback | None,
        executor: Executor,
        ahead: Ahead[ShardJob, Delivery],
        learnt: Sequence[Outcome],
    ) -> WriteReport:
        """`write` of what was prepared before, also if the store has changed since.

        Args:
            ahead: Has some of its jobs.
            learnt: As it was prepared with.
        """
        started = time.monotonic()
        encoded = prepared.training.encoded
        as_before = self.planner.admits(prepared.records, encoded, prepared.skipped, on_conflict)
        if not as_before or request != prepared.request:
            ahead.cancel()
            prepared = self.prepare(prepared.records, request, on_conflict, executor, learnt=learnt)
        return self._write(prepared, started, progress, executor, ahead)

    def training(self, encoded: Sequence[EncodedRecord], plan: Plan, settings: WriterSettings) -> Training:
        """What a plan comes to.

        Raises what `with_contexts` raises.
        """
        base, ladder, here = JobBase.of(self.adapted.base, self.planner.device), self.planner.ladder(), releases()
        encoded = self.planner.in_contexts(encoded, settings.contexts)
        jobs = [
            ShardJob(
                base=base,
                serve=self.serve,
                records=tuple(entry.bare() for entry in encoded[planned.first : planned.first + planned.records]),
                rank=planned.rank,
                placement=ladder[planned.rung],
                settings=settings,
                one_adapter=plan.one_adapter,
                releases=here,
            )
            for planned in plan.shards
        ]
        return Training(encoded, plan, jobs)

    def _write(
        self,
        prepared: Prepared,
        started: float,
        progress: ProgressCallback | None,
        executor: Executor | None,
        ahead: Ahead[ShardJob, Delivery] | None = None,
    ) -> WriteReport:
        training, request = prepared.training, prepared.request
        if not training.encoded:
            return WriteReport.nothing(prepared.skipped)
        write_id = self.index.begin_write(
            [entry.record for entry in training.encoded], {**request.to_json(), "plan": asdict(training.plan)}
        )
        log_event("journalled", records=len(training.encoded))
        journalled = Journalled(write_id, training, request)
        return self._finish(journalled, prepared.skipped, started, progress, executor, ahead)

    def resume(
        self, pending: PendingWrite, progress: ProgressCallback | None = None, executor: Executor | None = None
    ) -> WriteReport:
        """Go on with a journalled write; shards that were proved before are kept.

        Raises what `write` raises.
        """
        started, request = time.monotonic(), WriteRequest.from_json(pending.request)
        encoded = self.planner.encode(pending.records, executor=executor)
        if "plan" in pending.request:  # what a plan would come to now may differ, and nothing that was finished fit it
            plan = Plan.of(pending.request["plan"])
        else:  # an older journal
            plan = self.planner.plan(encoded, request, keep_features=executor is None, executor=executor)
        training = self.training(encoded, plan, request.settings)
        return self._finish(Journalled(pending.id, training, request), 0, started, progress, executor)

    def _finish(
        self,
        write: Journalled,
        skipped: int,
        started: float,
        progress: ProgressCallback | None,
        executor: Executor | None,
        ahead: Ahead[ShardJob, Delivery] | None = None,
    ) -> WriteReport:
        """Train, prove and commit.

        A typed error closes the journal entry; anything else (an interrupt, a crash) leaves it to be resumed.
        """
        request, plan, learnt = write.request, write.training.plan, list[Outcome]()
        try:
            (trained,) = self.train([write.training], progress, executor, ahead)
            learnt = trained.outcomes
            if trained.given_up and not (request.partial and trained.written):
                of = len(write.training.encoded) if plan.one_adapter else None
                raise stubborn(trained.given_up, request.settings.max_rank, of)
        except (WriteError, RecallError):
            end_write(self.index, write.id, FAILED, learnt)
            clean(self.store, self.index)
            raise
        lacking = {(entry.record.namespace, entry.record.key) for entry in trained.given_up}  # so are their questions
        adapters, at = self.install(trained.written, request), now()
        with uncollected():
            records = [
                stored_record(
                    entry.record,
                    entry.prompt_sha256,
                    entry.length,
                    one.shard.adapter,
                    min_prob,
                    keep_value=self.keep_values,
                    prompt=entry.prompt,
                    written_at=at,
                )
                for one in trained.written
                for entry, min_prob in one.proved()
                if (entry.record.namespace, entry.record.question_of) not in lacking
            ]
            commit_write(self.index, write.id, adapters, records, learnt, request.ended)
        log_event("committed", adapters=len(adapters), records=len(records))
        clean(self.store, self.index)
        if executor is None:  # workers share the cores: their times are not those of a write alone
            self._note_time(trained.written)
        report = report_of(trained, skipped, time.monotonic() - started)
        return replace(report, beside=self._beside(report.adapters)) if plan.one_adapter else report

    def train(
        self,
        wanted: Sequence[Training],
        progress: ProgressCallback | None,
        executor: Executor | None,
        ahead: Ahead[ShardJob, Delivery] | None = None,
    ) -> list[Trained]:
        """Train and prove every shard of several plans, side by side; what was staged for the same records before is
        taken as it is.

        Args:
            ahead: See `run_jobs`.

        Raises:
            TrainingDiverged, RecallError: See `write_shard`.
        """
        take_back(self.store, self.index)
        staging = self.store / STAGING
        make_directory(staging)
        jobs = [job for each in wanted for job in each.jobs]
        try:
            served = {dtype: self._served(dtype) for dtype in self.serve}
            while True:
                results = run_jobs(
                    jobs, staging, self.adapted, served, executor, progress, ahead
                )  # those done are found done
                made, trained = iter(zip(jobs, results, strict=True)), list[Trained]()
                for each in wanted:
                    mine = list(islice(made, len(each.plan.shards)))
                    trained.append(Trained.of(staging, each.encoded, each.plan, mine, self.placement))
                models = [self.adapted, *served.values()]
                refused = [found for each in trained if (found := misrecalled_alone(each.written, models)) is not None]
                if not refused:
                    break
                for written, error in refused:
                    # Without the error's text, which names a key.
                    log.info("%s; its shard is trained again with more caution", type(error).__name__)
                    jobs[jobs.index(written.job)] = more_careful(written, error)
        finally:
            self.adapted.deactivate()
            self.adapted.kept_features.clear()
        log_event("trained", shards=len(jobs), records=sum(len(each.encoded) for each in wanted))
        return trained

    def install(self, written: Sequence[Written], request: WriteRequest) -> list[StoredAdapter]:
        """Put proved adapters, synced in staging, where the rows that are committed next will look for them."""
        target = self.store / ADAPTERS
        make_directory(target)
        rows = [stored_adapter(one.job, one.shard, one.folder, one.cost_bits, request.kept) for one in written]
        rename_directories({one.folder: target / one.shard.adapter for one in written})
        log_event("installed", adapters=len(rows))
        return rows

    def _beside(self, adapters: Collection[str]) -> int:
        """How many others the namespaces of these adapters have."""
        every = list(self.index.adapters())
        namespaces = {adapter.namespace for adapter in every if adapter.id in adapters}
        return sum(adapter.namespace in namespaces for adapter in every) - len(adapters)

    def _note_time(self, written: Sequence[Written]) -> None:
        """For plans: a visit takes another time where a shard climbs to, or begins because it must hold all."""
        usual = [
            one
            for one in written
            if not one.shard.climbed and one.job.placement == self.placement and one.job.settings.keep_base is None
        ]
        base = self.adapted.base
        if not usual:
            return
        tokens = sum(one.shard.training.visits * mean(entry.length for entry in one.records) for one in usual)
        seconds = sum(one.shard.training.elapsed_s for one in usual)
        timings.note_time(base.fingerprint.weights[:12], base.device.type, seconds, max(tokens, 1))
