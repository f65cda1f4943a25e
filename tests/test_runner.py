"""The runner measures each cell once, whatever ends it, and as many side by side as it is told to."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loramem.errors import WorkerLost
from loramem.suites import child, elsewhere, runner


@dataclass(frozen=True)
class Number:
    value: int

    @property
    def identity(self) -> dict[str, int]:
        return asdict(self)

    @property
    def title(self) -> str:
        return f"number {self.value}"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, base: Path) -> list[int]:
    """A suite of three numbers, of which the last follows from the others' results; what was measured, in order."""
    ran: list[int] = []

    def cells(request: runner.SuiteOptions, known: runner.Known) -> Iterator[Number]:
        yield Number(1)
        yield Number(2)
        yield Number(known(Number(1))["double"] + known(Number(2))["double"])

    def measure(cell: Number) -> dict[str, int]:
        if 0 in ran and cell.value == 6:
            raise KeyboardInterrupt
        ran.append(cell.value)
        return {"double": 2 * cell.value}

    module = ModuleType("numbers_suite")
    module.cells, module.run = cells, measure

    @contextmanager
    def in_this_process(_: runner.SuiteOptions) -> Iterator[object]:
        yield runner.measure

    monkeypatch.setitem(sys.modules, "numbers_suite", module)
    monkeypatch.setitem(runner.SUITES, "numbers", "numbers_suite")
    monkeypatch.setattr(runner, "_processes", in_this_process)
    return ran


def request(base: Path, threads: int = 1) -> runner.SuiteOptions:
    return runner.SuiteOptions(model=str(base), threads=threads)


def run_numbers(base: Path, out: Path, threads: int = 1) -> list[dict[str, object]]:
    threads_before = torch.get_num_threads()
    try:
        return runner.run_suite("numbers", request(base, threads), out, lambda _: None)
    finally:
        torch.set_num_threads(threads_before)


