"""One whole write, timed, and what the store that holds it says of it."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loramem import MemoryStore, Record, WriterSettings
from loramem.errors import RecallError, RecordError, WriteError
from loramem.index.commits import seal_index
from loramem.models.placement import Placement
from loramem.results import WriteReport
from loramem.suites.runner import Result
from loramem.suites.timing import clock, conditions, warm_up
from loramem.training import shards
from loramem.training.progress import WriteProgress
from loramem.training.shard_training import ShardTraining


class _Stopped(Exception):
    """The write has used its seconds."""


def make_deep(place: Path, model: str, device: str) -> None:
    """A store as they were before writes began behind the last attention: all that it writes runs layers in training,
    and is proved in the base's dtype alone."""
    with MemoryStore(place, model, device=device, serve=[]) as store:
        deep = Placement.ladder(store.base.model)[-1]
        manifest = replace(store.manifest, placement=asdict(deep))
        manifest.save(place)
        seal_index(store._index, manifest.sha256)


def timed_write(
    store: MemoryStore,
    records: Sequence[Record],
    cap_s: float,
    settings: WriterSettings,
    *,
    cpu_cap_s: float = -math.inf,
    goal: str = "fast",
    rank: int | None = None,
) -> Result:
    """Write what the base model can express, and stop training once it took ``cap_s``, and as much of the processor's
    time as ``cpu_cap_s``: that of a busy machine is the better measure.

    Returns:
        ``refused``: what it cannot express, and why; ``failed``: keys that were not certified; ``error``: why nothing
        was committed, or None; ``told``: what the library logged.
    """
    device, refused, report, error = store.base.device, dict[str, str](), None, None
    warm_up(store.base)
    with _told() as told, _clocked_training() as training:
        while True:
            rest, begun = [record for record in records if record.key not in refused], clock(device)
            computed = time.process_time()

            def watch(_: WriteProgress, ends: float = begun + cap_s, ends_cpu: float = computed + cpu_cap_s) -> None:
                if time.monotonic() > ends and time.process_time() > ends_cpu:
                    raise _Stopped

            try:
                report = store.write(rest, goal=goal, rank=rank, partial=True, settings=settings, progress=watch)
            except RecordError as refusal:  # before anything changed, and for the first such record only
                refused[refusal.key or ""] = type(refusal).__name__
                continue
            except _Stopped:
                error = f"stopped after {clock(device) - begun:.1f} s"
            except (WriteError, RecallError) as failure:
                error = f"{type(failure).__name__}: {failure}"
            break
    return {
        "records": len(records),
        "refused": refused,
        "written": report.written if report else 0,
        "failed": list(report.failed) if report else [record.key for record in rest],
        "error": error,
        "seconds": round(clock(device) - begun, 3),
        "cpu_s": round(time.process_time() - computed, 3),
        "training_cpu_s": round(sum(training), 3),
        **(_said(report, store.manifest.dtype) if report else {}),
        "told": told,
        "base": conditions(store.base),
    }


def held(place: Path, device: str) -> Result:
    """What a store opened anew decodes exactly, and in how much."""
    with MemoryStore(place, device=device, create=False) as store:
        stats, verified = store.stats(), store.verify()
        placements = {(tuple(one.placement["modules"]), tuple(one.placement["layers"])) for one in store.adapters()}
        return {
            "exact": verified.exact,
            "answer_tokens": stats.answer_tokens,
            "adapters": stats.adapters,
            "ranks": stats.ranks,
            "parameters": stats.parameters,
            "placements": sorted([list(modules), list(layers)] for modules, layers in placements),
        }


def placed(result: Result) -> str:
    """Modules and layers of a write's adapters, in short."""
    shown = []
    for modules, layers in result["placements"]:
        names = modules[0].rpartition(".")[2] if len(modules) == 1 else f"{len(modules)} modules"
        shown.append(f"{names} of {', '.join(map(str, layers))}")
    return "; ".join(shown)


def span(values: Sequence[int]) -> str:
    """The least and the most of several numbers."""
    return "–".join(str(value) for value in sorted({min(values), max(values)}))


def _said(report: WriteReport, dtype: str) -> Result:
    lowest = {dtype: report.min_prob, **report.served}
    return {
        "training_s": round(report.training_s, 3),
        "steps": report.steps,
        "min_prob": {name: round(value, 4) for name, value in lowest.items() if value is not None},
        "cost_bits": round(report.cost_bits, 1),
    }


@contextmanager
def _clocked_training() -> Iterator[list[float]]:
    """What every training of a shard takes of the processor's time, which no report says."""
    spent, train = list[float](), shards.train_shard

    def clocked(*arguments: Any, **named: Any) -> ShardTraining:
        begun = time.process_time()
        try:
            return train(*arguments, **named)
        finally:
            spent.append(time.process_time() - begun)

    shards.train_shard = clocked
    try:
        yield spent
    finally:
        shards.train_shard = train


@contextmanager
def _told() -> Iterator[list[str]]:
    """What the library logs meanwhile: retrials, climbs and growth are told nowhere else."""
    messages = list[str]()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    log, ear = logging.getLogger("loramem"), Ear(logging.INFO)
    before = log.level
    log.addHandler(ear)
    log.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        log.setLevel(before)
        log.removeHandler(ear)
