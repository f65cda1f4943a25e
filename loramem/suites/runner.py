"""Runs suites: a cell at a time, each in a process of its own, each finished one a line of the results file.

A suite is a module with ``cells``, ``run``, ``table`` and ``plots`` (`Suite`) and one line in `SUITES`; one that is no
part of the package goes by the name of its module. What stands in the results file already, measured on this machine
with the same versions, is not run again; an interrupt loses the running cells. This module and the ``cells`` of a suite
do without torch; only ``run`` computes.
"""

import hashlib
import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, cast

from loramem import embedded
from loramem._util.hardware import processor
from loramem.models.dtypes import DtypeChoice
from loramem.suites.figures import HeatMap, Plot
from loramem.workers.processes import end_with_parent, usable_cores

SUITES = {
    "write-speed": "loramem.suites.write_speed",
    "write-scaling": "loramem.suites.write_scaling",
    "recall-speed": "loramem.suites.recall_speed",
    "large-base": "loramem.suites.large_base",
    "phonebook": "loramem.suites.phonebook",
    "long-context": "loramem.suites.long_context",
    "linear-rule": "loramem.suites.linear_rule",
    "scenarios": "loramem.suites.scenarios",
    "phase": "loramem.suites.phase",
    "law": "loramem.suites.memory_law",
    "locality": "loramem.suites.locality",
}
METHODS = ("sft", "memft-ot", "memft-sw", "loramem")
"""The three published ones, and this package's writer."""
UNITS = ("branch", "down_proj")
"""A low-rank branch parallel to the whole MLP, as in the published code, or a LoRA of down_proj, as in the paper."""
COMMON = ("seeds", "device", "threads", "workers", "quick")
"""Fields of a `SuiteOptions` that concern every suite."""
PACKAGES = ("loramem", "torch", "transformers", "peft")

Result = dict[str, Any]
Measured = tuple[Result, Mapping[str, Any]]
"""What came of a cell, and the conditions it was measured under."""


@dataclass(frozen=True)
class SuiteOptions:
    """What a run was asked for; None leaves it to the suite. Which fields concern a suite, its ``OPTIONS`` say."""

    records: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    """Answer tokens."""
    ranks: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    """Of `METHODS`."""
    seeds: int | None = None
    model: str = embedded.NAME
    device: str = "auto"
    dtype: DtypeChoice = "auto"
    """Of the base model: float32 on a processor unless told otherwise."""
    threads: int = 1
    workers: int = 1
    """Cells measured at the same time, each with ``threads`` threads."""
    quick: bool = False
    """Tiny sizes and caps: shows that the suite works, and measures nothing worth keeping."""
    paper: bool = False
    """The published grid, for a GPU."""
    data: Path | None = None
    """A file of the paper's, or one's own text, in place of generated data."""
    unit: str | None = None
    """Where published methods put their matrices, one of `UNITS`."""
    layer: int | None = None
    """Decoder layer of that unit, counted from 0."""
    store: Path | None = None
    """Recall from this store in place of one built for the run."""
    every_record: bool = False
    """No sampling where a suite would sample."""

    def command(self, suite: str) -> str:
        """The command line that asks for it; of files and folders the last name only."""
        options = ["--threads", str(self.threads)]
        options += [] if self.workers == 1 else ["--workers", str(self.workers)]
        options += [] if self.model == embedded.NAME else ["--model", public_name(self.model)]
        options += [] if self.device == "auto" else ["--device", self.device]
        options += [] if self.dtype == "auto" else ["--dtype", self.dtype]
        for name, values in vars(self).items():
            if isinstance(values, tuple):
                options += [f"--{name}", ",".join(map(str, values))]
        options += [] if self.seeds is None else ["--seeds", str(self.seeds)]
        options += [] if self.data is None else ["--data", self.data.name]
        options += [] if self.unit is None else ["--unit", self.unit]
        options += [] if self.layer is None else ["--layer", str(self.layer)]
        options += [] if self.store is None else ["--store", self.store.name]
        options += [*["--all"] * self.every_record, *["--quick"] * self.quick, *["--paper"] * self.paper]
        program = ["loramem", "suite", "run"] if suite in SUITES else ["python", "-m"]
        return shlex.join([*program, suite, *options])


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
    OPTIONS: tuple[str, ...]
    """Fields of a `SuiteOptions` that concern it, besides `COMMON`."""

    def cells(self, request: SuiteOptions, known: Known) -> Iterator[Cell]:
        """The cells in order. What came of earlier ones may be asked for, and is waited for then."""

    def run(self, cell: Any) -> Result:
        """Measure one cell; JSON-able."""

    def table(self, lines: Sequence[Mapping[str, Any]]) -> Table:
        """What the lines of a run say."""

    def plots(self, lines: Sequence[Mapping[str, Any]]) -> tuple[Plot | HeatMap, ...]:
        """The same to look at; none where there is nothing that a table does not show better."""


def load_suite(name: str) -> Suite:
    """The module of a suite."""
    return cast(Suite, import_module(_module(name)))


def _module(name: str) -> str:
    return SUITES.get(name, name)


