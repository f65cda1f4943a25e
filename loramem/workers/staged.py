"""Finished jobs on the disk of the process that has the store, each in a folder called by what decides its result.

A job that is asked for again is found done, whoever ran it. What a worker delivers is taken for nothing more than
bytes that say what they are: it is staged once it was compared with the job.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from loramem._util.files import sync_directory, sync_tree, write_directory
from loramem._util.layout import RESULT
from loramem.errors import RefusedResult
from loramem.models.adapter_header import CONFIG, WEIGHTS
from loramem.models.adapters import CARD, adapter_id, config_content
from loramem.training.jobs import Delivery, ShardJob, ShardResult, TrainedShard

log = logging.getLogger(__name__)


def folder_of(staging: Path, job: ShardJob) -> Path:
    """Where a job's adapters and, once it is finished, its result are."""
    return staging / job.identity


def find(staging: Path, job: ShardJob) -> ShardResult | None:
    """The result of an earlier run of the same job whose adapters are still what it proved."""
    folder = folder_of(staging, job)
    try:
        result = ShardResult.from_json((folder / RESULT).read_text())
        for shard in result.shards:
            files = {path.name: path.read_bytes() for path in (folder / shard.adapter).iterdir()}
            if adapter_id(files, job.namespace) != shard.adapter:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log.info("shard of %d records was finished before", len(job.records))
    return result


def finish(staging: Path, job: ShardJob, result: ShardResult) -> None:
    """Note the result of a job whose adapters are in its folder; it is on disk once `sync` was there."""
    folder = folder_of(staging, job)
    write_directory(folder, {RESULT: result.to_json().encode()})  # last; a torn one is no JSON


def sync(staging: Path, job: ShardJob) -> None:
    """Put a finished job on disk: what a power cut tears before is found not to be what was proved."""
    sync_tree(folder_of(staging, job))
    sync_directory(staging)


def keep(staging: Path, job: ShardJob, delivery: Delivery) -> ShardResult:
    """Stage what a worker made of a job, but for `sync`.

    Raises:
        RefusedResult: It is not what the job asked for, or the files are not those that it says were proved.
    """
    if (wrong := _fault(job, delivery)) is not None:
        raise RefusedResult(
            f"A worker returned for a shard of {len(job.records)} records {wrong}. Nothing was committed. Look at the "
            "workers' memory and network, then go on with loramem write --resume.",
            what=wrong,
        )
    for adapter, files in delivery.files.items():
        write_directory(folder_of(staging, job) / adapter, dict(files))
    finish(staging, job, delivery.result)
    return delivery.result


def _fault(job: ShardJob, delivery: Delivery) -> str | None:
    """What of a delivery is not as the job has it, in words."""
    result, files = delivery.result, delivery.files
    held = sorted([*result.failed, *(index for shard in result.shards for index in shard.indices)])
    if held != list(range(len(job.records))):
        return "other records than were sent"
    if sorted(files) != sorted(shard.adapter for shard in result.shards):
        return "other adapters than its result names"
    return next((wrong for shard in result.shards if (wrong := _fault_of(job, shard, files[shard.adapter]))), None)


def _fault_of(job: ShardJob, shard: TrainedShard, files: Mapping[str, bytes]) -> str | None:
    if sorted(files) != sorted((WEIGHTS, CONFIG, CARD)):
        return "other files than those of an adapter"
    if adapter_id(dict(files), job.namespace) != shard.adapter:
        return "an adapter whose bytes are not what it proved"
    if files[CONFIG] != config_content(shard.training.rank, shard.placement, job.base.id, job.base.revision):
        return "an adapter of another form than its result says"
    if set(shard.served) != set(job.serve):
        return "proofs in other dtypes than were asked for"
    for proof in (shard.proof, *shard.served.values()):
        if len(proof.min_probs) != len(shard.indices):
            return "a proof of other records"
        low = [prob for prob in proof.min_probs if not prob >= job.settings.certify_threshold]  # NaN is not
        if low:
            return f"a proof at p = {low[0]:.3f}, below what is certified"
    if job.base.fingerprint.parameters not in ("", shard.proof.conditions["parameters"]):
        return "a proof on other weights of the base model"
    return None
