"""One shard from records to a proved adapter on disk: train, save, reload, decode.

A shard is a job: small picklable arguments in, a small result out, nothing shared with other shards. It stages what
it made under a hash of its arguments, so that running it again finds it done.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from loramem._util.files import make_directory, write_directory, write_synced
from loramem._util.layout import RESULT
from loramem.errors import RecallError, StubbornRecords
from loramem.index.rows import StoredAdapter, now
from loramem.models.adapters import AdaptedModel, adapter_id, serialize
from loramem.models.base_model import load_base_model
from loramem.models.certificate import Proof, free_running, prove
from loramem.models.dtypes import Dtype
from loramem.models.ending import Ending
from loramem.models.features import Features
from loramem.models.fingerprint import Fingerprint
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord
from loramem.training.progress import ProgressCallback, Training
from loramem.training.settings import WriterSettings
from loramem.training.shard_training import ShardTraining, as_decoded, features_of, train_shard, with_other_batches

log = logging.getLogger(__name__)

CAUTION = (1.5, 2.0, 2.5)
"""Factors on the deviations between dtypes or batches. What a proof refuses is trained again with the next, and over
what half precision computes in decoding as well: in the batches of the proof, and at last of every record alone."""
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
    dtype: Dtype
    fingerprint: Fingerprint
    serve: tuple[Dtype, ...]
    """Dtypes that the adapter is proved in, of base model and adapter; the base's own beside the adapter as saved."""
    records: tuple[EncodedRecord, ...]
    rank: int
    placement: Placement
    """Where training begins; what does not fit there goes up the ladder."""
    settings: WriterSettings
    staging: Path
    """Folder of the write, in which the job makes one of its own."""
    one_adapter: bool = False
    """Whether all its records must share one, whatever it takes."""
    caution: int = 0
    """Place in `CAUTION` where training begins; later ones follow where a proof refuses what came of it."""

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
            "serve": self.serve,
            "torch": torch.__version__,
            "records": [[entry.prompt_ids, entry.answer_ids] for entry in self.records],
            "rank": self.rank,
            "placement": asdict(self.placement),
            "settings": asdict(self.settings),
            "one_adapter": self.one_adapter,
            "caution": self.caution,
        }
        return self.staging / hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TrainedShard:
    """A proved adapter."""

    adapter: str
    indices: tuple[int, ...]
    """Which of the job's records it holds."""
    training: Training
    placement: Placement
    climbed: bool
    """As in `ShardTraining`."""
    proof: Proof
    served: dict[str, Proof]
    """Proofs in the other dtypes that were asked for."""
    caution: int
    """Place in `CAUTION` of what it was trained with."""

    def proof_in(self, dtype: str) -> Proof:
        """The proof on a base model of this dtype."""
        return self.served.get(dtype, self.proof)


