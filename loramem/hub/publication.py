"""What a published repository says of itself: loramem.json and records.jsonl, checked field by field when read.

Without keys, a record is published under a digest of its namespace and key, salted: whoever knows the key finds it.
docs/hub.md is the specification.
"""

import hashlib
import json
import re
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from loramem.models.dtypes import Dtype
from loramem.planning.limits import GoalName
from loramem.records.contexts import saved_contexts
from loramem.records.prompts import prompt_digest
from loramem.store.manifest import Manifest
from loramem.training.settings import RETIRED, RETIRED_KEEPING, KeepBase, WriterSettings

FORMAT, NEEDS = 1, "0.1.0"
NAME, RECORDS, CARD, ADAPTERS = "loramem.json", "records.jsonl", "README.md", "adapters"
ADAPTER_FILE = re.compile(r"adapters/([0-9a-f]{32})/(adapter_model\.safetensors|adapter_config\.json|README\.md)")

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Probability = Annotated[FiniteFloat, Field(gt=0.0, le=1.0)]
Rank = Annotated[int, Field(ge=1, le=4096)]
"""More than any server takes."""
AdapterFile = Annotated[
    str, StringConstraints(pattern=r"^(adapter_model\.safetensors|adapter_config\.json|README\.md)$")
]
Time = Annotated[str, StringConstraints(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}\+00:00$")]
ModelId = Annotated[str, StringConstraints(pattern=r"^\w[\w .()+,=@-]*(/[A-Za-z0-9][\w.-]*)?$", max_length=200)]
"""A Hub id, or the bare name of a folder; no path and no address."""


class _Strict(BaseModel):
    """Nothing is converted, nothing unknown is let pass."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


class PublishedBase(_Strict):
    """The base model that the adapters work on."""

    id: ModelId
    revision: Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")] | None
    fingerprint: dict[str, Hex64]
    """Fields of `loramem.models.fingerprint.Fingerprint`; those of older stores have no tensors and parameters."""
    dtype: Dtype

    @field_validator("fingerprint")
    @classmethod
    def _whole(cls, given: dict[str, str]) -> dict[str, str]:
        former = {"weights", "config", "tokenizer"}
        if set(given) not in (former, former | {"tensors", "parameters"}):
            raise ValueError("its parts are not those of a base model")
        return given


class PublishedPrompt(_Strict):
    """Fields of `loramem.records.prompts.PromptTemplate`."""

    prefix_ids: list[Count]
    suffix_ids: list[Count]
    end_id: Count
    kind: Literal["chat", "plain"]


class PublishedPlacement(_Strict):
    """Fields of `loramem.models.placement.Placement`."""

    modules: list[Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*$")]] = Field(min_length=1)
    layers: list[Count] = Field(min_length=1)


class PublishedFile(_Strict):
    """A file of an adapter."""

    sha256: Hex64
    size_bytes: Count


class PublishedProof(BaseModel):
    """The conditions under which an adapter was proved; others than these may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    dtypes: dict[Literal["adapter", "base"], Annotated[str, StringConstraints(pattern=r"^\w+$")]] = Field(min_length=2)
    device: Annotated[str, StringConstraints(pattern=r"^[\w:]+$")]
    records: Tokens
    min_prob: Probability


class PublishedRequest(_Strict):
    """How a write was asked for."""

    goal: GoalName
    rank: Rank | None
    one_adapter: bool = False


def _check_fields(given: dict[str, Any], defaults: WriterSettings | KeepBase) -> None:
    known = asdict(defaults)
    for name, value in given.items():
        kind = type(known.get(name))
        kinds = {float: (float, int), type(None): (type(None), int)}.get(kind, (kind,))
        if name not in known or type(value) not in kinds:
            raise ValueError(f"{name} is not a setting, or not of its type")


class PublishedTraining(BaseModel):
    """How an adapter was trained: what rewriting it needs to know; what it came to may stand beside."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    cost_bits: Count
    settings: dict[str, Any]
    """Fields of `loramem.training.settings.WriterSettings`."""
    request: PublishedRequest = PublishedRequest(goal="fast", rank=None)

    @field_validator("settings")
    @classmethod
    def _settings(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = {name: given[name] for name in given.keys() - RETIRED}
        saved_contexts(given.get("contexts", ()))
        plain = {name: value for name, value in given.items() if name not in ("keep_base", "contexts")}
        _check_fields(plain, WriterSettings())
        if (keep := given.get("keep_base")) is not None:
            if not isinstance(keep, dict):
                raise ValueError("keep_base is not a group of settings")
            keep = {name: keep[name] for name in keep.keys() - RETIRED_KEEPING}
            given["keep_base"] = keep
            _check_fields(keep, KeepBase())
            KeepBase(**keep)
        WriterSettings(**plain)
        return given


class PublishedAdapter(_Strict):
    """An adapter and what was proved of it where it was written."""

    id: Hex32
    namespace: str
    """A digest where keys are not published."""
    rank: Rank
    parameters: Count
    records: Tokens
    min_prob: Probability
    """Lowest certificate of its records."""
    files: dict[AdapterFile, PublishedFile] = Field(min_length=3)
    training: PublishedTraining
    proof: PublishedProof
    created_at: Time
    placement: PublishedPlacement | None = None
    """Where it sits, if its records did not fit where the store's writes begin."""


class PublishedAsking(_Strict):
    """How a record is asked for: `loramem.records.chat.Chat.kept`."""

    chat: bool
    """Whether the key as a chat's user message comes to the ids that were trained."""
    why: Annotated[str, StringConstraints(pattern="^[a-z]+$")] | None = None
    ids: list[Count] | None = Field(default=None, min_length=1, max_length=2**20)
    """Of the prompt, where they are not prefix, key and suffix; they hold the key."""
    own: Literal[True] | None = None
    """In place of ``ids`` where keys are not published: they are what the chat template gives for the key."""


class PublishedRecord(_Strict):
    """A line of records.jsonl."""

    namespace: str
    key: str = Field(min_length=1)
    """A digest where keys are not published."""
    value: str | None = None
    metadata: dict[str, Any] | None = None
    adapter: Hex32
    salt: Hex32
    digest: Hex64
    answer_tokens: Tokens
    min_prob: Probability
    prompt_sha256: Hex64
    written_at: Time
    prompt: PublishedAsking | None = None
    """Left out of records that were written before this was looked at, and where there is no chat template."""
    question_of: str | None = Field(default=None, min_length=1)
    """Of a question, the key of the record that it asks for; a digest where keys are not published."""


class Publication(_Strict):
    """loramem.json: everything about a published store but its records."""

    format: int
    needs: str
    base_model: PublishedBase
    prompt: PublishedPrompt
    placement: PublishedPlacement
    train_threshold: Probability
    certify_threshold: Probability
    key_salt: Hex64 | None
    """None where keys are published."""
    values: bool
    records: Count
    records_sha256: Hex64
    adapters: list[PublishedAdapter]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.values and self.key_salt is not None:
            raise ValueError("it has values and no keys")
        if len({adapter.id for adapter in self.adapters}) != len(self.adapters):
            raise ValueError("it lists an adapter twice")
        if not 0.5 <= self.certify_threshold <= self.train_threshold < 1.0:
            raise ValueError("its thresholds certify nothing")
        if any(adapter.proof.records != adapter.records for adapter in self.adapters):
            raise ValueError("an adapter was proved with another number of records")
        if self.records != sum(adapter.records for adapter in self.adapters):
            raise ValueError("its adapters hold another number of records")
        return self

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every adapter file by its path in the repository."""
        return {
            f"{ADAPTERS}/{adapter.id}/{name}": file.size_bytes
            for adapter in self.adapters
            for name, file in adapter.files.items()
        }

    def manifest(self, location: str | None) -> Manifest:
        """The manifest of a store made of this."""
        return Manifest(
            base_model=self.base_model.id,
            location=location,
            revision=self.base_model.revision,
            fingerprint=dict(self.base_model.fingerprint),
            dtype=self.base_model.dtype,
            prompt=self.prompt.model_dump(),
            placement=self.placement.model_dump(),
            train_threshold=self.train_threshold,
            certify_threshold=self.certify_threshold,
            keep_values=self.values,
            key_salt=self.key_salt,
        )


def read_publication(content: bytes) -> Publication:
    """Parse loramem.json.

    Raises:
        ValueError: What is wrong with it, in words.
    """
    try:
        found = json.loads(content)
        found_format = found["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is not the description of a published store") from None
    if found_format != FORMAT:
        raise ValueError(f"it has format {found_format!r}, this version reads {FORMAT}; upgrade loramem")
    return _validated(Publication, content)


def read_lines(content: bytes, publication: Publication) -> list[PublishedRecord]:
    """Parse records.jsonl.

    Raises:
        ValueError: What is wrong with it, in words.
    """
    if hashlib.sha256(content).hexdigest() != publication.records_sha256:
        raise ValueError("its sha256 is not the one that loramem.json gives")
    records = [_validated(PublishedRecord, line) for line in content.splitlines()]
    if len({(record.namespace, record.key) for record in records}) != len(records):
        raise ValueError("it has a key twice")
    if len({(record.namespace, record.prompt_sha256) for record in records}) != len(records):
        raise ValueError("two keys have one prompt")
    expected = {adapter.id: (adapter.namespace, adapter.records) for adapter in publication.adapters}
    counted, lowest = dict.fromkeys(expected, 0), dict.fromkeys(expected, 1.0)
    keys = {(record.namespace, record.key) for record in records if record.question_of is None}
    for record in records:
        if record.adapter not in expected:
            raise ValueError(f"it names adapter {record.adapter}, which is not published")
        if record.namespace != expected[record.adapter][0]:
            raise ValueError(f"a record of adapter {record.adapter} is of another namespace")
        if (record.value is not None) != publication.values:
            raise ValueError("it has values where loramem.json says otherwise")
        if record.prompt is not None and record.prompt.ids is not None:
            if publication.key_salt is not None:
                raise ValueError("it has prompts of keys that are not published")
            if prompt_digest(record.prompt.ids) != record.prompt_sha256:
                raise ValueError(f"the prompt of key {record.key!r} is not the one of its sha256")
        if record.question_of is not None and (record.namespace, record.question_of) not in keys:
            raise ValueError("a question asks for a record that it does not have")
        counted[record.adapter] += 1
        lowest[record.adapter] = min(lowest[record.adapter], record.min_prob)
    if wrong := [id for id, (_, count) in expected.items() if counted[id] != count]:
        raise ValueError(f"it has {counted[wrong[0]]} records of adapter {wrong[0]}, not as many as loramem.json says")
    if wrong := [adapter.id for adapter in publication.adapters if adapter.min_prob != lowest[adapter.id]]:
        raise ValueError(f"the lowest p of adapter {wrong[0]} is not the one in loramem.json")
    return records


def _validated(kind: type[Model], content: bytes) -> Model:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


def first_fault(error: ValidationError) -> str:
    """Where and what, in a line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
