"""Workers share the cores that this process may use, not those of the machine."""

import math
import os
import re
from pathlib import Path

import pytest
import torch

from loramem.errors import ArgumentError
from loramem.workers import executors, processes
from loramem.workers.processes import usable_cores

from .conftest import ROOT


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """64 cores, of which this process is bound to 8, and no quota yet; the folder of control groups."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(processes, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(processes, "CGROUPS", tmp_path / "cgroup")
    return tmp_path


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_without_a_quota_they_are_those_it_is_bound_to(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("here", "above", "cores"),
    [
        ("200000 100000", "max 100000", 2),
        ("max 100000", "300000 100000", 3),
        ("250000 100000", "600000 100000", 3),
        ("10000 100000", "max 100000", 1),
        ("6400000 100000", "max 100000", 8),
        ("max 100000", "nonsense", 8),
    ],
)
def test_a_quota_of_version_2_counts_also_of_a_group_around(machine: Path, here: str, above: str, cores: int) -> None:
    (machine / "membership").write_text("0::/slice/job\n")
    group(machine / "cgroup/slice/job", cpu__max=here)
    group(machine / "cgroup/slice", cpu__max=above)
    assert usable_cores() == cores


@pytest.mark.parametrize("path", ["/", "/docker/of-the-host"])
@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("150000", 2)])
def test_a_quota_of_version_1_counts(machine: Path, path: str, quota: str, cores: int) -> None:
    (machine / "membership").write_text(f"3:cpuset:/\n2:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/\n")
    group(machine / "cgroup/cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert usable_cores() == cores


@pytest.mark.parametrize(("workers", "threads_here", "threads"), [(1, 64, 8), (3, 64, 2), (16, 64, 1), (2, 3, 3)])
def test_workers_share_these_cores(
    machine: Path, monkeypatch: pytest.MonkeyPatch, workers: int, threads_here: int, threads: int
) -> None:
    pools = []

    class Pool:
        def __init__(self, *asked: int) -> None:
            pools.append(asked)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(executors, "Processes", Pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads_here)
    with executors.process_pool(workers):
        assert pools == [(workers, threads)]


def test_no_workers_are_refused() -> None:
    with pytest.raises(ArgumentError, match="at least 1, not 0"), executors.process_pool(0):
        pass


def test_nothing_else_counts_the_machines_cores() -> None:
    files = [path for folder in ("loramem", "cli") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if re.search(r"cpu_count\(", path.read_text())] == ["processes.py"]
    assert 1 <= usable_cores() <= (os.cpu_count() or math.inf)
