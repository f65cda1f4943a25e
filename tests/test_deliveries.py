"""What a worker hands over is compared with its job before anything of it is staged; its folder goes in any case."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from loramem.errors import OtherBaseModel, OtherRelease, RefusedResult
from loramem.models.adapter_header import CONFIG, WEIGHTS
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.placement import Placement
from loramem.records.prompts import encode_records
from loramem.records.record import as_records
from loramem.training.jobs import Delivery, JobBase, ShardJob, ShardResult, TrainedShard, releases
from loramem.training.settings import WriterSettings
from loramem.workers import staged, worker
from loramem.workers.executors import run_jobs
from loramem.workers.job_folder import PREFIX, job_folder, remove_abandoned

from .conftest import numbers


@pytest.fixture(scope="module")
def job(base: Path) -> ShardJob:
    loaded = load_base_model(str(base))
    entries = encode_records(as_records(numbers(3)), loaded.tokenizer, loaded.template, loaded.max_tokens)
    return ShardJob(
        base=JobBase.of(loaded),
        serve=("bfloat16",),
        records=tuple(entry.bare() for entry in entries),
        rank=4,
        placement=Placement.ladder(loaded.model)[0],
        settings=WriterSettings(),
        releases=releases(),
    )


@pytest.fixture(scope="module")
def delivery(job: ShardJob) -> Delivery:
    return worker.run_job(job)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where jobs have their folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def with_shard(delivery: Delivery, change: Callable[[TrainedShard], TrainedShard]) -> Delivery:
    (shard,) = delivery.result.shards
    return replace(delivery, result=ShardResult((change(shard),), delivery.result.failed))


def with_files(delivery: Delivery, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Delivery:
    return replace(delivery, files={adapter: change(dict(files)) for adapter, files in delivery.files.items()})


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_delivery_is_staged_as_it_was_proved_and_found_again(
    job: ShardJob, delivery: Delivery, tmp_path: Path
) -> None:
    assert staged.find(tmp_path, job) is None
    result = staged.keep(tmp_path, job, delivery)
    assert result == delivery.result == staged.find(tmp_path, job)


def test_what_was_staged_before_is_on_disk_before_it_is_taken(
    job: ShardJob, delivery: Delivery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged.keep(tmp_path, job, delivery)  # and killed before it was synced
    synced, fsync = list[Path](), os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with ThreadPoolExecutor(1) as nobody, pytest.MonkeyPatch.context() as patched:
        patched.setattr(nobody, "submit", None)
        model = cast("AdaptedModel", None)
        assert run_jobs([job], tmp_path, model, {}, nobody) == [delivery.result]
    folder = staged.folder_of(tmp_path, job)
    assert {folder, *folder.rglob("*"), tmp_path} <= set(synced)


CHANGES: dict[str, Callable[[Delivery], Delivery]] = {
    "bytes are not": lambda it: with_files(it, lambda files: {**files, WEIGHTS: flipped(files[WEIGHTS])}),
    "bytes": lambda it: with_files(it, lambda files: {**files, CONFIG: files[CONFIG] + b" "}),
    "other files": lambda it: with_files(it, lambda files: {**files, "../../outside": b""}),
    "another form": lambda it: with_shard(it, lambda shard: replace(shard, training=replace(shard.training, rank=9))),
    "other records": lambda it: with_shard(it, lambda shard: replace(shard, indices=(0, 1))),
    "other adapters": lambda it: replace(it, files={**it.files, "../outside": {}}),
    "other dtypes": lambda it: with_shard(it, lambda shard: replace(shard, served={})),
    "a proof of other records": lambda it: with_shard(
        it, lambda shard: replace(shard, proof=replace(shard.proof, min_probs=(0.9,)))
    ),
    "below what is certified": lambda it: with_shard(
        it, lambda shard: replace(shard, proof=replace(shard.proof, min_probs=(0.9, 0.9, float("nan"))))
    ),
    "other weights": lambda it: with_shard(
        it, lambda shard: replace(shard, proof=replace(shard.proof, conditions={"parameters": "another"}))
    ),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_delivery_that_is_not_what_the_job_asked_for_is_refused(
    job: ShardJob, delivery: Delivery, tmp_path: Path, said: str
) -> None:
    with pytest.raises(RefusedResult, match=said):
        staged.keep(tmp_path, job, CHANGES[said](delivery))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_refuses_what_it_cannot_do_and_keeps_nothing(
    job: ShardJob, temporary: Path, base_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OtherRelease, match="peft"):
        worker.run_job(replace(job, releases={**releases(), "peft": "0.1"}))
    monkeypatch.setenv(worker.MODEL, str(base_of("qwen3", seed=1)))
    with pytest.raises(OtherBaseModel):
        worker.run_job(job)
    assert list(temporary.iterdir()) == []


def test_a_worker_may_have_the_base_model_in_another_place(
    job: ShardJob, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(worker.MODEL, job.base.location)
    moved = replace(job, base=replace(job.base, location="/nowhere"))
    assert worker.run_job(moved).files == delivery.files


KILLED = """
import os, signal, sys
from loramem.workers.executors import run_jobs
from loramem.workers.job_folder import job_folder

with job_folder() as folder:
    (folder / "value").write_text("secret")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(temporary))
    with job_folder() as mine:
        assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == -signal.SIGKILL
        assert len(list(temporary.glob(PREFIX + "*/value"))) == 1
        remove_abandoned()
        assert list(temporary.iterdir()) == [mine]
        assert mine.stat().st_mode & 0o077 == 0
    assert list(temporary.iterdir()) == []
