"""One shard from records to a proved adapter on disk: train, save, reload, decode.

The folder it is saved to is the caller's: in staging for a process that has the store, a temporary one in a worker.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from loramem._util.files import write_directory
from loramem.errors import RecallError, StubbornRecords
from loramem.index.rows import StoredAdapter, now
from loramem.models.adapters import AdaptedModel, adapter_id, rank_choices, serialize
from loramem.models.batches import Batches
from loramem.models.certificate import Proof, free_running, in_doubt, prove
from loramem.models.dtypes import Dtype
from loramem.models.ending import Ending
from loramem.models.features import Features
from loramem.records.contexts import asked_in_contexts, owners
from loramem.records.prompts import EncodedRecord
from loramem.training.jobs import ShardJob, ShardResult, TrainedShard
from loramem.training.keeping import first_rank
from loramem.training.kept import harmed, measure, misses, shown
from loramem.training.neutral import Material
from loramem.training.neutral import material as neutral_material
from loramem.training.progress import ProgressCallback, Training
from loramem.training.settings import WriterSettings
from loramem.training.shard_training import (
    ShardTraining,
    as_decoded,
    features_of,
    outcomes_of,
    train_shard,
    with_other_batches,
)

log = logging.getLogger(__name__)

CAUTION = (1.5, 2.0, 2.5)
"""Factors on the deviations between dtypes or batches. What a proof refuses is trained again with the next, and over
what half precision computes in decoding as well: in the batches of the proof, and at last of every record alone that a
proof refused or was least certain of."""
MOST_REFUSALS = 3
"""How often a job sets apart what a proof refuses with all caution: beyond that it is no matter of single records."""
UNSAVED = "unsaved"  # name of the adapter being trained, inside the model only


def write_shard(
    job: ShardJob,
    folder: Path,
    adapted: AdaptedModel,
    progress: ProgressCallback | None = None,
    served: Mapping[Dtype, AdaptedModel] | None = None,
) -> ShardResult:
    """Write records into one adapter; stubborn ones, and those that a proof refuses whatever was tried, get an adapter
    of their own before they are given up, unless the job says that they may not.

    Args:
        folder: Where adapters are saved, each in a folder that is called by its id, and loaded from for their proof.
        served: The base model, adapters cast alike, in each dtype of ``job.serve``.

    Raises:
        TrainingDiverged: See `train_adapter`.
        RecallError, StubbornRecords: The saved adapter does not decode what training certified, and it is not a matter
            of single records.
    """
    served = served or {}
    shards, failed, refusals = list[TrainedShard](), list[int](), 0
    groups = [(list(range(len(job.records))), job.caution)]
    while groups:
        indices, caution = groups.pop(0)
        try:
            shard, stubborn = _keeping_adapter(job, folder, adapted, served, indices, progress, caution)
        except (RecallError, StubbornRecords) as error:
            keys = error.keys if isinstance(error, StubbornRecords) else [error.key]
            apart = [index for index in indices if job.records[index].record.key in keys]
            if len(apart) == len(indices) < len(job.records):  # it has been set apart before
                failed.extend(indices)
                continue
            if job.one_adapter or not 0 < len(apart) < len(indices) or refusals == MOST_REFUSALS:
                raise
            log.info("%d records that the proof refuses get an adapter of their own", len(apart))  # errors name keys
            others = [index for index in indices if index not in apart]
            groups[:0] = [(others, len(CAUTION) - 1), (apart, job.caution)]  # the others came through all of it before
            refusals += 1
            continue
        if shard is not None:
            shards.append(shard)
            continue
        # Without them the others are trained anew: what was trained on a record keeps traces of it that no erase finds.
        if len(stubborn) < len(indices):
            groups.insert(0, ([index for index in indices if index not in stubborn], caution))
        if job.one_adapter or len(stubborn) == len(indices):
            failed.extend(stubborn)
        else:
            log.info("%d stubborn records get an adapter of their own", len(stubborn))
            groups.append((stubborn, job.caution))
    return ShardResult(tuple(shards), tuple(failed))


def _keeping_adapter(
    job: ShardJob,
    folder: Path,
    adapted: AdaptedModel,
    served: Mapping[Dtype, AdaptedModel],
    indices: Sequence[int],
    progress: ProgressCallback | None,
    caution: int,
) -> tuple[TrainedShard | None, list[int]]:
    """`_write_adapter`, which leaves as much of the base as the job asks for.

    Raises:
        BaseHarmed: It does not, at any rank that may be tried.
    """
    keep, first, most = job.settings.keep_base, job.rank, job.settings.max_rank
    if keep is not None and keep.neurons is None:
        asked = {(record := job.records[index].record).question_of or record.key for index in indices}
        first = min(first_rank(adapted, len(asked), bool(keep.unknown)), most)
    for rank in rank_choices(first, max(first, most)):
        shard, stubborn = _write_adapter(job, folder, adapted, served, indices, progress, caution, rank)
        if keep is None or shard is None or shard.kept is None or not (missed := misses(shard.kept, keep)):
            break
        log.info("at rank %d more of the base is changed than is allowed: %s", rank, shown(missed))
        if keep.on_miss == "report":
            break
        if keep.on_miss == "fail" or shard.training.rank >= most or shard.training.rank < rank:
            raise harmed(missed, shard.training.rank)
    return shard, stubborn


def _write_adapter(
    job: ShardJob,
    folder: Path,
    adapted: AdaptedModel,
    served: Mapping[Dtype, AdaptedModel],
    indices: Sequence[int],
    progress: ProgressCallback | None,
    caution: int,
    rank: int,
) -> tuple[TrainedShard | None, list[int]]:
    """A proved adapter of some of the job's records, or None and those that training could not certify.

    What its proof refuses is trained on with the next caution.

    Args:
        caution: To begin with, of `CAUTION`.

    Raises:
        RecallError, StubbornRecords: The saved adapter does not decode what training certified, with all caution.
    """
    models, records = [adapted, *served.values()], [job.records[index] for index in indices]
    proved = [*records, *asked_in_contexts(records)]
    rounding = [each for each in models if each.base.dtype == "q8_0"]
    exact = [each for each in models if each not in rounding]
    keep = job.settings.keep_base
    material = None
    if keep is not None:
        material = neutral_material(adapted, records, keep, job.settings.seed, job.settings.contexts)
    taught = [*proved, *(() if material is None else material.refusals)]
    features = with_other_batches(exact, taught, features_of(exact, taught, job.placement))
    outcomes = list[Features]()
    if features is not None and (rounding or adapted.base.rounds_inputs):
        outcomes = outcomes_of((rounding or [adapted])[0], taught)
    owner = owners(records)
    doubtful, met = {number for number, record in enumerate(owner) if indices[record] in job.doubtful}, 0
    placement, spent, refused = job.placement, list[Training](), None
    for place in range(caution, len(CAUTION)):
        if features is not None:
            for batches in _decoded_batches(proved, doubtful)[met:place]:
                features = [*features, *as_decoded(exact, taught, features, batches)]
                outcomes += as_decoded(rounding, taught, outcomes, batches)
            met = place
        trained = train_shard(
            adapted,
            UNSAVED,
            taught,
            rank,
            placement,
            job.settings
            if features is not None and len(features) + len(outcomes) > 1
            else _careful(job.settings, place),
            progress,
            features=features,
            adapter_dtypes=[each.adapter_dtype or torch.float32 for each in models],
            caution=CAUTION[place],
            outcomes=outcomes,
            one_adapter=job.one_adapter,
            neutral=None if material is None else material.trained,
            begin_at=refused,
        )
        trained = replace(
            trained, training=trained.training.after(spent), climbed=trained.climbed or placement != job.placement
        )
        # A refusal that is stubborn is no record.
        held_back = {owner[number] for number in trained.training.stubborn if number < len(proved)}
        stubborn = [indices[record] for record in sorted(held_back)]
        if stubborn:
            adapted.remove(UNSAVED)
            return None, stubborn
        weights = {name: weight.clone() for name, weight in adapted.weights(UNSAVED).items()}
        try:
            whole = dict[Dtype, Features]()
            if features is not None and trained.on_features:
                count = sum(len(record.answer_ids) for record in proved)
                whole = {each.base.dtype: known.first(count) for each, known in zip(exact, features, strict=False)}
                whole |= {each.base.dtype: outcomes[0].first(count) for each in rounding}
            return _save_and_prove(job, folder, adapted, served, indices, trained, whole, place, material), []
        except (RecallError, StubbornRecords) as error:
            if place == len(CAUTION) - 1:
                raise
            log.info("%s; training goes on with more caution", type(error).__name__)  # its text names a key
            spent = [trained.training]  # with what went before it
            named = {*error.doubtful, *(error.keys if isinstance(error, StubbornRecords) else [error.key])}
            doubtful |= {number for number, record in enumerate(proved) if record.record.key in named}
            if trained.on_features:
                rank, placement = trained.training.rank, trained.placement  # what holds less was tried
                refused = weights  # nearly all of it holds
            else:
                features = refused = None
    raise AssertionError("a job begins with a caution that there is")


def _decoded_batches(records: Sequence[EncodedRecord], doubtful: Collection[int]) -> list[Batches]:
    """In which batches more and more cautious tries decode, by index; alone those that are doubtful."""
    alone = [[number] for number in sorted(doubtful)] if len(records) > 1 else []
    return [free_running(records), *([alone] if alone else [])]


def _careful(settings: WriterSettings, place: int) -> WriterSettings:
    """Where training has no deviations to enlarge, caution shrinks what probabilities may lack of 1."""
    share = CAUTION[0] / CAUTION[place]
    return replace(
        settings,
        certify_threshold=1 - (1 - settings.certify_threshold) * share,
        train_threshold=1 - (1 - settings.train_threshold) * share,
    )


def _save_and_prove(
    job: ShardJob,
    folder: Path,
    adapted: AdaptedModel,
    served: Mapping[Dtype, AdaptedModel],
    indices: Sequence[int],
    trained: ShardTraining,
    features: Mapping[Dtype, Features],
    caution: int,
    material: Material | None,
) -> TrainedShard:
    """
    Args:
        features: Of just these records, then of them in their chats, in the dtypes to be proved in; none where the
            adapter changes them.
        material: What is measured of the base that it leaves, if that is asked for.
    """
    records = [job.records[index] for index in indices]
    files = serialize(adapted.weights(UNSAVED), adapted.base, trained.placement)
    adapter = adapter_id(files, job.namespace)
    write_directory(folder / adapter, files)
    adapted.load(adapter, folder / adapter)
    adapted.remove(UNSAVED)  # after the load: PEFT is never left without an adapter that it holds for the active one
    proofs = dict[str, Proof]()
    for dtype, model in reversed(list(served.items())):  # what rounds most is named last, and refuses most
        model.load(adapter, folder / adapter)
        proofs[dtype] = _proved(job, model, adapter, records, trained.training.rank, features.get(dtype))
        model.remove(adapter)
    proof = _proved(job, adapted, adapter, records, trained.training.rank, features.get(adapted.base.dtype))
    kept = None if material is None else measure(adapted, adapter, material)
    return TrainedShard(
        adapter, tuple(indices), trained.training, trained.placement, trained.climbed, proof, proofs, caution, kept
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
    base, every = adapted.base, [*records, *asked_in_contexts(records)]
    ending = None if features is None else Ending(adapted.model, features, adapted.lora_layers(adapter))
    proof = prove(adapted.model, every, adapter, adapted.dtypes, ending)
    proof.conditions["parameters"] = base.fingerprint.parameters
    if job.settings.contexts:
        proof.conditions["contexts"] = len(job.settings.contexts)
    low = [number for number, prob in enumerate(proof.min_probs) if prob < job.settings.certify_threshold]
    if low:
        keys = list(dict.fromkeys(every[number].record.key for number in sorted(low, key=proof.min_probs.__getitem__)))
        raise StubbornRecords(
            f"As saved, {keys[0]!r} has p = {proof.min_prob:.3f} in {base.dtype}, below the certified "
            f"{job.settings.certify_threshold}. Write again with a higher rank.",
            keys=keys,
            rank=rank,
            doubtful=[every[number].record.key for number in in_doubt(proof.min_probs)],
        )
    return proof.parted(len(records))


def stored_adapter(
    job: ShardJob, shard: TrainedShard, folder: Path, cost_bits: float, request: Mapping[str, Any]
) -> StoredAdapter:
    """The index row of a proved shard.

    Args:
        folder: Of its files.
        request: How the write was asked for, to rewrite the shard alike: "goal", "rank" and "one_adapter".
    """
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
        training={**training, "settings": job.settings.to_json(), "cost_bits": cost_bits, "request": dict(request)},
        proof={
            **shard.proof.conditions,
            "min_prob": shard.proof.min_prob,
            "records": len(shard.indices),
            "served": {
                dtype: {**proof.conditions, "min_prob": proof.min_prob} for dtype, proof in shard.served.items()
            },
            **({} if shard.kept is None else {"kept": asdict(shard.kept)}),
        },
        created_at=now(),
    )