def run_suite(
    name: str, request: SuiteOptions, out: Path, progress: Callable[[str], None], executor: Executor | None = None
) -> list[Result]:
    """Measure the cells of a suite that are not in ``out`` yet.

    Args:
        out: JSON lines; created with its folder, appended to.
        progress: Told in words what is being run and what came out.
        executor: Its workers measure, as many cells at a time as it has places; a line says which machine it was.

    Returns:
        The lines of all cells of this request, in order.
    """
    suite, conditions = load_suite(name), _conditions(request, executor)
    results = Results(out, name, conditions, request.command(name))
    ids: list[str] = []
    running: dict[Future[Measured], Cell] = {}

    def collect(finished: set[Future[Measured]]) -> None:
        for future in finished:
            cell, (result, measured_on) = running.pop(future), future.result()
            results.append(cell, result, measured_on)
            progress(f"{cell.title}: {_brief(result)}")

    def known(cell: Cell) -> Result:
        collect({future for future, other in running.items() if results.id(other) == results.id(cell)})
        return cast(Result, results.lines[results.id(cell)]["result"])

    with _measuring(request, conditions, executor) as (most, measuring), ThreadPoolExecutor(most) as lanes:
        for cell in suite.cells(request, known):
            ids.append(results.id(cell))
            if ids[-1] in results.lines:
                continue
            if len(running) == most:
                collect(wait(running, return_when=FIRST_COMPLETED).done)
            progress(f"{cell.title} …")
            running[lanes.submit(measuring, _module(name), cell)] = cell
            if most == 1:
                collect(set(running))
        collect(set(running))
    return [results.lines[id_] for id_ in ids]


def measured(name: str, request: SuiteOptions, path: Path, executor: Executor | None = None) -> list[Result]:
    """The lines of a suite that ``path`` holds for this machine, or for an executor's, without measuring anything."""
    conditions = _conditions(request, executor)
    lines = Results(path, name, conditions, request.command(name)).lines.values()
    return [line for line in lines if line["suite"] == name and line["conditions"] == conditions]


class Results:
    """The lines of a results file that were measured under the same conditions.

    Args:
        path: JSON lines; need not exist.
        suite: Name of the suite.
        conditions: What else must be equal for a cell to count as measured.
        command: What lines that are appended are said to come from.
    """

    def __init__(self, path: Path, suite: str, conditions: Mapping[str, Any], command: str) -> None:
        self.path, self.suite, self.conditions, self.command = path, suite, conditions, command
        text = path.read_text() if path.exists() else ""
        # What an interrupt left of a line is not one: it is cut off before the next is written.
        self._whole = text[: text.rfind("\n") + 1]
        self._torn = len(self._whole) < len(text)
        self.lines: dict[str, Result] = {line["id"]: line for line in map(json.loads, self._whole.splitlines())}

    def append(self, cell: Cell, result: Result, conditions: Mapping[str, Any]) -> None:
        """Write a cell's line, durably.

        Args:
            conditions: It was measured under; where they are others than asked for it stands in their place.
        """
        line: Result = {
            "id": self.id(cell, conditions),
            "suite": self.suite,
            "cell": dict(cell.identity),
            "conditions": dict(conditions),
            "command": self.command,
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
        self.lines[self.id(cell)] = line

    def id(self, cell: Cell, conditions: Mapping[str, Any] | None = None) -> str:
        """Sixteen hex digits of what the cell is and what it was measured on, or is asked for on."""
        text = json.dumps([self.suite, cell.identity, conditions or self.conditions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def machine(request: SuiteOptions) -> dict[str, Any]:
    """The conditions that make two measurements comparable: processor, threads, versions, the base's weights."""
    from loramem.models.find_base import find_base_model
    from loramem.models.fingerprint import fingerprint

    folder, identity, _ = find_base_model(request.model)
    return {
        "base_model": identity,
        "base_weights": fingerprint(folder).weights[:12],
        "processor": processor(),
        "cores": usable_cores(),
        "threads": request.threads,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def public_name(model: str) -> str:
    """A base model as results name it: a local one by its last name, since paths are nobody else's business."""
    return Path(model).resolve().name if Path(model).exists() else model


def _conditions(request: SuiteOptions, executor: Executor | None) -> dict[str, Any]:
    if executor is None:
        return machine(request)
    from loramem.suites.elsewhere import conditions_there

    return conditions_there(executor, request)


@contextmanager
def _measuring(
    request: SuiteOptions, conditions: Mapping[str, Any], executor: Executor | None
) -> Iterator[tuple[int, Callable[[str, Cell], Measured]]]:
    """How many cells at a time, and what measures one and says under which conditions."""
    if executor is None:
        with _processes(request) as process:
            yield request.workers, lambda module, cell: (process(module, cell, request.threads), conditions)
        return
    from loramem.suites.elsewhere import measured_there
    from loramem.workers.executors import window

    yield window(executor), partial(measured_there, executor, request)


@contextmanager
def _processes(request: SuiteOptions) -> Iterator[Callable[[str, Cell, int], Result]]:
    """`measure` in a fresh process each time, so that its memory is its own; a quick run keeps them."""

    def pool(size: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(size, mp_context=get_context("spawn"), initializer=end_with_parent)

    def afresh(module: str, cell: Cell, threads: int) -> Result:
        with pool(1) as process:
            return process.submit(measure, module, cell, threads).result()

    if not request.quick:
        yield afresh
        return
    with pool(request.workers) as process:
        yield lambda module, cell, threads: process.submit(measure, module, cell, threads).result()


def measure(module: str, cell: Cell, threads: int) -> Result:
    """What a suite's ``run`` says of a cell, and the memory of this process."""
    import torch

    warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers', about each other
    torch.set_num_threads(threads)
    result = cast(Suite, import_module(module)).run(cell)
    if torch.cuda.is_initialized():  # a suite that looks at phases has reset the peak, and says it itself
        result.setdefault("peak_device_memory_mb", round(torch.cuda.max_memory_allocated() / 2**20, 1))
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
