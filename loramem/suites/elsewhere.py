"""Cells of a suite on an executor's workers."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from loramem.suites.child import measure_afresh
from loramem.suites.runner import Cell, Measured, SuiteOptions, machine, measure
from loramem.training.jobs import releases
from loramem.workers.executors import completed
from loramem.workers.worker import check_releases

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class CellJob:
    """A cell, and what the run that it belongs to was asked for."""

    module: str
    """Of the suite."""
    cell: Cell
    request: SuiteOptions
    releases: Mapping[str, str]


def conditions_there(executor: Executor, request: SuiteOptions) -> dict[str, Any]:
    """`loramem.suites.runner.machine` of a worker: whichever is asked first."""
    return _answer(executor, machine, request)


def measured_there(executor: Executor, request: SuiteOptions, module: str, cell: Cell) -> Measured:
    """What came of a cell there.

    Raises what the cell raises.

    Raises:
        WorkerLost: A worker ended, or the process that it had started.
        OtherRelease: See `check_releases`.
    """
    return _answer(executor, run_cell, CellJob(module, cell, request, releases()))


def _answer(executor: Executor, function: Callable[[_Item], _Answer], item: _Item) -> _Answer:
    with closing(completed(executor, function, [item])) as answers:
        ((_, answer),) = answers
    return answer


def run_cell(job: CellJob) -> Measured:
    """Measure a cell in a fresh process, or in this one for a quick run.

    Raises as `measured_there`.
    """
    check_releases(job.releases)
    measuring = measure if job.request.quick else measure_afresh
    return measuring(job.module, job.cell, job.request.threads), machine(job.request)
