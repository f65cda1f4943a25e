"""What a push says of a store: loramem.json and records.jsonl, made of its manifest and index."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loramem.hub.publication import (
    ADAPTERS,
    FORMAT,
    NEEDS,
    Publication,
    PublishedAdapter,
    PublishedAsking,
    PublishedBase,
    PublishedFile,
    PublishedPlacement,
    PublishedPrompt,
    PublishedProof,
    PublishedRecord,
    PublishedTraining,
)
from loramem.index.rows import StoredAdapter, StoredRecord, hidden_names
from loramem.store.manifest import Manifest


def describe(
    manifest: Manifest,
    adapters: Iterable[StoredAdapter],
    records: Sequence[StoredRecord],
    sizes: Mapping[str, int],
    *,
    include_keys: bool,
    include_values: bool,
) -> tuple[Publication, bytes]:
    """What is said of a store's live records, and the lines of records.jsonl.

    Args:
        sizes: Bytes of every adapter file by its path in the repository.
        include_keys: Publish namespaces and keys; digests of them otherwise.
        include_values: Publish values and metadata beside them.

    Raises:
        ValidationError: The store has something that the format cannot say.
    """
    salts = "".join(sorted(record.salt for record in records))
    key_salt = manifest.key_salt or (None if include_keys else hashlib.sha256(salts.encode()).hexdigest())
    hide = key_salt is not None and manifest.key_salt is None  # a store that was pulled without keys has none to hide

    def line(record: StoredRecord) -> PublishedRecord:
        namespace, key, of = record.namespace, record.key, record.question_of
        if hide:
            assert key_salt is not None
            of = None if of is None else hidden_names(key_salt, namespace, of)[1]
            namespace, key = hidden_names(key_salt, namespace, key)
        return PublishedRecord(
            namespace=namespace,
            key=key,
            value=record.value if include_values else None,
            metadata=record.metadata or None if include_values else None,
            adapter=record.adapter,
            salt=record.salt,
            digest=record.digest,
            answer_tokens=record.answer_tokens,
            min_prob=record.min_prob,
            prompt_sha256=key if hide else record.prompt_sha256,  # that of a short key could be guessed
            written_at=record.written_at,
            prompt=None if record.prompt is None else _asking(record.prompt, told=key_salt is None),
            question_of=of,
        )

    lines = "".join(
        json.dumps(line(record).model_dump(exclude_none=True), ensure_ascii=False, sort_keys=True) + "\n"
        for record in records
    ).encode()
    lowest: dict[str, list[float]] = {}
    for record in records:
        lowest.setdefault(record.adapter, []).append(record.min_prob)
    described = [
        PublishedAdapter(
            id=adapter.id,
            namespace=hidden_names(key_salt, adapter.namespace, "")[0] if hide and key_salt else adapter.namespace,
            rank=adapter.rank,
            parameters=adapter.parameters,
            records=len(lowest[adapter.id]),
            min_prob=min(lowest[adapter.id]),
            files={
                name: PublishedFile(sha256=sha256, size_bytes=sizes[f"{ADAPTERS}/{adapter.id}/{name}"])
                for name, sha256 in adapter.files.items()
            },
            # The cost of few values, to the last bit of a float, would nearly tell which they are.
            training=PublishedTraining(**{**adapter.training, "cost_bits": math.ceil(adapter.training["cost_bits"])}),
            proof=PublishedProof(**adapter.proof),
            created_at=adapter.created_at,
            placement=None if adapter.placement == manifest.placement else PublishedPlacement(**adapter.placement),
        )
        for adapter in adapters
        if adapter.id in lowest
    ]
    publication = Publication(
        format=FORMAT,
        needs=NEEDS,
        base_model=PublishedBase(
            id=manifest.base_model,
            revision=manifest.revision,
            fingerprint=manifest.fingerprint,
            dtype=manifest.dtype,
        ),
        prompt=PublishedPrompt(**manifest.prompt),
        placement=PublishedPlacement(**manifest.placement),
        train_threshold=manifest.train_threshold,
        certify_threshold=manifest.certify_threshold,
        key_salt=key_salt,
        values=include_values,
        records=len(records),
        records_sha256=hashlib.sha256(lines).hexdigest(),
        adapters=described,
    )
    return publication, lines


def _asking(prompt: Mapping[str, Any], *, told: bool) -> PublishedAsking:
    """What is published of a record's prompt; its ids, which hold the key, only if keys are told."""
    if "ids" in prompt and not told:
        return PublishedAsking(chat=prompt["chat"], own=True)
    return PublishedAsking(**prompt)
