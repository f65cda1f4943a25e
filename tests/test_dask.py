"""A write on a Dask cluster: processes of two threads each that have their own folders and may not open the store."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from loramem import MemoryStore, WriteProgress, dask_executor
from loramem.errors import ArgumentError, NoWorkers, OtherRelease
from loramem.models import shard_sizes
from loramem.planning.pricing import run_pricing
from loramem.workers.clusters import NOWHERE
from loramem.workers.executors import ClusterExecutor
from loramem.workers.worker import run_job, run_tokenizing

from .conftest import numbers
from .test_jobs import contents

RECORDS = numbers(120)  # in shards of two dozen each
MANY = numbers(1000, digits=1)  # of five dozen: what is trained takes most of this file's time


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_sizes, "FILL", 1.2)  # of two dozen records
        yield


@pytest.fixture(scope="module")
def worker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def client(worker_folder: Path) -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            dashboard_address=NOWHERE,
            local_directory=worker_folder / "dask",
            env={"TMPDIR": str(worker_folder)},
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as connected,
    ):
        yield connected


@pytest.fixture(scope="module")
def here(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that this process writes alone."""
    path = tmp_path_factory.mktemp("here") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(RECORDS)
    return path


@pytest.fixture(scope="module")
def many_here(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(MANY)
    return path


@pytest.fixture
def store(client: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    """A new one, by a relative path, which no worker may open."""
    monkeypatch.chdir(tmp_path)
    client.run(forbid, str(tmp_path))
    with MemoryStore("memory", str(base)) as opened:
        yield opened


@pytest.fixture
def pool(client: Any) -> Iterator["Counting"]:
    with dask_executor(client) as executor:
        yield Counting(executor)


class Counting(ClusterExecutor):
    """Counts what it is given of each function, and the bytes of the largest job."""

    def __init__(self, executor: ClusterExecutor) -> None:
        self.executor, self.place, self.lost = executor, executor.place, executor.lost
        self.given: list[Callable[..., Any]] = []
        self.largest = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given.append(fn)
        self.largest = max(self.largest, len(pickle.dumps(args)))
        return self.executor.submit(fn, *args, **kwargs)

    def slots(self) -> int:
        return self.executor.slots()


def forbid(folder: str) -> None:
    """In a worker: whatever opens or lists something in this folder fails, from here on."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir", "os.mkdir") and str(args[0]).startswith(folder):
            raise PermissionError(f"a worker wants {args[0]}")

    sys.addaudithook(hook)


def left(folder: Path) -> list[str]:
    """What workers keep beside what Dask itself does."""
    return [path.name for path in folder.glob("loramem-*")]


def idle(client: Any) -> None:
    """Wait until no worker computes: jobs that were cancelled run to their end."""
    while any(client.run(lambda dask_worker: dask_worker.state.executing_count).values()):
        time.sleep(0.05)


def test_a_cluster_writes_the_same_adapters_as_this_process_and_keeps_nothing(
    store: MemoryStore, pool: Counting, many_here: Path, worker_folder: Path
) -> None:
    told: list[WriteProgress] = []
    report = store.write(MANY, executor=pool, progress=told.append)
    assert (report.written, len(told)) == (len(MANY), len(report.adapters))
    assert contents(store.path) == contents(many_here)
    assert pool.given.count(run_job) == pool.given.count(run_pricing) == len(report.adapters) > 15
    assert pool.given.count(run_tokenizing) == 2
    assert left(worker_folder) == []
    adapters = store.adapters()
    assert {adapter.proof["device"] for adapter in adapters} == {"cpu"}
    assert all(adapter.proof["hardware"] for adapter in adapters)


def told_by(store: MemoryStore, executor: ClusterExecutor) -> None:
    """Write two shards, and see that their steps are told until they are proved."""
    told: list[WriteProgress] = []
    report = store.write(numbers(40), executor=executor, progress=told.append)
    shards = range(1, len(report.adapters) + 1)
    assert len(shards) == 2
    for shard in shards:
        *steps, last = [each for each in told if each.shard == shard]
        assert steps and last.proved and not any(step.proved for step in steps)
        assert all(step.records_total == 40 and step.shards == 2 and step.records == last.records for step in steps)
        assert [step.step for step in steps] == sorted(step.step for step in steps)


def test_workers_tell_the_steps_of_their_shards(client: Any, store: MemoryStore) -> None:
    with dask_executor(client) as executor:
        told_by(store, executor)


def test_metadata_stay_with_the_store(store: MemoryStore, pool: Counting) -> None:
    metadata = {"note": "x" * 100_000}
    store.write([{"key": "with a note", "value": "1", "metadata": metadata}], executor=pool)
    assert pool.largest < 10_000
    assert next(store.records()).metadata == metadata


def test_a_write_outlives_one_of_its_workers(
    client: Any, store: MemoryStore, pool: Counting, here: Path, worker_folder: Path
) -> None:
    victims = list(client.run(os.getpid).values())[:1]

    def kill_once(_: WriteProgress) -> None:
        while victims:
            os.kill(victims.pop(), signal.SIGKILL)

    store.write(RECORDS, executor=pool, progress=kill_once)
    assert contents(store.path) == contents(here)
    assert store.pending() is None
    idle(client)
    assert left(worker_folder) == []  # the job that it was in was run again, after its folder was cleared away


PARENT = """
import json, os, signal, sys
from loramem import MemoryStore, dask_executor
from loramem.models import shard_sizes

shard_sizes.FILL = 1.2

finished = []

def progress(told):
    if told.proved:
        finished.append(told.shard)
    if len(finished) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with dask_executor(sys.argv[1], wait_s=60) as pool:
        MemoryStore(sys.argv[2], sys.argv[3]).write(json.loads(sys.argv[4]), executor=pool, progress=progress)
"""


def test_a_write_whose_parent_was_killed_goes_on_with_the_shards_that_were_left(
    client: Any, base: Path, tmp_path: Path, pool: Counting, here: Path, worker_folder: Path
) -> None:
    path = tmp_path / "memory"
    command = [sys.executable, "-c", PARENT, client.scheduler.address, str(path), str(base), json.dumps(RECORDS)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with MemoryStore(path, create=False) as store:
        assert len(store) == 0
        report = store.resume(executor=pool)
        assert len(report.adapters) > 4 and pool.given == [run_job] * (len(report.adapters) - 2)
    assert contents(path) == contents(here)
    idle(client)
    assert left(worker_folder) == []


def test_a_write_that_is_cancelled_leaves_nothing(
    client: Any, store: MemoryStore, pool: Counting, worker_folder: Path
) -> None:
    def cancel(_: WriteProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(RECORDS, executor=pool, progress=cancel)
    assert store.discard() == len(RECORDS)
    assert contents(store.path) == {} and not (store.path / "staging").exists()
    idle(client)
    assert left(worker_folder) == []


def pretend(release: str | None) -> None:
    """In a worker: another release of torch from here on; None for its own."""
    from loramem.training import jobs
    from loramem.workers import worker

    worker.releases = (lambda: {**jobs.releases(), "torch": release}) if release else jobs.releases


def test_workers_of_another_release_are_refused_before_anything_is_written(
    client: Any, store: MemoryStore, pool: Counting
) -> None:
    client.run(pretend, "1.0.0")
    try:
        with pytest.raises(OtherRelease, match=r"torch 1\.0\.0") as refused:
            store.write(RECORDS, executor=pool)
    finally:
        client.run(pretend, None)
    assert refused.value.got == {"torch": "1.0.0"}
    assert run_job not in pool.given
    assert store.pending() is None and contents(store.path) == {}


def test_a_cluster_without_workers_is_refused_or_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=NOWHERE) as empty,
        distributed.Client(empty, set_as_default=False) as client,
    ):
        with pytest.raises(NoWorkers, match="no workers"), dask_executor(client):
            pass
        with pytest.raises(NoWorkers), dask_executor(client, wait_s=0.1):
            pass
        assert "waiting" in caplog.text


def test_a_local_cluster_is_named_by_its_processes() -> None:
    pytest.importorskip("distributed")
    for name in ("local:", "local:0", "local:many"):
        with pytest.raises(ArgumentError, match="local:4"), dask_executor(name):
            pass


def test_commands_train_on_a_cluster(client: Any, base: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from loramem_cli.main import cli

    def run(*arguments: str) -> None:
        asked = [*arguments, "--store", str(tmp_path / "memory"), "--dask", client.scheduler.address]
        result = CliRunner().invoke(cli, asked, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in numbers(5).items()))
    run("write", str(facts), "--model", str(base), "--batch", "3")
    run("erase", "key 1")
    run("compact", "--all")
    run("verify")
    with MemoryStore(tmp_path / "memory", create=False) as store:
        assert len(store.adapters()) == 1
        assert dict.fromkeys(store) == dict.fromkeys(key for key in numbers(5) if key != "key 1")


def test_a_suite_is_measured_on_a_cluster(client: Any, base: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from loramem_cli.main import cli

    asked = ["suite", "run", "write-scaling", "--quick", "--records", "4,5", "--model", str(base)]
    out = tmp_path / "results.jsonl"
    where = ["--out", str(out), "--dask", client.scheduler.address]
    result = CliRunner().invoke(cli, [*asked, *where], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = list(map(json.loads, out.read_text().splitlines()))
    assert sorted(line["result"]["exact"] for line in lines) == [4, 5]
    assert {line["conditions"]["threads"] for line in lines} == {1}
    again = CliRunner().invoke(cli, [*asked, *where, "--no-run"], catch_exceptions=False)
    assert sorted(again.stdout.splitlines()) == sorted(result.stdout.splitlines())  # in the order in which they came
    refused = CliRunner().invoke(cli, [*asked, *where, "--workers", "2"])
    assert refused.exit_code == 2 and "--workers are of this machine" in refused.output
