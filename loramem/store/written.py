"""What the shards of a write came to, and the last proof of it: what is least certain, each record alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from loramem.errors import RecallError, StubbornRecords
from loramem.models.adapters import AdaptedModel
from loramem.models.certificate import ALONE, in_doubt, least_certain, prove_alone
from loramem.models.placement import Placement
from loramem.planning import calibration
from loramem.planning.plan import Plan, ShardPlan
from loramem.records.contexts import asked_in_contexts, owners
from loramem.records.outcome import Outcome
from loramem.records.prompts import EncodedRecord
from loramem.results import WriteReport
from loramem.training.jobs import ShardJob, ShardResult, TrainedShard
from loramem.training.shards import CAUTION
from loramem.workers.staged import folder_of


@dataclass(frozen=True)
class Written:
    """A proved shard, the job that made it, and what its values cost in bits."""

    job: ShardJob
    folder: Path
    """Of its files, in staging."""
    records: Sequence[EncodedRecord]
    """Those that it holds, with all that training did not read."""
    shard: TrainedShard
    cost_bits: float

    def proved(self) -> Iterator[tuple[EncodedRecord, float]]:
        """Its records with their certificates."""
        return zip(self.records, self.shard.proof.min_probs, strict=True)


@dataclass(frozen=True)
class Trained:
    """What the shards of a plan came to."""

    written: list[Written]
    given_up: list[EncodedRecord]
    """Records that could not be certified."""
    outcomes: list[Outcome]

    @classmethod
    def of(
        cls,
        staging: Path,
        encoded: Sequence[EncodedRecord],
        plan: Plan,
        made: Sequence[tuple[ShardJob, ShardResult]],
        placement: Placement,
    ) -> "Trained":
        """
        Args:
            made: For each shard of the plan.
            placement: See `outcomes`.
        """
        planned = [(job, one, result) for one, (job, result) in zip(plan.shards, made, strict=True)]
        return cls(
            [
                Written(
                    job,
                    folder_of(staging, job) / shard.adapter,
                    [encoded[one.first + index] for index in shard.indices],
                    shard,
                    one.cost_bits * len(shard.indices) / one.records,
                )
                for job, one, result in planned
                for shard in result.shards
            ],
            [encoded[one.first + index] for _, one, result in planned for index in result.failed],
            [
                outcome
                for job, one, result in planned
                if job.settings.keep_base is None  # else neurons decide, and the boundary is of another placement
                for outcome in outcomes(one, placement, result, plan.kind)
            ],
        )


def misrecalled_alone(written: Sequence[Written], models: Sequence[AdaptedModel]) -> tuple[Written, RecallError] | None:
    """Decode what is least certain of a write, over all of its dtypes, once more: each record alone.

    A shard of one record was decoded alone by its proof; that takes most of a long text's write and is not repeated.

    Returns:
        The first shard of which a record is not decoded exactly, and the error that says so; None if all are.
    """
    runs = [(one, adapted) for one in written for adapted in models]
    probs = [one.shard.proof_in(adapted.base.dtype).every for one, adapted in runs]
    lowest = ((each[index], run, index) for run, each in enumerate(probs) for index in least_certain(each))
    for run, found in groupby(sorted(nsmallest(ALONE, lowest), key=itemgetter(1)), key=itemgetter(1)):
        (one, adapted), adapter = runs[run], runs[run][0].shard.adapter
        if len(one.records) == 1 and not one.records[0].in_contexts:
            continue
        adapted.load(adapter, one.folder)
        try:
            asked = [*one.records, *asked_in_contexts(one.records)]
            prove_alone(adapted.model, [asked[index] for *_, index in found], adapter, adapted.dtypes)
        except RecallError as error:
            return one, error
    return None


def more_careful(written: Written, error: RecallError) -> ShardJob:
    """The job that writes a shard again over what its doubtful records compute when each is decoded alone.

    Raises:
        RecallError: ``error``, where that was done with the record that it names.
    """
    shard, job, caution = written.shard, written.job, len(CAUTION) - 1
    refused = next(index for index, entry in enumerate(job.records) if entry.record.key == error.key)
    if shard.caution == caution and (refused in job.doubtful or len(shard.indices) == 1):
        raise error
    proofs = zip(shard.proof.every, *(proof.every for proof in shard.served.values()), strict=True)
    owner = owners(written.records)
    doubtful = (shard.indices[owner[number]] for number in in_doubt([min(probs) for probs in proofs]))
    return replace(job, caution=caution, doubtful=tuple(sorted({*job.doubtful, *doubtful, refused})))


def outcomes(planned: ShardPlan, placement: Placement, result: ShardResult, kind: str | None) -> list[Outcome]:
    """What a shard teaches the success boundary: whether its first rank did, and if not, the one that did.

    Args:
        placement: The store's, which the boundary is of: a shard that begins or is trained elsewhere teaches nothing.
        kind: Of data that it was planned as; None where no kind is known.
    """

    def outcome(rank: int, certified: bool, visits: float | None = None) -> Outcome:
        parameters = planned.parameters * rank // planned.rank
        known_as = kind or calibration.UNKNOWN
        return Outcome(
            known_as, rank, planned.length, parameters, planned.cost_bits, certified, visits, planned.vocabulary
        )

    if planned.rung:
        return []
    if result.failed or len(result.shards) != 1 or result.shards[0].climbed:
        return [outcome(planned.rank, False)]
    if result.shards[0].placement != placement:  # which was not tried: the base cannot be trained there alone
        return []
    training = result.shards[0].training
    if training.rank == planned.rank:
        return [outcome(planned.rank, True, training.visits / planned.records)]
    return [outcome(planned.rank, False), outcome(training.rank, True)]


def report_of(trained: Trained, skipped: int, elapsed_s: float) -> WriteReport:
    shards, given_up = trained.written, trained.given_up
    every = [entry.record.question_of for one in shards for entry in one.records]
    written = every.count(None)
    trainings = [one.shard.training for one in shards]
    return WriteReport(
        written=written,
        questions=len(every) - written,
        skipped=skipped,
        failed=tuple(entry.record.key for entry in given_up),
        adapters=tuple(one.shard.adapter for one in shards),
        rank=max(training.rank for training in trainings),
        exact_match=len(every) / (len(every) + len(given_up)),
        min_prob=min(one.shard.proof.min_prob for one in shards),
        parameters=sum(training.parameters for training in trainings),
        cost_bits=sum(one.cost_bits for one in shards),
        steps=sum(training.steps for training in trainings),
        visits=sum(training.visits for training in trainings),
        training_s=sum(training.elapsed_s for training in trainings),
        elapsed_s=elapsed_s,
        served={
            dtype: min(one.shard.served[dtype].min_prob for one in shards) for dtype in sorted(shards[0].shard.served)
        },
        kept={one.shard.adapter: one.shard.kept for one in shards if one.shard.kept is not None},
        contexts=len(shards[0].job.settings.contexts),
        needs_ids=sum(entry.prompt is not None and not entry.prompt["chat"] for one in shards for entry in one.records),
    )


def stubborn(records: Sequence[EncodedRecord], rank: int, of: int | None = None) -> StubbornRecords:
    """The error that names records which could not be certified.

    Args:
        of: How many one adapter was to hold; None where stubborn records were tried on their own.
    """
    keys = [entry.record.key for entry in records]
    shown = ", ".join(map(repr, keys[:5])) + (" …" if len(keys) > 5 else "")
    if of is not None:
        return StubbornRecords(
            f"{len(keys)} of {of} records could not be certified in one adapter, at rank {rank} and the placement that "
            f"holds most: {shown}. Nothing was committed. Leave out one_adapter (--one-adapter), allow a higher rank "
            "(max_rank, --max-rank), or commit the others with partial=True (--partial).",
            keys=keys,
            rank=rank,
        )
    return StubbornRecords(
        f"{len(keys)} records could not be certified, at rank {rank} and on their own: {shown}. Nothing was committed; "
        "partial=True (--partial) commits the others.",
        keys=keys,
        rank=rank,
    )
