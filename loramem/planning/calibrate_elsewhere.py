"""Calibration by an executor's processes: a length of a grid in each job, or all that a first write would measure."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from loramem.planning.base_calibration import BUDGET_S, calibrated, keep
from loramem.planning.calibrate import Bench, CalibrationGrid, spread
from loramem.planning.calibration import Calibration
from loramem.planning.runs import Run, append_run, default_file, read_runs, shipped_file
from loramem.training.jobs import JobBase, releases
from loramem.workers.executors import completed
from loramem.workers.worker import base_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LengthJob:
    """One length of a grid, with the runs of it that were made before."""

    base: JobBase
    grid: CalibrationGrid
    length: int
    known: tuple[Run, ...]
    releases: Mapping[str, str]


@dataclass(frozen=True)
class BaseJob:
    """What a first write would measure, with the runs that were made before."""

    base: JobBase
    known: tuple[Run, ...]
    budget_s: float
    releases: Mapping[str, str]


def run_length(job: LengthJob) -> list[Run]:
    """The runs of a length, old and new.

    Raises what `calibrate` and `base_model` raise.
    """
    known, done = {run.identity: run for run in job.known}, list[Run]()
    with base_model(job.base, job.releases) as adapted:
        bench = Bench(adapted, job.grid, job.length)
        for rank in sorted(set(job.grid.ranks)):
            if not job.grid.is_known(done, rank, bench.length):
                done.append(known.get(bench.identity(rank)) or bench.run(rank))
    return done


def run_base(job: BaseJob) -> tuple[Calibration, list[Run]]:
    """What is known of the base model now, and the new runs.

    Raises what `calibrate_base` and `base_model` raise, but OSError.
    """
    made = list[Run]()
    with base_model(job.base, job.releases) as adapted:
        return calibrated(adapted, job.known, made.append, budget_s=job.budget_s), made


def calibrate_there(
    base: JobBase,
    grid: CalibrationGrid,
    out: Path,
    executor: Executor,
    *,
    budget_s: float = math.inf,
    progress: Callable[[Run, float], None] | None = None,
) -> list[Run]:
    """`calibrate`, its lengths side by side: so a length may be measured that a longer one, under way, makes needless.

    Args:
        budget_s: No length is begun after so many seconds.

    Raises what `calibrate` and `completed` raise.
    """
    started, slowest = time.monotonic(), 0.0
    known = {run.identity: run for run in read_runs(out)}
    done, ahead = list[Run](), sum(grid.lengths) * len(set(grid.ranks))
    mine, here = tuple(run for run in known.values() if run.kind == grid.kind), releases()

    def jobs() -> Iterator[LengthJob]:
        for length in spread(grid.lengths):
            if time.monotonic() - started > budget_s:
                log.info("no time left for %d tokens", length)
                return
            yield LengthJob(base, grid, length, mine, here)

    with closing(completed(executor, run_length, jobs())) as lengths:
        for _, runs in lengths:
            for run in runs:
                ahead -= run.length
                if run.identity not in known:
                    append_run(out, run)
                    slowest = max(slowest, run.elapsed_s / run.length)
                    if progress is not None:
                        progress(run, max(0.0, slowest * ahead))
            done += runs
    return done


def calibrate_base_there(
    base: JobBase, runs: Path | None, executor: Executor, *, budget_s: float = BUDGET_S
) -> Calibration:
    """`calibrate_base`, in one job.

    Raises what that and `completed` raise.
    """
    out = runs or default_file()
    known = tuple(
        run
        for run in (*read_runs(shipped_file()), *read_runs(out))
        if run.conditions["base_weights"] == base.fingerprint.weights[:12]
    )
    ((_, (found, made)),) = completed(executor, run_base, [BaseJob(base, known, budget_s, releases())])
    for run in made:
        append_run(out, run)
    return keep(found)
