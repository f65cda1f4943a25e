"""A write on a Ray cluster, with the list of `tests/test_dask.py`; `make test-ray` runs it, in its own environment.

Ray brings libraries that the other tests do without, so that it is no part of them.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray

from loramem import MemoryStore, WriteProgress, ray_executor
from loramem.errors import NoWorkers, OtherRelease
from loramem.models import shard_sizes
from loramem.planning.pricing import run_pricing
from loramem.workers.executors import ClusterExecutor
from loramem.workers.worker import run_job

from .conftest import numbers
from .test_dask import forbid, left, pretend, told_by
from .test_jobs import contents

RECORDS = numbers(200)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_sizes, "FILL", 1.2)  # of two dozen records
        yield


@pytest.fixture(scope="module")
def worker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module", autouse=True)
def cluster(worker_folder: Path) -> Iterator[str]:
    """Address of a cluster of two slots."""
    context = ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"TMPDIR": str(worker_folder), "OMP_NUM_THREADS": "1"}},
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


class Counting(ClusterExecutor):
    """Counts what it is given of each function."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.place, self.lost = executor, executor.place, executor.lost
        self.given: list[Callable[..., Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given.append(fn)
        return self.executor.submit(fn, *args, **kwargs)

    def slots(self) -> int:
        return self.executor.slots()

    def everywhere(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function gives in every actor."""
        return ray.get([actor.run.remote(function, *args) for actor in self.executor.actors()])


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Counting]:
    with ray_executor() as executor:
        counting = Counting(executor)
        counting.everywhere(forbid, str(tmp_path))
        yield counting


@pytest.fixture
def store(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    monkeypatch.chdir(tmp_path)
    with MemoryStore("memory", str(base)) as opened:
        yield opened


@pytest.fixture(scope="module")
def here(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("here") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(RECORDS)
    return path


def test_a_cluster_writes_the_same_adapters_as_this_process_and_keeps_nothing(
    store: MemoryStore, pool: Counting, here: Path, worker_folder: Path
) -> None:
    report = store.write(RECORDS, executor=pool)
    assert contents(store.path) == contents(here)
    assert pool.given.count(run_job) == pool.given.count(run_pricing) == len(report.adapters) > 7
    assert left(worker_folder) == []
    assert len(set(pool.everywhere(os.getpid))) == 2  # a process of its own for each slot


def test_workers_tell_the_steps_of_their_shards(store: MemoryStore, pool: Counting) -> None:
    told_by(store, pool.executor)


def test_a_write_outlives_one_of_its_workers(
    store: MemoryStore, pool: Counting, here: Path, worker_folder: Path
) -> None:
    victims = pool.everywhere(os.getpid)[:1]

    def kill_once(_: WriteProgress) -> None:
        while victims:
            os.kill(victims.pop(), signal.SIGKILL)

    store.write(RECORDS, executor=pool, progress=kill_once)
    assert contents(store.path) == contents(here)
    assert left(worker_folder) == []


PARENT = """
import json, os, signal, sys
from loramem import MemoryStore, ray_executor
from loramem.models import shard_sizes

shard_sizes.FILL = 1.2

finished = []

def progress(told):
    if told.proved:
        finished.append(told.shard)
    if len(finished) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

with ray_executor(sys.argv[1], wait_s=60) as pool:
    MemoryStore(sys.argv[2], sys.argv[3]).write(json.loads(sys.argv[4]), executor=pool, progress=progress)
"""


def test_a_write_whose_parent_was_killed_goes_on_with_the_shards_that_were_left(
    cluster: str, base: Path, tmp_path: Path, here: Path
) -> None:
    path = tmp_path / "memory"
    command = [sys.executable, "-c", PARENT, cluster, str(path), str(base), json.dumps(RECORDS)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with MemoryStore(path, create=False) as store, ray_executor(wait_s=60) as executor:
        pool = Counting(executor)
        report = store.resume(executor=pool)
        assert pool.given == [run_job] * (len(report.adapters) - 4)
    assert contents(path) == contents(here)
    assert left(Path(tempfile.gettempdir())) == []


def test_a_write_that_is_cancelled_leaves_nothing(store: MemoryStore, worker_folder: Path) -> None:
    def cancel(_: WriteProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ray_executor() as executor:
        store.write(RECORDS, executor=executor, progress=cancel)
    assert store.discard() == len(RECORDS)
    assert contents(store.path) == {} and not (store.path / "staging").exists()
    assert left(worker_folder) == []


def test_workers_of_another_release_are_refused_before_anything_is_written(store: MemoryStore, pool: Counting) -> None:
    pool.everywhere(pretend, "1.0.0")
    with pytest.raises(OtherRelease, match=r"torch 1\.0\.0") as refused:
        store.write(RECORDS, executor=pool)
    assert refused.value.got == {"torch": "1.0.0"}
    assert store.pending() is None and contents(store.path) == {}


def test_a_cluster_without_a_gpu_has_no_workers_that_need_one() -> None:
    with pytest.raises(NoWorkers, match="no workers"), ray_executor(num_gpus=1):
        pass