@dataclass(frozen=True)
class ShardResult:
    """What a job came to: one adapter, or two when some records were stubborn, and what could not be certified."""

    shards: tuple[TrainedShard, ...]
    failed: tuple[int, ...]
    """Indices of records that could not be certified, not even on their own."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: str) -> "ShardResult":
        fields = json.loads(content)
        shards = (
            TrainedShard(
                shard["adapter"],
                tuple(shard["indices"]),
                Training(**{**shard["training"], "stubborn": tuple(shard["training"]["stubborn"])}),
                Placement(tuple(shard["placement"]["modules"]), tuple(shard["placement"]["layers"])),
                shard["climbed"],
                _proof(shard["proof"]),
                {dtype: _proof(proof) for dtype, proof in shard["served"].items()},
                shard["caution"],
            )
            for shard in fields["shards"]
        )
        return cls(tuple(shards), tuple(fields["failed"]))


def run_job(job: ShardJob) -> ShardResult:
    """Write a shard in a process of its own; the base model is loaded once per process.

    Raises as `write_shard`, and OtherBaseModel if this process finds or loads another base model.
    """

    def load(dtype: Dtype, adapter_dtype: Dtype | None = None) -> AdaptedModel:
        adapted = _adapted_model(job.location, job.revision, job.device, dtype, adapter_dtype)
        adapted.base.check(asdict(job.fingerprint), job.dtype)
        adapted.base = adapted.base.known_as(job.base_id, job.revision)
        return adapted

    return write_shard(job, load(job.dtype), served={dtype: load(dtype, dtype) for dtype in job.serve})


@lru_cache(maxsize=4)
def _adapted_model(
    location: str, revision: str | None, device: str, dtype: Dtype, adapter_dtype: Dtype | None
) -> AdaptedModel:
    return AdaptedModel(
        load_base_model(location, revision=revision, device=device, dtype=dtype), adapter_dtype=adapter_dtype
    )


def write_shard(
    job: ShardJob,
    adapted: AdaptedModel,
    progress: ProgressCallback | None = None,
    served: Mapping[Dtype, AdaptedModel] | None = None,
) -> ShardResult:
    """Write records into one adapter; stubborn ones get an adapter of their own before they are given up, unless the
    job says that they may not.

    Args:
        served: The base model, adapters cast alike, in each dtype of ``job.serve``.

    Raises:
        TrainingDiverged: See `train_adapter`.
        RecallError, StubbornRecords: The saved adapter does not decode what training certified.
    """
    served = served or {}
    if (done := _finished(job)) is not None:
        log.info("shard of %d records was finished before", len(job.records))
        return done
    shards = list[TrainedShard]()
    remaining = list(range(len(job.records)))
    while remaining:
        shard, stubborn = _write_adapter(job, adapted, served, remaining, progress)
        if shard is not None:
            shards.append(shard)
        given_up = job.one_adapter or len(stubborn) == len(remaining)
        remaining = stubborn
        if given_up:
            break
        if stubborn:
            log.info("%d stubborn records get an adapter of their own", len(stubborn))
    result = ShardResult(tuple(shards), tuple(remaining))
    make_directory(job.folder)
    write_synced(job.folder / RESULT, result.to_json().encode())  # last: a job with a result is whole
    return result


def _write_adapter(
    job: ShardJob,
    adapted: AdaptedModel,
    served: Mapping[Dtype, AdaptedModel],
    indices: Sequence[int],
    progress: ProgressCallback | None,
) -> tuple[TrainedShard | None, list[int]]:
    """A proved adapter of some of the job's records, and which of them it does not hold; None where it holds none.

    What its proof refuses is trained again with the next caution.

    Raises:
        RecallError, StubbornRecords: The saved adapter does not decode what training certified, with all caution.
    """
    models, records = [adapted, *served.values()], [job.records[index] for index in indices]
    features = with_other_batches(models, records, features_of(models, records, job.placement))
    compositions, met = [free_running(records)], 0
    if len(records) > 1:
        compositions.append([[number] for number in range(len(records))])
    rank, placement, spent = job.rank, job.placement, list[Training]()
    for place in range(job.caution, len(CAUTION)):
        if features is not None:
            for batches in compositions[met:place]:
                features = [*features, *as_decoded(models, records, features, batches)]
            met = place
        trained = train_shard(
            adapted,
            UNSAVED,
            records,
            rank,
            placement,
            job.settings if features is not None and len(features) > 1 else _careful(job.settings, place),
            progress,
            features=features,
            adapter_dtypes=[each.adapter_dtype or torch.float32 for each in models],
            caution=CAUTION[place],
            one_adapter=job.one_adapter,
        )
        trained = replace(
            trained, training=trained.training.after(spent), climbed=trained.climbed or placement != job.placement
        )
        failed = set(trained.training.stubborn)
        stubborn = [index for number, index in enumerate(indices) if number in failed]
        certified = [index for number, index in enumerate(indices) if number not in failed]
        if not certified:
            adapted.remove(UNSAVED)
            return None, stubborn
        try:
            whole = features if trained.on_features and not stubborn else None
            return _save_and_prove(job, adapted, served, certified, trained, whole, place), stubborn
        except (RecallError, StubbornRecords) as error:
            if place == len(CAUTION) - 1:
                raise
            log.info("%s; training again with more caution", error)
            spent = [trained.training]  # with what went before it
            if trained.on_features:
                rank, placement = trained.training.rank, trained.placement  # what holds less was tried
            else:
                features = None
    raise AssertionError("a job begins with a caution that there is")


def _careful(settings: WriterSettings, place: int) -> WriterSettings:
    """Where training has no deviations to enlarge, caution shrinks what probabilities may lack of 1."""
    share = CAUTION[0] / CAUTION[place]
    return replace(
        settings,
        certify_threshold=1 - (1 - settings.certify_threshold) * share,
        train_threshold=1 - (1 - settings.train_threshold) * share,
    )


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


def _save_and_prove(
    job: ShardJob,
    adapted: AdaptedModel,
    served: Mapping[Dtype, AdaptedModel],
    indices: Sequence[int],
    trained: ShardTraining,
    features: Sequence[Features] | None,
    caution: int,
) -> TrainedShard:
    """
    Args:
        features: Of just these records, first in the dtypes to be proved in; None where the adapter changes them.
    """
    known = iter(features if features is not None else repeat(None))
    records = [job.records[index] for index in indices]
    files = serialize(adapted.weights(UNSAVED), adapted.base, trained.placement)
    adapter = adapter_id(files, job.namespace)
    write_directory(job.folder / adapter, files)
    adapted.load(adapter, job.folder / adapter)
    adapted.remove(UNSAVED)  # after the load: PEFT is never left without an adapter that it holds for the active one
    proof = _proved(job, adapted, adapter, records, trained.training.rank, next(known))
    proofs = dict[str, Proof]()
    for dtype, model in served.items():
        model.load(adapter, job.folder / adapter)
        proofs[dtype] = _proved(job, model, adapter, records, trained.training.rank, next(known))
        model.remove(adapter)
    return TrainedShard(
        adapter, tuple(indices), trained.training, trained.placement, trained.climbed, proof, proofs, caution
    )


def _proved(
    job: ShardJob,
    adapted: AdaptedModel,
    adapter: str,
    records: Sequence[EncodedRecord],
    rank: int,
    features: Features | None,
) -> Proof:
    """
    Raises:
        RecallError, StubbornRecords: A record is not decoded exactly, or with less certainty than is certified.
    """
    base = adapted.base
    ending = None if features is None else Ending(adapted.model, features, adapted.lora_layers(adapter))
    proof = prove(adapted.model, records, adapter, adapted.dtypes, ending)
    proof.conditions["parameters"] = base.fingerprint.parameters
    if proof.min_prob < job.settings.certify_threshold:
        least = min(range(len(records)), key=proof.min_probs.__getitem__)
        raise StubbornRecords(
            f"As saved, {records[least].record.key!r} has p = {proof.min_prob:.3f} in {base.dtype}, below the "
            f"certified {job.settings.certify_threshold}. Write again with a higher rank.",
            keys=[records[least].record.key],
            rank=rank,
        )
    return proof


def _proof(fields: Mapping[str, Any]) -> Proof:
    return Proof(tuple(fields["min_probs"]), fields["conditions"])


def stored_adapter(job: ShardJob, shard: TrainedShard, cost_bits: float, request: Mapping[str, Any]) -> StoredAdapter:
    """The index row of a proved shard that is staged.

    Args:
        request: How the write was asked for, to rewrite the shard alike: "goal", "rank" and "one_adapter".
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
        placement=asdict(shard.placement),
        training={**training, "settings": asdict(job.settings), "cost_bits": cost_bits, "request": dict(request)},
        proof={
            **shard.proof.conditions,
            "min_prob": shard.proof.min_prob,
            "records": len(shard.indices),
            "served": {
                dtype: {**proof.conditions, "min_prob": proof.min_prob} for dtype, proof in shard.served.items()
            },
        },
        created_at=now(),
    )
