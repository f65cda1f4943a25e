"""One shard from records to a proved adapter on disk: train, save, reload, decode."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loramem.adapters import AdaptedModel, Placement, adapter_id, serialize
from loramem.errors import StubbornRecords
from loramem.files import write_directory
from loramem.index import StoredAdapter, now
from loramem.prompts import EncodedRecord
from loramem.recall import Proof, prove
from loramem.writer import ProgressCallback, Training, WriterSettings, train_adapter

log = logging.getLogger(__name__)

UNSAVED = "unsaved"  # name of the adapter being trained, inside the model only


@dataclass(frozen=True)
class Shard:
    """A proved adapter in a folder, and the records it holds."""

    adapter: str
    folder: Path
    records: tuple[EncodedRecord, ...]
    placement: Placement
    settings: WriterSettings
    training: Training
    proof: Proof


def write_shard(
    adapted: AdaptedModel,
    records: Sequence[EncodedRecord],
    rank: int,
    placement: Placement,
    settings: WriterSettings,
    staging: Path,
    progress: ProgressCallback | None = None,
) -> tuple[list[Shard], list[EncodedRecord]]:
    """Write records into one adapter; stubborn ones get an adapter of their own before they are given up.

    Args:
        staging: Directory in which ``<adapter id>/`` is written and synced.

    Returns:
        Proved shards (one, or two when some records were stubborn) and the records that could not be certified.

    Raises:
        TrainingDiverged: See `train_adapter`.
        RecallError: The saved adapter does not decode what training certified.
    """
    shards = []
    remaining = list(records)
    while remaining:
        training = train_adapter(adapted, UNSAVED, remaining, rank, placement, settings, progress)
        left = set(training.stubborn)
        stubborn = [record for index, record in enumerate(remaining) if index in left]
        certified = [record for index, record in enumerate(remaining) if index not in left]
        if certified:
            shards.append(_save_and_prove(adapted, certified, placement, settings, training, staging))
        else:
            adapted.remove(UNSAVED)
        if len(stubborn) == len(remaining):
            return shards, stubborn
        if stubborn:
            log.info("%d stubborn records get an adapter of their own", len(stubborn))
        remaining = stubborn
    return shards, []


def _save_and_prove(
    adapted: AdaptedModel,
    records: Sequence[EncodedRecord],
    placement: Placement,
    settings: WriterSettings,
    training: Training,
    staging: Path,
) -> Shard:
    files = serialize(adapted.weights(UNSAVED), adapted.base, placement)
    adapter = adapter_id(files)
    folder = staging / adapter
    write_directory(folder, files)
    adapted.remove(UNSAVED)
    adapted.load(adapter, folder)
    proof = prove(adapted.model, records, adapter, {"base": adapted.base.dtype, "adapter": "float32"})
    if proof.min_prob < settings.certify_threshold:
        least = min(range(len(records)), key=proof.min_probs.__getitem__)
        raise StubbornRecords(
            f"As saved, {records[least].record.key!r} has p = {proof.min_prob:.3f}, below the certified "
            f"{settings.certify_threshold}. Write again with a higher rank.",
            keys=[records[least].record.key],
            rank=training.rank,
        )
    return Shard(adapter, folder, tuple(records), placement, settings, training, proof)


def numbered(progress: ProgressCallback | None, shard: int, shards: int) -> ProgressCallback | None:
    """A callback that is also told which shard of how many is being written (1-based)."""
    if progress is None:
        return None
    return lambda told: progress(replace(told, shard=shard, shards=shards))


def stored_adapter(shard: Shard, folder: Path, cost_bits: float) -> StoredAdapter:
    """The index row of a proved shard whose files lie in ``folder``."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    training = {name: value for name, value in asdict(shard.training).items() if name != "stubborn"}
    return StoredAdapter(
        id=shard.adapter,
        namespace=shard.records[0].record.namespace,
        rank=shard.training.rank,
        parameters=shard.training.parameters,
        size_bytes=sum(map(len, files.values())),
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        placement=asdict(shard.placement),
        training={**training, "settings": asdict(shard.settings), "cost_bits": cost_bits},
        proof={**shard.proof.conditions, "min_prob": shard.proof.min_prob},
        created_at=now(),
    )
