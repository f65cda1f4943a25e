"""A write of several shards: jobs that any executor runs, that resume, and that only the parent commits."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramem import MemoryStore
from loramem.errors import StubbornRecords, WorkerLost
from loramem.models import shard_sizes
from loramem.models.placement import Placement
from loramem.training import shards
from loramem.training.jobs import JobBase, ShardJob
from loramem.workers.executors import process_pool
from loramem.workers.worker import run_job

from .conftest import numbers

RECORDS = numbers(9)


class Inline(Executor):
    """Runs what is submitted at once, on what a process would receive: a pickled copy."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.ran: list[Callable[..., Any]] = []
        """Jobs that wrote a shard."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        content = pickle.dumps((fn, args, kwargs))
        self.sizes.append(len(content))
        self.ran += [fn] if fn is run_job else []
        function, args, kwargs = pickle.loads(content)
        future: Future[Any] = Future()
        try:
            future.set_result(pickle.loads(pickle.dumps(function(*args, **kwargs))))
        except Exception as error:
            future.set_exception(pickle.loads(pickle.dumps(error)))
        return future


linux_only = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_sizes.Size, "shard_tokens", lambda *_: 15)  # three records of four digits


def contents(store: Path) -> dict[str, bytes]:
    """Weights and configs of a store's adapters by name."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted((store / "adapters").rglob("*"))
        if path.is_file()
    }


def test_an_executor_writes_the_same_adapters_as_this_process(base: Path, tmp_path: Path) -> None:
    told, executor = [], Inline()
    with MemoryStore(tmp_path / "here", str(base)) as here, MemoryStore(tmp_path / "there", str(base)) as there:
        here.write(RECORDS)
        report = there.write(RECORDS, executor=executor, progress=told.append)
        assert len(report.adapters) == 3
        assert {recall.key: recall.value for recall in there.recall_many()} == RECORDS
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert sorted((progress.shard, progress.shards) for progress in told) == [(1, 3), (2, 3), (3, 3)]
    assert all(progress.tokens_ordered == progress.tokens_total == 15 for progress in told)
    assert max(executor.sizes) < 20_000


def test_spawned_processes_write_shards(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store, process_pool(2) as pool:
        assert len(store.write(RECORDS, executor=pool).adapters) == 3
        assert {recall.key: recall.value for recall in store.recall_many()} == RECORDS


PARENT = """
import os, time
from loramem.workers.executors import process_pool

if __name__ == "__main__":
    with process_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@linux_only
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        parent.kill()
    deadline = time.monotonic() + 20
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(worker)


def running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be collected."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_staging_is_empty_after_a_write(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(RECORDS)
    assert not (tmp_path / "memory" / "staging").exists()


WRITER = """
import json, os, signal, sys
from loramem import MemoryStore
from loramem.models import shard_sizes

shard_sizes.Size.shard_tokens = lambda *_: 15

def progress(told):
    if told.shard == 3:
        os.kill(os.getpid(), signal.SIGKILL)

MemoryStore(sys.argv[1], sys.argv[2]).write(json.loads(sys.argv[3]), progress=progress)
"""


@pytest.fixture(scope="module")
def killed_once(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed") / "memory"
    command = [sys.executable, "-c", WRITER, str(path), str(base), json.dumps(RECORDS)]
    assert subprocess.run(command, env=os.environ, check=False).returncode == -signal.SIGKILL
    return path


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A store whose write was killed in the third of three shards."""
    return shutil.copytree(killed_once, tmp_path / "memory")


def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each training was given, from here on."""
    seen: list[int] = []
    train = shards.train_shard

    def counted(adapted: Any, name: str, records: Any, *rest: Any, **named: Any) -> Any:
        seen.append(len(records))
        return train(adapted, name, records, *rest, **named)

    monkeypatch.setattr(shards, "train_shard", counted)
    return seen


def test_resuming_keeps_the_shards_that_were_finished(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = trained(monkeypatch)
    with MemoryStore(killed, create=False) as store:
        assert store.resume().written == 9
        assert seen == [3]
        assert {recall.key: recall.value for recall in store.recall_many()} == RECORDS
        assert store.verify().ok


def test_a_staged_adapter_that_was_damaged_is_written_again(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = next((killed / "staging").glob("*/*/adapter_model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    seen = trained(monkeypatch)
    with MemoryStore(killed, create=False) as store:
        store.resume()
        assert seen == [3, 3]
        assert store.verify().ok


def test_discarding_removes_what_was_staged(killed: Path) -> None:
    assert list((killed / "staging").iterdir())
    with MemoryStore(killed, create=False) as store:
        store.discard()
    assert not (killed / "staging").exists()


def test_one_failed_shard_commits_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Inline):
        """The second job of three fails."""

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            if fn is not run_job or not self.ran or len(self.ran) > 1:
                return super().submit(fn, *args, **kwargs)
            self.ran.append(fn)
            future: Future[Any] = Future()
            future.set_exception(StubbornRecords("record 4 could not be certified", keys=["key 4"], rank=1))
            return future

    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with pytest.raises(StubbornRecords):
            store.write(RECORDS, executor=Failing())
        assert len(store) == 0
        assert store.pending() is None
    assert not (tmp_path / "memory" / "staging").exists()
    assert contents(tmp_path / "memory") == {}


def test_a_lost_worker_leaves_a_write_that_goes_on(base: Path, tmp_path: Path) -> None:
    class Dying(Inline):
        """The worker is gone before the second job."""

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            if fn is not run_job or not self.ran:
                return super().submit(fn, *args, **kwargs)
            future: Future[Any] = Future()
            future.set_exception(BrokenExecutor("gone"))
            return future

    with MemoryStore(tmp_path / "memory", str(base)) as store:
        with pytest.raises(WorkerLost, match="--resume"):
            store.write(RECORDS, executor=Dying())
        assert len(store) == 0
        assert store.stats().unfinished_records == 9
        assert store.resume().written == 9


def test_the_same_records_and_settings_are_the_same_job(base: Path) -> None:
    from loramem.models.base_model import load_base_model
    from loramem.records.prompts import encode_records
    from loramem.records.record import as_records

    loaded = load_base_model(str(base))
    entries = tuple(encode_records(as_records(RECORDS), loaded.tokenizer, loaded.template, loaded.max_tokens))
    job = ShardJob(
        base=JobBase.of(loaded),
        serve=("bfloat16",),
        records=entries,
        rank=2,
        placement=Placement(("down_proj",), (1,)),
        settings=shards.WriterSettings(),
    )
    elsewhere = replace(job, base=replace(job.base, device="cuda", location="/another/place"), releases={"torch": "3"})
    assert replace(job).identity == elsewhere.identity == job.identity
    changed = [
        replace(job, rank=3),
        replace(job, records=entries[1:]),
        replace(job, settings=shards.WriterSettings(seed=1)),
        replace(job, placement=Placement(("down_proj",), (2,))),
        replace(job, base=replace(job.base, dtype="bfloat16")),
        replace(job, serve=()),
    ]
    assert len({job.identity, *(other.identity for other in changed)}) == 7
