"""One shard from records to a proved adapter on disk: train, save, reload, decode.

A shard is a job: small picklable arguments in, a small result out, nothing shared with other shards. It stages what
it made under a hash of its arguments, so that running it again finds it done.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from loramem.adapters import AdaptedModel, adapter_id, serialize
from loramem.base_model import load_base_model
from loramem.errors import StubbornRecords
from loramem.files import make_directory, write_directory, write_synced
from loramem.fingerprint import Fingerprint
from loramem.placement import Placement
from loramem.prompts import EncodedRecord
from loramem.recall import Proof, prove
from loramem.settings import WriterSettings
from loramem.staging import RESULT
from loramem.tables import StoredAdapter, now
from loramem.writer import ProgressCallback, Training, train_adapter

log = logging.getLogger(__name__)

UNSAVED = "unsaved"  # name of the adapter being trained, inside the model only


@dataclass(frozen=True)
class ShardJob:
    """All that writing a shard takes, for any process that finds the same base model."""

    location: str
    """What `load_base_model` is given: a folder, a Hub id or "loramem-tiny"."""
    base_id: str
    """What the store calls it, and so its adapters."""
    revision: str | None
    device: str
    dtype: str
    fingerprint: Fingerprint
    records: tuple[EncodedRecord, ...]
    rank: int
    placement: Placement
    settings: WriterSettings
    staging: Path
    """Folder of the write, in which the job makes one of its own."""

    @property
    def namespace(self) -> str:
        """Of all its records."""
        return self.records[0].record.namespace

    @cached_property
    def folder(self) -> Path:
        """Where this job stages: a hash of everything that decides its result."""
        arguments = {
            "namespace": self.namespace,
            "base_model": [self.base_id, self.revision],
            "base": asdict(self.fingerprint),
            "device": self.device,
            "dtype": self.dtype,
            "torch": torch.__version__,
            "records": [[entry.prompt_ids, entry.answer_ids] for entry in self.records],
            "rank": self.rank,
            "placement": asdict(self.placement),
            "settings": asdict(self.settings),
        }
        return self.staging / hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Shard:
    """A proved adapter."""

    adapter: str
    indices: tuple[int, ...]
    """Which of the job's records it holds."""
    training: Training
    proof: Proof


@dataclass(frozen=True)
class ShardResult:
    """What a job came to: one adapter, or two when some records were stubborn, and what could not be certified."""

    shards: tuple[Shard, ...]
    failed: tuple[int, ...]
    """Indices of records that could not be certified, not even on their own."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: str) -> "ShardResult":
        fields = json.loads(content)
        shards = (
            Shard(
                shard["adapter"],
                tuple(shard["indices"]),
                Training(**{**shard["training"], "stubborn": tuple(shard["training"]["stubborn"])}),
                Proof(tuple(shard["proof"]["min_probs"]), shard["proof"]["conditions"]),
            )
            for shard in fields["shards"]
        )
        return cls(tuple(shards), tuple(fields["failed"]))


def run_job(job: ShardJob) -> ShardResult:
    """Write a shard in a process of its own; the base model is loaded once per process.

    Raises as `write_shard`, and OtherBaseModel if this process finds or loads another base model.
    """
    adapted = _adapted_model(job.location, job.revision, job.device, job.dtype)
    adapted.base.check(asdict(job.fingerprint), job.dtype)
    adapted.base = adapted.base.known_as(job.base_id, job.revision)
    return write_shard(job, adapted)


@lru_cache(maxsize=1)
def _adapted_model(location: str, revision: str | None, device: str, dtype: str) -> AdaptedModel:
    return AdaptedModel(load_base_model(location, revision=revision, device=device, dtype=dtype))


def write_shard(job: ShardJob, adapted: AdaptedModel, progress: ProgressCallback | None = None) -> ShardResult:
    """Write records into one adapter; stubborn ones get an adapter of their own before they are given up.

    Raises:
        TrainingDiverged: See `train_adapter`.
        RecallError: The saved adapter does not decode what training certified.
    """
    if (done := _finished(job)) is not None:
        log.info("shard of %d records was finished before", len(job.records))
        return done
    shards: list[Shard] = []
    remaining = list(range(len(job.records)))
    while remaining:
        records = [job.records[index] for index in remaining]
        training = train_adapter(adapted, UNSAVED, records, job.rank, job.placement, job.settings, progress)
        stubborn = [remaining[place] for place in training.stubborn]
        certified = [index for index in remaining if index not in set(stubborn)]
        if certified:
            shards.append(_save_and_prove(job, adapted, certified, training))
        else:
            adapted.remove(UNSAVED)
        if len(stubborn) == len(remaining):
            break
        if stubborn:
            log.info("%d stubborn records get an adapter of their own", len(stubborn))
        remaining = stubborn
    result = ShardResult(tuple(shards), tuple(remaining))
    make_directory(job.folder)
    write_synced(job.folder / RESULT, result.to_json().encode())  # last: a job with a result is whole
    return result


def _finished(job: ShardJob) -> ShardResult | None:
    """The result of an earlier run of the same job whose adapters are still what it proved."""
    try:
        result = ShardResult.from_json((job.folder / RESULT).read_text())
        for shard in result.shards:
            files = {path.name: path.read_bytes() for path in (job.folder / shard.adapter).iterdir()}
            if adapter_id(files, job.namespace) != shard.adapter:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result


def _save_and_prove(job: ShardJob, adapted: AdaptedModel, indices: Sequence[int], training: Training) -> Shard:
    records = [job.records[index] for index in indices]
    files = serialize(adapted.weights(UNSAVED), adapted.base, job.placement)
    adapter = adapter_id(files, job.namespace)
    write_directory(job.folder / adapter, files)
    adapted.load(adapter, job.folder / adapter)
    adapted.remove(UNSAVED)  # after the load: PEFT is never left without an adapter that it holds for the active one
    base = adapted.base
    proof = prove(adapted.model, records, adapter, {"base": base.dtype, "adapter": "float32"})
    proof.conditions["parameters"] = base.fingerprint.parameters
    if proof.min_prob < job.settings.certify_threshold:
        least = min(range(len(records)), key=proof.min_probs.__getitem__)
        raise StubbornRecords(
            f"As saved, {records[least].record.key!r} has p = {proof.min_prob:.3f}, below the certified "
            f"{job.settings.certify_threshold}. Write again with a higher rank.",
            keys=[records[least].record.key],
            rank=training.rank,
        )
    return Shard(adapter, tuple(indices), training, proof)


def stored_adapter(job: ShardJob, shard: Shard, cost_bits: float, request: Mapping[str, Any]) -> StoredAdapter:
    """The index row of a proved shard that is staged.

    Args:
        request: How the write was asked for, to rewrite the shard alike: "goal" and "rank".
    """
    folder = job.folder / shard.adapter
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    training: dict[str, Any] = {name: value for name, value in asdict(shard.training).items() if name != "stubborn"}
    return StoredAdapter(
        id=shard.adapter,
        namespace=job.namespace,
        rank=shard.training.rank,
        parameters=shard.training.parameters,
        size_bytes=sum(map(len, files.values())),
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        placement=asdict(job.placement),
        training={**training, "settings": asdict(job.settings), "cost_bits": cost_bits, "request": dict(request)},
        proof={**shard.proof.conditions, "min_prob": shard.proof.min_prob, "records": len(shard.indices)},
        created_at=now(),
    )
