"""A job in a process that has no store: it loads the base model once, and keeps nothing of what it was sent.

One job at a time: which adapter is active is state of the model, so that threads of a worker take turns.
"""

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from loramem.errors import OtherRelease
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.decoding import greedy_decode
from loramem.models.dtypes import Dtype
from loramem.records.prompts import Tokenized, tokenize
from loramem.training.jobs import DecodingJob, Delivery, JobBase, ShardJob, TokenizingJob, releases
from loramem.training.shards import write_shard
from loramem.workers.job_folder import job_folder
from loramem.workers.steps import Teller

DEVICE, MODEL = "LORAMEM_WORKER_DEVICE", "LORAMEM_WORKER_MODEL"
"""Environment of a worker: the device that it takes where the write left it the choice, and where it finds the base
model if not where the store's process does. What it finds there is compared with the store's fingerprint."""
_turn = threading.Lock()


def run_job(job: ShardJob, teller: Teller | None = None) -> Delivery:
    """Write a shard and hand its files over.

    Args:
        teller: Tells how far it is.

    Raises what `write_shard` and `base_model` raise.
    """
    with base_model(job.base, job.releases) as adapted, job_folder() as folder:
        served = {dtype: _loaded(job.base, dtype, dtype) for dtype in job.serve}
        result = write_shard(job, folder, adapted, None if teller is None else teller.of(job), served)
        files = dict[str, Mapping[str, bytes]]()
        for shard in result.shards:
            adapted.remove(shard.adapter)
            files[shard.adapter] = {path.name: path.read_bytes() for path in (folder / shard.adapter).iterdir()}
    return Delivery(result, files)


def run_tokenizing(job: TokenizingJob) -> list[Tokenized]:
    """`loramem.records.prompts.tokenize` of a job's records.

    Raises what that and `base_model` raise.
    """
    with base_model(job.base, job.releases) as adapted:
        base = adapted.base
        return tokenize(job.records, base.tokenizer, job.template, base.max_tokens, base.unreachable, base.vocabulary)


def run_decoding(job: DecodingJob) -> list[list[list[int]]]:
    """Of every prompt of every batch what the adapter gives, without the end token.

    Raises what `base_model` raises.
    """
    with base_model(job.base, job.releases) as adapted, job_folder() as folder:
        for name, content in job.files.items():
            (folder / Path(name).name).write_bytes(content)
        adapted.load(job.adapter, folder)
        try:
            return [greedy_decode(adapted.model, batch.prompts, batch.most, job.end_id) for batch in job.batches]
        finally:
            adapted.remove(job.adapter)


@contextmanager
def base_model(base: JobBase, expected: Mapping[str, str] | None) -> Iterator[AdaptedModel]:
    """The base model of a job, for this thread alone.

    Args:
        expected: Releases that the process that asks has.

    Raises:
        OtherRelease: This process has another release of a library.
        OtherBaseModel: It finds or loads another base model.
        BaseModelNotFound: It finds none.
    """
    check_releases(expected)
    with _turn:
        yield _loaded(base, base.dtype)


def check_releases(expected: Mapping[str, str] | None) -> None:
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
