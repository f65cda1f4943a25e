"""Runs suites: a cell at a time, each in a process of its own, each finished one a line of the results file.

A suite is a module with ``cells``, ``run``, ``table`` and ``plots`` (`Suite`) and one line in `SUITES`. What stands in
the results file already, measured on this machine with the same versions, is not run again; an interrupt loses the
running cell. This module and the ``cells`` of a suite do without torch; only ``run`` computes.
"""

import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, cast

from loramem import embedded
from loramem.processes import end_with_parent
from loramem.suites.figures import Plot

SUITES = {
    "write-speed": "loramem.suites.write_speed",
    "write-scaling": "loramem.suites.write_scaling",
    "recall-speed": "loramem.suites.recall_speed",
    "large-base": "loramem.suites.large_base",
    "budget": "loramem.suites.budget",
    "scenarios": "loramem.suites.scenarios",
}
PACKAGES = ("loramem", "torch", "transformers", "peft")

Result = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a run was asked for; None leaves it to the suite."""

    records: tuple[int, ...] | None = None
    seeds: int | None = None
    model: str = embedded.NAME
    device: str = "auto"
    threads: int = 1
    quick: bool = False
    """Tiny sizes and caps: shows that the suite works, and measures nothing worth keeping."""
    store: Path | None = None
    """Recall from this store in place of one built for the run."""
    every_record: bool = False
    """No sampling where a suite would sample."""


class Cell(Protocol):
    """One measurement: a frozen dataclass whose fields say all that ``run`` needs."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The fields that make it this measurement and no other, JSON-able."""

    @property
    def title(self) -> str:
        """A few words for people who wait."""


Known = Callable[[Any], Result]
"""The result of a cell that was yielded before."""


@dataclass(frozen=True)
class Table:
    """Rows of text with their column names, and remarks that belong below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


class Suite(Protocol):
    """The face of a suite's module."""

    __doc__: str | None

    def cells(self, request: Request, known: Known) -> Iterator[Cell]:
        """The cells in order. Each is measured before the next is asked for, so a later one may use its result."""

    def run(self, cell: Any) -> Result:
        """Measure one cell; JSON-able."""

    def table(self, lines: Sequence[Mapping[str, Any]]) -> Table:
        """What the lines of a run say."""

    def plots(self, lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
        """The same to look at; none where there is nothing that a table does not show better."""


def load_suite(name: str) -> Suite:
    """The module of a suite."""
    return cast(Suite, import_module(SUITES[name]))


def run_suite(name: str, request: Request, out: Path, progress: Callable[[str], None]) -> list[Result]:
    """Measure the cells of a suite that are not in ``out`` yet.

    Args:
        out: JSON lines; created with its folder, appended to.
        progress: Told in words what is being run and what came out.

    Returns:
        The lines of all cells of this request, in order.
    """
    suite, results = load_suite(name), Results(out, name, machine(request))
    lines = []
    with _processes(request) as measure:
        for cell in suite.cells(request, lambda cell: results.lines[results.id(cell)]["result"]):
            if results.id(cell) not in results.lines:
                progress(f"{cell.title} …")
                result = measure(SUITES[name], cell, request.threads)
                results.append(cell, result)
                progress(f"{cell.title}: {_brief(result)}")
            lines.append(results.lines[results.id(cell)])
    return lines


def measured(name: str, request: Request, path: Path) -> list[Result]:
    """The lines of a suite that ``path`` holds for this machine, without measuring anything."""
    conditions = machine(request)
    lines = Results(path, name, conditions).lines.values()
    return [line for line in lines if line["suite"] == name and line["conditions"] == conditions]


class Results:
    """The lines of a results file that were measured under the same conditions.

    Args:
        path: JSON lines; need not exist.
        suite: Name of the suite.
        conditions: What else must be equal for a cell to count as measured.
    """

    def __init__(self, path: Path, suite: str, conditions: Mapping[str, Any]) -> None:
        self.path, self.suite, self.conditions = path, suite, conditions
        text = path.read_text() if path.exists() else ""
        # What an interrupt left of a line is not one: it is cut off before the next is written.
        self._whole = text[: text.rfind("\n") + 1]
        self._torn = len(self._whole) < len(text)
        self.lines: dict[str, Result] = {line["id"]: line for line in map(json.loads, self._whole.splitlines())}

    def append(self, cell: Cell, result: Result) -> None:
        """Write a cell's line, durably."""
        line: Result = {
            "id": self.id(cell),
            "suite": self.suite,
            "cell": dict(cell.identity),
            "conditions": dict(self.conditions),
            "result": result,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._torn:
            self.path.write_text(self._whole)
            self._torn = False
        with self.path.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[line["id"]] = line

    def id(self, cell: Cell) -> str:
        """Sixteen hex digits of what the cell is and what it was measured on."""
        text = json.dumps([self.suite, cell.identity, self.conditions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def machine(request: Request) -> dict[str, Any]:
    """The conditions that make two measurements comparable: processor, threads, versions, the base's weights."""
    from loramem.base_model import find_base_model, fingerprint

    folder, identity, _ = find_base_model(request.model)
    return {
        "base_model": identity,
        "base_weights": fingerprint(folder).weights[:12],
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": request.threads,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def public_name(model: str) -> str:
    """A base model as results name it: a local folder by its last name, since paths are nobody else's business."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def _processes(request: Request) -> Iterator[Callable[[str, Cell, int], Result]]:
    """`_measure` in a fresh process each time, so that its memory is its own; a quick run keeps one for all."""

    def pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=end_with_parent)

    def afresh(module: str, cell: Cell, threads: int) -> Result:
        with pool() as process:
            return process.submit(_measure, module, cell, threads).result()

    if not request.quick:
        yield afresh
        return
    with pool() as process:
        yield lambda module, cell, threads: process.submit(_measure, module, cell, threads).result()


def _measure(module: str, cell: Cell, threads: int) -> Result:
    import torch

    warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers', about each other
    torch.set_num_threads(threads)
    result = cast(Suite, import_module(module)).run(cell)
    if torch.cuda.is_initialized():
        result["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return {**result, "peak_memory_mb": peak_memory_mb()}


def peak_memory_mb() -> float:
    """The largest resident set this process has had, in MiB."""
    try:
        # ru_maxrss would count what the parent had when it started this process.
        status = Path("/proc/self/status").read_text().splitlines()
        kibibytes = float(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        import resource

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kibibytes = largest / 1024 if sys.platform == "darwin" else largest
    return round(kibibytes / 1024, 1)


def _brief(result: Result) -> str:
    shown = [f"{name} {result[name]}" for name in ("seconds", "exact", "records", "steps") if name in result]
    return ", ".join(shown) or "done"
