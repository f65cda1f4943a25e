"""Shards rewritten from the frozen base: compaction, and erasing records for real.

A shard is rewritten as it was asked to be written (goal, rank, settings) and planned as a new store would plan it,
from its live records alone in the order they were written. So the new adapter is, byte for byte, the one that a store
which never held the others would have: nothing of them can be left in it.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Literal, get_args

from loramem._util.choices import check_choice
from loramem._util.events import log_event
from loramem.index.commits import Identity, commit_deletion, commit_erasure, commit_records
from loramem.index.index import Index, Load
from loramem.index.rows import StoredAdapter, StoredRecord
from loramem.models.shard_sizes import Size
from loramem.records.record import Record
from loramem.results import CompactReport, EraseReport
from loramem.store.request import WriteRequest
from loramem.store.session import Session
from loramem.store.staging import clean, collect

if TYPE_CHECKING:
    from loramem.store.written import Trained
    from loramem.training.progress import ProgressCallback

CompactChoice = Literal["advised", "dead", "all"]


@dataclass(frozen=True)
class StoredShard:
    """An adapter and what of it is alive."""

    id: str
    namespace: str
    rank: int
    parameters: int
    cost_bits: float
    size: Size
    """Of the placement."""
    request: WriteRequest
    """How it was asked to be written."""
    alive: Load
    dead: int
    """Tombstones."""

    @property
    def half_dead(self) -> bool:
        return self.dead >= self.alive.records

    @property
    def held(self) -> int:
        """Answer and end tokens of its live records."""
        return self.alive.answer_tokens + self.alive.records

    @property
    def small(self) -> bool:
        return self.held * 2 < self.size.shard_tokens()


def _size(adapter: StoredAdapter) -> Size:
    placement = adapter.placement
    return Size(adapter.parameters // adapter.rank, 2 * len(placement["modules"]) * len(placement["layers"]))


def shards(index: Index, loads: Mapping[str, Load] | None = None) -> list[StoredShard]:
    """Adapters with live records, oldest first.

    Args:
        loads: What the index says that they hold, if it has been asked.
    """
    loads, dead = index.loads() if loads is None else loads, index.tombstones()
    return [
        StoredShard(
            adapter.id,
            adapter.namespace,
            adapter.rank,
            adapter.parameters,
            adapter.training["cost_bits"],
            _size(adapter),
            WriteRequest.of_adapter(adapter.training),
            loads[adapter.id],
            dead.get(adapter.id, 0),
        )
        for adapter in index.adapters()
        if adapter.id in loads
    ]


def alike(chosen: Iterable[StoredShard]) -> list[list[StoredShard]]:
    """Shards that may become one: of one namespace, asked to be written in the same way.

    Where one of them was asked to hold its whole namespace, all do, and it comes first, as the one that is asked how.
    """
    groups: dict[tuple[str, WriteRequest | None], list[StoredShard]] = {}
    first = sorted(chosen, key=lambda shard: not shard.request.one_adapter)
    whole = {shard.namespace for shard in first if shard.request.one_adapter}
    for shard in first:
        request = None if shard.namespace in whole else shard.request
        groups.setdefault((shard.namespace, request), []).append(shard)
    return list(groups.values())


def chosen_for(index: Index, which: CompactChoice) -> list[list[StoredShard]]:
    """Groups of shards to rewrite: those that pay, every one that holds a tombstone, or all."""
    check_choice("which", which, get_args(CompactChoice))
    if which == "advised":
        return worth_compacting(shards(index))
    return alike(shard for shard in shards(index) if which == "all" or shard.dead)


def worth_compacting(present: Iterable[StoredShard]) -> list[list[StoredShard]]:
    """Groups of shards whose rewriting pays: half of one is dead, or small ones become at most half as many; and those
    of a namespace that is to have one."""
    chosen = []
    for group in alike(present):
        if group[0].request.one_adapter and len(group) > 1:
            chosen.append(group)
            continue
        half_dead = [shard for shard in group if shard.half_dead]
        small = [shard for shard in group if shard.small and not shard.half_dead]
        together = half_dead + small
        after = ceil(sum(shard.held for shard in together) / max(shard.size.shard_tokens() for shard in group))
        if len(together) >= 2 and len(together) >= 2 * after:
            chosen.append(together)
        elif half_dead:
            chosen.append(half_dead)
    return chosen


def compact(
    session: Session,
    groups: Sequence[Sequence[StoredShard]],
    progress: "ProgressCallback | None" = None,
    executor: Executor | None = None,
) -> CompactReport:
    """Rewrite the live records of each group of shards, all in one commit; the old adapters are retired.

    Killed at any instruction, the store is as before or as after. What was trained is staged: the next call that
    rewrites the same records takes it.

    Raises:
        StubbornRecords: A record could not be certified again; nothing changed.
        RecallError, IntegrityError: A value that the index does not keep did not come back; nothing changed.
    """
    started = time.monotonic()
    written = [(session.index.written(shard.id for shard in group), group[0].request, None) for group in groups]
    records, adapters = install(session, rewrite(session, written, progress, executor))
    commit_records(session.index, records, adapters)
    log_event("compacted", adapters=len(adapters), records=len(records))
    clean(session.store, session.index)
    old = [shard for group in groups for shard in group]
    return CompactReport(
        records=len(records),
        adapters_before=len(old),
        adapters_after=len(adapters),
        parameters_before=sum(adapter.parameters for adapter in old),
        parameters_after=sum(adapter.parameters for adapter in adapters),
        min_prob=min((record.min_prob for record in records), default=None),
        elapsed_s=time.monotonic() - started,
    )


@dataclass(frozen=True)
class Rewritten:
    """Records of one namespace, trained and proved again, staged."""

    before: Sequence[StoredRecord]
    request: WriteRequest
    trained: "Trained"


def rewrite(
    session: Session,
    groups: Sequence[tuple[Sequence[StoredRecord], WriteRequest, Mapping[Identity, str] | None]],
    progress: "ProgressCallback | None",
    executor: Executor | None,
) -> list[Rewritten]:
    """Train groups of records, each of one namespace, into new adapters.

    Args:
        groups: Records, how they are to be written, and their values by namespace and key; as the index or the weights
            give them if None.

    Raises what `compact` raises.
    """
    from loramem.store.write import Training
    from loramem.store.written import stubborn

    wanted = list[Training]()
    for before, request, values in groups:
        if values is None:
            values = session.reader.values(before)
        kept = {(record.namespace, record.key): record.prompt for record in before if record.prompt is not None}
        records = [Record(r.key, values[r.namespace, r.key], r.namespace, question_of=r.question_of) for r in before]
        encoded = session.planner.encode(records, kept)
        plan = session.planner.plan(encoded, request, learnt=(), executor=executor)
        wanted.append(session.transaction.training(encoded, plan, request.settings))
    made = list[Rewritten]()
    for (before, request, _), trained in zip(
        groups, session.transaction.train(wanted, progress, executor), strict=True
    ):
        if trained.given_up:
            of = len(before) if request.one_adapter else None
            raise stubborn(trained.given_up, request.settings.max_rank, of)
        made.append(Rewritten(before, request, trained))
    return made


def install(session: Session, rewritten: Iterable[Rewritten]) -> tuple[list[StoredRecord], list[StoredAdapter]]:
    """The rows to commit, after all is trained and its files are in place.

    What a row says of the value it has from what was trained, so that no damage of the old row is sealed again.
    """
    adapters, records = list[StoredAdapter](), list[StoredRecord]()
    for one in rewritten:
        known = {(record.namespace, record.key): record for record in one.before}
        adapters += session.transaction.install(one.trained.written, one.request)
        records += [
            replace(
                known[entry.record.namespace, entry.record.key],
                value=entry.record.value if session.manifest.keep_values else None,
                prompt_sha256=entry.prompt_sha256,
                answer_tokens=entry.length,
                adapter=written.shard.adapter,
                min_prob=min_prob,
                prompt=None if entry.prompt is None else dict(entry.prompt),
            )
            for written in one.trained.written
            for entry, min_prob in written.proved()
        ]
    return records, adapters


def erase(
    session: Session,
    records: Sequence[Identity],
    progress: "ProgressCallback | None" = None,
    executor: Executor | None = None,
) -> EraseReport:
    """Delete records, rewrite what shared an adapter with any version of them, and clear every trace.

    Each step can be done again: a call that was killed is finished by the same call.

    Raises what `compact` raises; the records are deleted then, but not erased.

    Raises:
        StoreLocked: Another process kept reading, so that the write-ahead log could not be emptied.
    """
    started, index = time.monotonic(), session.index
    asked = [(namespace, text) for namespace, key in records for text in sorted(index.asked_ever(namespace, key))]
    every = list(dict.fromkeys([*records, *asked]))
    live = [record for record in (index.find(*identity) for identity in every) if record is not None]
    past = [version for identity in every for version in index.versions(*identity).values()]
    held = {record.adapter for record in live} | {version.adapter for version in past}
    commit_deletion(index, [(record.namespace, record.key) for record in live])
    log_event("deleted", records=len(live))
    # Each adapter by itself: erasing a record gives the bytes of the same shard written without it.
    rewritten = compact(session, [[shard] for shard in shards(index) if shard.id in held], progress, executor)
    # No grace for readers, and every retired adapter: one from before a compaction holds the values as well.
    removed, _ = collect(session.store, index, grace_s=0)
    commit_erasure(index, every)
    log_event("forgotten", records=len(records))
    index.vacuum()
    log_event("vacuumed")
    return EraseReport(len(records), rewritten.records, removed, time.monotonic() - started)
