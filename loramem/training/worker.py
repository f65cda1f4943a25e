"""A job in a process that has no store: it loads the base model once, and keeps nothing of what it was sent.

One job at a time: which adapter is active is state of the model, so that threads of a worker take turns.
"""

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache

from loramem.errors import OtherRelease
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.dtypes import Dtype
from loramem.training.job_folder import job_folder
from loramem.training.jobs import Delivery, JobBase, PricingJob, ShardJob, releases
from loramem.training.pricing import base_probabilities
from loramem.training.shards import write_shard

DEVICE, MODEL = "LORAMEM_WORKER_DEVICE", "LORAMEM_WORKER_MODEL"
"""Environment of a worker: the device that it takes where the write left it the choice, and where it finds the base
model if not where the store's process does. What it finds there is compared with the store's fingerprint."""
_turn = threading.Lock()


def run_job(job: ShardJob) -> Delivery:
    """Write a shard and hand its files over.

    Raises what `write_shard` raises, and:

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

    Raises what `run_job` raises, training aside.
    """
    _check(job.releases)
    with _turn:
        return base_probabilities(_loaded(job.base, job.base.dtype), job.records, job.placement)


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
