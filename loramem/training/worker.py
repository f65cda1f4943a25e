"""A job in a process that has no store: it loads the base model once, and keeps nothing of what it was sent.

One job at a time: which adapter is active is state of the model, so that threads of a worker take turns. What is saved
for the proof lies in a temporary folder (``TMPDIR``) that goes with the job; a process that was killed in one leaves it
to the next job on that host, which removes it.
"""

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from loramem.errors import OtherRelease
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.dtypes import Dtype
from loramem.training.jobs import Delivery, JobBase, PricingJob, ShardJob, releases
from loramem.training.pricing import base_probabilities
from loramem.training.shards import write_shard

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays until somebody removes it
    fcntl = None  # type: ignore[assignment]

DEVICE, MODEL = "LORAMEM_WORKER_DEVICE", "LORAMEM_WORKER_MODEL"
"""Environment of a worker: the device that it takes where the write left it the choice, and where it finds the base
model if not where the store's process does. What it finds there is compared with the store's fingerprint."""
FOLDER, UNLOCKED = "loramem-job-", "loramem-new-"
_turn = threading.Lock()


def run_job(job: ShardJob) -> Delivery:
    """Write a shard and hand its files over.

    Raises as `write_shard`, and:

    Raises:
        OtherRelease: This process has another release of a library than the one that asks.
        OtherBaseModel: It finds or loads another base model.
        BaseModelNotFound: It finds none.
    """
    _check(job.releases)
    with _turn, job_folder() as folder:
        adapted = _loaded(job.base, job.base.dtype)
        served = {dtype: _loaded(job.base, dtype, dtype) for dtype in job.serve}
        result = write_shard(job, folder, adapted, served=served)
        files = dict[str, Mapping[str, bytes]]()
        for shard in result.shards:
            adapted.remove(shard.adapter)
            files[shard.adapter] = {path.name: path.read_bytes() for path in (folder / shard.adapter).iterdir()}
    return Delivery(result, files)


def price(job: PricingJob) -> list[list[float]]:
    """`base_probabilities` of a job's records.

    Raises as `run_job`, training aside.
    """
    _check(job.releases)
    with _turn:
        return base_probabilities(_loaded(job.base, job.base.dtype), job.records, job.placement)


@contextmanager
def job_folder() -> Iterator[Path]:
    """A folder for one job, private, gone after it; those of killed processes are removed first."""
    if fcntl is not None:
        for left in Path(tempfile.gettempdir()).glob(FOLDER + "*"):
            _remove_if_abandoned(left)
    made = Path(tempfile.mkdtemp(prefix=UNLOCKED))
    descriptor = _lock(made)
    # Under this name only once it is locked, or it would look abandoned.
    folder = made.rename(made.with_name(FOLDER + made.name.removeprefix(UNLOCKED)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """An open descriptor that locks a folder until it is closed, or the process ends; None where there is no such."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody has it
        os.close(descriptor)
        raise
    return descriptor


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):  # in use, somebody else's, or gone
        descriptor = _lock(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _check(expected: Mapping[str, str] | None) -> None:
    """
    Raises:
        OtherRelease: Libraries here are of another release.
    """
    if expected is None or (found := releases()) == expected:
        return
    others = {name: release for name, release in found.items() if release != expected.get(name)}
    host = socket.gethostname()
    said = ", ".join(f"{name} {release} (here {expected.get(name)})" for name, release in others.items())
    raise OtherRelease(
        f"The worker on {host} has {said}. Install the same releases there (a build for another device, +cu130, is no "
        "other release).",
        expected={name: expected.get(name, "") for name in others},
        got=others,
        host=host,
    )


def _loaded(wanted: JobBase, dtype: Dtype, adapter_dtype: Dtype | None = None) -> AdaptedModel:
    location = os.environ.get(MODEL) or wanted.location
    device = (os.environ.get(DEVICE) or "auto") if wanted.device == "auto" else wanted.device
    adapted = _adapted_model(location, wanted.revision, device, dtype, adapter_dtype)
    adapted.base.check(asdict(wanted.fingerprint), wanted.dtype)
    adapted.base = adapted.base.known_as(wanted.id, wanted.revision)
    return adapted


@lru_cache(maxsize=4)
def _adapted_model(
    location: str, revision: str | None, device: str, dtype: Dtype, adapter_dtype: Dtype | None
) -> AdaptedModel:
    return AdaptedModel(
        load_base_model(location, revision=revision, device=device, dtype=dtype), adapter_dtype=adapter_dtype
    )