def test_a_finished_cell_is_not_run_again(measured: list[int], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.jsonl"
    lines = run_numbers(base, out)
    assert measured == [1, 2, 6]
    assert [line["result"]["double"] for line in lines] == [2, 4, 12]
    assert all(line["result"]["peak_memory_mb"] > 0 for line in lines)
    assert run_numbers(base, out) == lines
    assert measured == [1, 2, 6]
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines


def test_an_interrupt_loses_the_running_cell_at_most(measured: list[int], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    measured.append(0)  # has the third cell interrupted
    with pytest.raises(KeyboardInterrupt):
        run_numbers(base, out)
    assert len(out.read_text().splitlines()) == 2
    with out.open("a") as file:
        file.write('{"id": "half a li')  # killed while it wrote
    del measured[:]
    assert [line["cell"]["value"] for line in run_numbers(base, out)] == [1, 2, 6]
    assert measured == [6]
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 3


def test_other_conditions_are_another_measurement(measured: list[int], base: Path, tmp_path: Path) -> None:
    run_numbers(base, tmp_path / "results.jsonl")
    run_numbers(base, tmp_path / "results.jsonl", threads=2)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6


def test_an_executor_measures_side_by_side_and_says_on_what(
    measured: list[int], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = runner.SuiteOptions(model=str(base), quick=True, threads=torch.get_num_threads())
    there = {**runner.machine(options), "processor": "another"}
    monkeypatch.setattr(elsewhere, "machine", lambda _: there)
    out = tmp_path / "results.jsonl"
    with ThreadPoolExecutor(2) as workers:
        lines = runner.run_suite("numbers", options, out, lambda _: None, workers)
        assert sorted(measured) == [1, 2, 6]
        assert [line["result"]["double"] for line in lines] == [2, 4, 12]
        assert {line["conditions"]["processor"] for line in lines} == {"another"}
        assert runner.run_suite("numbers", options, out, lambda _: None, workers) == lines
        found = runner.measured("numbers", options, out, workers)
        assert {line["id"] for line in found} == {line["id"] for line in lines}
    assert len(measured) == 3
    assert runner.measured("numbers", options, out) == []  # of this machine


def test_what_was_measured_on_another_machine_than_was_asked_says_so(
    measured: list[int], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, asked = runner.SuiteOptions(model=str(base), quick=True, threads=torch.get_num_threads()), list[int]()

    def machine(request: runner.SuiteOptions) -> dict[str, object]:
        asked.append(0)
        return {"processor": len(asked)}

    monkeypatch.setattr(elsewhere, "machine", machine)
    with ThreadPoolExecutor(1) as workers:
        lines = runner.run_suite("numbers", options, tmp_path / "results.jsonl", lambda _: None, workers)
    assert sorted(line["conditions"]["processor"] for line in lines) == [2, 3, 4]
    assert [line["cell"]["value"] for line in lines] == [1, 2, 6]


CELLS = """
import os
from dataclasses import asdict, dataclass

@dataclass(frozen=True)
class Cell:
    value: int
    identity = property(asdict)
    title = property(lambda self: f"cell {self.value}")

def run(cell):
    print("to be seen and not read")
    if cell.value > 1:
        os._exit(9)
    if cell.value:
        raise ValueError("no such cell")
    return {"process": os.getpid(), "parent": os.getppid()}
"""


def test_a_cell_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cells_suite.py").write_text(CELLS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cell = importlib.import_module("cells_suite").Cell
    result = child.measure_afresh("cells_suite", cell(0), 1)
    assert result["parent"] == os.getpid() != result["process"]
    assert result["peak_memory_mb"] > 0
    with pytest.raises(ValueError, match="no such cell"):
        child.measure_afresh("cells_suite", cell(1), 1)
    with pytest.raises(WorkerLost, match="cell 2 ended with 9"):
        child.measure_afresh("cells_suite", cell(2), 1)


# --- real processes, ended from outside

SUITE = """
import os, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

# Importing the real one takes longer than all else that happens here.
sys.modules["torch"] = SimpleNamespace(set_num_threads=abs, cuda=SimpleNamespace(is_initialized=bool))

@dataclass(frozen=True)
class Cell:
    value: int
    identity = property(asdict)
    title = property(lambda self: f"cell {self.value}")

def cells(request, known):
    yield from map(Cell, range(6))

def run(cell):
    with (Path(__file__).parent / "begun").open("a") as file:
        file.write(f"{cell.value}\\n")
    time.sleep(0.2)
    return {"square": cell.value**2}

if __name__ == "__main__":
    import signal

    from loramem.suites import runner

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    runner.SUITES["slow"] = "slow_suite"
    runner.machine = lambda request: {}  # which looks at the base model
    request = runner.SuiteOptions(workers=int(sys.argv[1]), quick=True)
    runner.run_suite("slow", request, Path(__file__).parent / "results.jsonl", print)
"""


@pytest.mark.parametrize(("ended_by", "workers"), [(signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_a_run_that_was_ended_goes_on_where_it_stopped(ended_by: signal.Signals, workers: int, tmp_path: Path) -> None:
    (tmp_path / "slow_suite.py").write_text(SUITE)
    results, begun = tmp_path / "results.jsonl", tmp_path / "begun"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(tmp_path / "slow_suite.py"), str(workers)]

    def finished() -> list[int]:
        lines = results.read_text().splitlines(keepends=True) if results.exists() else []
        return [json.loads(line)["cell"]["value"] for line in lines if line.endswith("\n")]

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(finished()) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    # A terminal interrupts the whole group; a kill hits the parent alone.
    os.killpg(process.pid, ended_by) if ended_by is signal.SIGINT else process.kill()
    assert process.wait(60) != 0
    time.sleep(0.5)  # a worker that outlives its parent would begin another cell now
    done, before = finished(), begun.read_text().split()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert sorted(finished()) == list(range(6))
    again = begun.read_text().split()[len(before) :]
    assert sorted(map(int, again)) == sorted(set(range(6)).difference(done))
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    squares = {line["cell"]["value"]: line["result"]["square"] for line in lines}
    assert squares == {value: value**2 for value in range(6)}
