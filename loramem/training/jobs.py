"""What a shard takes and what comes of it: small picklable arguments in, an adapter's files out, nothing shared.

A job names no path of the process that made it, and is the same job whatever device or build of torch it runs on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

from loramem.models.base_model import BaseModel
from loramem.models.certificate import Proof
from loramem.models.dtypes import Dtype
from loramem.models.fingerprint import Fingerprint
from loramem.models.placement import Placement
from loramem.records.prompts import EncodedRecord, PromptTemplate
from loramem.records.record import Record
from loramem.results import Kept
from loramem.training.progress import Training
from loramem.training.settings import WriterSettings

LIBRARIES = ("loramem", "torch", "transformers", "peft")


def releases() -> dict[str, str]:
    """Versions of what decides an adapter's bytes, without the build: a worker may have one for its GPU."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


@dataclass(frozen=True)
class JobBase:
    """The base model of a job, for any process that finds the same."""

    location: str
    """What `load_base_model` is given: a folder, a Hub id or "loramem-tiny"."""
    id: str
    """What the store calls it, and so its adapters."""
    revision: str | None
    device: str
    """As it was asked for: "auto" leaves the choice to the process that loads it."""
    dtype: Dtype
    fingerprint: Fingerprint

    @classmethod
    def of(cls, base: BaseModel, device: str = "auto") -> "JobBase":
        return cls(base.location, base.id, base.revision, device, base.dtype, base.fingerprint)


@dataclass(frozen=True)
class TokenizingJob:
    """Records whose token ids are asked for, as the base model's tokenizer and the store's template give them."""

    base: JobBase
    records: tuple[Record, ...] = field(repr=False)  # values are not for the logs of a cluster
    template: PromptTemplate
    releases: Mapping[str, str]


@dataclass(frozen=True)
class PricingJob:
    """Records that are to be trained together, whose tokens' probabilities under the plain base are asked for."""

    base: JobBase
    records: tuple[EncodedRecord, ...] = field(repr=False)  # values are not for the logs of a cluster
    placement: Placement
    releases: Mapping[str, str]


@dataclass(frozen=True)
class DecodingJob:
    """An adapter, and prompts in batches for which its greedy decoding is asked."""

    base: JobBase
    adapter: str
    files: Mapping[str, bytes] = field(repr=False)
    batches: tuple["DecodingBatch", ...] = field(repr=False)
    end_id: int
    releases: Mapping[str, str]


@dataclass(frozen=True)
class DecodingBatch:
    """Prompts that are decoded together."""

    prompts: tuple[tuple[int, ...], ...]
    most: int
    """New tokens of each, the end token among them."""


@dataclass(frozen=True)
class ShardJob:
    """All that writing a shard takes."""

    base: JobBase
    serve: tuple[Dtype, ...]
    """Dtypes that the adapter is proved in, of base model and adapter; the base's own beside the adapter as saved."""
    records: tuple[EncodedRecord, ...] = field(repr=False)  # values are not for the logs of a cluster
    """Without metadata, which training never reads."""
    rank: int
    placement: Placement
    """Where training begins; what does not fit there goes up the ladder."""
    settings: WriterSettings
    one_adapter: bool = False
    """Whether all its records must share one, whatever it takes."""
    caution: int = 0
    """Place in `loramem.training.shards.CAUTION` where training begins; later ones follow where a proof refuses what
    came of it."""
    doubtful: tuple[int, ...] = ()
    """Records that a proof refused or was least certain of: with all caution, what each of them computes alone is
    trained over as well."""
    releases: Mapping[str, str] | None = None
    """Of the libraries of the process that asks, which another must have to run it."""

    @property
    def namespace(self) -> str:
        """Of all its records."""
        return self.records[0].record.namespace

    @cached_property
    def identity(self) -> str:
        """A hash of everything that decides its result but the machine, 32 hex digits."""
        arguments = {
            "namespace": self.namespace,
            "base_model": [self.base.id, self.base.revision],
            "base": asdict(self.base.fingerprint),
            "dtype": self.base.dtype,
            "serve": self.serve,
            # As text, which is faster than as JSON.
            "records": str([(entry.prompt_ids, entry.answer_ids, *entry.in_contexts) for entry in self.records]),
            "rank": self.rank,
            "placement": asdict(self.placement),
            "settings": asdict(self.settings),
            "one_adapter": self.one_adapter,
            "caution": self.caution,
            "doubtful": self.doubtful,
        }
        return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:32]


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
    kept: Kept | None = None
    """What it leaves of the base, where that was asked for."""

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
        return json.dumps(self, default=vars)  # several times faster than `asdict`, which copies all that is in it

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
                None if shard["kept"] is None else Kept.of(shard["kept"]),
            )
            for shard in fields["shards"]
        )
        return cls(tuple(shards), tuple(fields["failed"]))


@dataclass(frozen=True)
class Delivery:
    """A result that was made elsewhere, with the files of its adapters."""

    result: ShardResult
    files: Mapping[str, Mapping[str, bytes]]
    """Content by adapter and file name."""


def _proof(fields: Mapping[str, Any]) -> Proof:
    return Proof(tuple(fields["min_probs"]), fields["conditions"], tuple(fields["in_contexts"]))
