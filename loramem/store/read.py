"""Values from the weights: the right adapter from disk, decoded, compared with the committed digest."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError

from loramem._util.layout import ADAPTERS
from loramem.errors import IntegrityError, RecallError, StoreChanged
from loramem.index.index import Index
from loramem.index.rows import Located, StoredAdapter, StoredRecord
from loramem.models.adapters import AdaptedModel
from loramem.models.decoding import DECODE_RECORDS, DECODE_TOKENS, answer_probabilities, greedy_decode
from loramem.models.placement import Placement
from loramem.models.prefix import Prefix, common_prefix
from loramem.records.chat import Chat
from loramem.records.contexts import prompts_in
from loramem.records.prompts import PromptTemplate, decode_answer, encode_record
from loramem.records.record import Record
from loramem.results import Recall, TokenProbability
from loramem.store.integrity import file_problems
from loramem.training.settings import WriterSettings


class Reader:
    """Decodes committed records. Which adapter is active is state of the model: one caller at a time."""

    def __init__(self, store: Path, index: Index, adapted: AdaptedModel, template: PromptTemplate) -> None:
        self.store, self.index, self.adapted, self.template = store, index, adapted, template

    def value(self, found: Located) -> str:
        """The committed value of a record, decoded in a batch of one. Raises what `decode` raises."""
        (recall,) = self.decode([found])
        return recall.value

    def decode(self, found: Sequence[Located]) -> Iterator[Recall]:
        """Decode records of one adapter in one batch, in their order.

        Raises:
            RecallError: A value is not the committed one; it is never returned.
            IntegrityError: The adapter's files are not what was committed.
        """
        for each, (value, prompt_tokens) in zip(found, self._decoded(found), strict=True):
            yield checked(each.record, value, prompt_tokens)

    def answers(self, found: Sequence[Located]) -> Iterator[Recall | RecallError]:
        """Decode records in one batch, in their order; an error in place of one whose value did not come back.

        They are of one adapter, or of several that are all `mixable`.

        Raises:
            IntegrityError: An adapter's files are not what was committed.
        """
        mixed = len({each.adapter.id for each in found}) > 1
        for each, (value, prompt_tokens) in zip(
            found, self._decoded_mixed(found) if mixed else self._decoded(found), strict=True
        ):
            try:
                yield checked(each.record, value, prompt_tokens)
            except RecallError as error:
                yield error

    def mixable(self, adapter: StoredAdapter) -> bool:
        """Whether its records may be in one batch with those of others: it changes no attention."""
        modules, layers = adapter.placement["modules"], adapter.placement["layers"]
        return self.adapted.is_behind_attention(Placement(tuple(modules), tuple(layers)))

    def decode_current(self, records: Sequence[StoredRecord]) -> Iterator[Recall]:
        """`decode`; where the adapter is gone, since another process compacted, from the one that holds them now.

        Raises what `decode` raises.

        Raises:
            StoreChanged: A record was replaced or deleted in the meantime, and its adapter removed.
        """
        try:
            decoded = list(self.decode(self.index.located(records)))
        except IntegrityError:
            current = [self._current(record) for record in records]
            if all(now.adapter == before.adapter for now, before in zip(current, records, strict=True)):
                raise
            found = {
                (record.namespace, record.key): recall
                for batch in decode_batches(current)
                for record, recall in zip(batch, self.decode(self.index.located(batch)), strict=True)
            }
            decoded = [found[record.namespace, record.key] for record in records]
        yield from decoded

    def values(self, records: Sequence[StoredRecord]) -> dict[tuple[str, str], str]:
        """Values by namespace and key: as the index keeps them where their digest agrees, else from the weights.

        Raises what `decode` raises.
        """
        kept = {(r.namespace, r.key): r.value for r in records if r.value is not None and r.holds(r.value)}
        missing = [record for record in records if (record.namespace, record.key) not in kept]
        for batch in decode_batches(missing):
            for record, recall in zip(batch, self.decode(self.index.located(batch)), strict=True):
                kept[record.namespace, record.key] = recall.value
        return kept

    def try_decode(self, records: Sequence[StoredRecord]) -> list[tuple[StoredRecord, str | None]]:
        """Records of one adapter with what was decoded, None where it is not the committed value."""
        decoded = self.decode_any(records)
        return [(record, value if record.holds(value) else None) for record, value in decoded]

    def asked(self, records: Sequence[StoredRecord]) -> tuple[tuple[tuple[int, ...], ...], int]:
        """Prompts of a batch, and new tokens to decode at most: for another process."""
        return tuple(tuple(self.prompt_ids(record)) for record in records), _most(records)

    def in_contexts(self, records: Sequence[StoredRecord]) -> list[list[StoredRecord]]:
        """Records of one adapter as each of the chats asks for them that it was proved in; none where keys are digests.

        Raises:
            IntegrityError: The adapter's row is not what was committed.
        """
        adapter = self.index.located(records)[0].adapter
        if "contexts" not in adapter.proof or self.index.key_salt is not None:
            return []
        keys, tokenizer = [record.key for record in records], self.adapted.base.tokenizer
        return [
            [replace(record, prompt={"ids": list(ids)}) for record, ids in zip(records, prompts, strict=True)]
            for context in WriterSettings.saved(adapter.training["settings"]).contexts
            if (prompts := prompts_in(tokenizer, context, keys))
        ]

    def held(
        self, records: Sequence[StoredRecord], ids: Sequence[Sequence[int]]
    ) -> list[tuple[StoredRecord, str | None]]:
        """`try_decode`, of what another process decoded."""
        texts = [decode_answer(self.adapted.base.tokenizer, row) for row in ids]
        return [(record, text if record.holds(text) else None) for record, text in zip(records, texts, strict=True)]

    def decode_any(self, records: Sequence[StoredRecord]) -> list[tuple[StoredRecord, str]]:
        """Records of one adapter with what was decoded, whether it is the committed value or not: for checks only."""
        decoded = self._decoded(self.index.located(records))
        return [(record, value) for record, (value, _) in zip(records, decoded, strict=True)]

    def _decoded(self, found: Sequence[Located]) -> list[tuple[str, int]]:
        """What is decoded for records of one adapter, in one batch, and how many tokens each prompt has."""
        records = [each.record for each in found]
        prompts = [self.prompt_ids(record) for record in records]
        with self.active(found[0].adapter):
            kept = self._prefix if self.mixable(found[0].adapter) else None
            texts = self._texts(records, prompts, kept)
        return [(text, len(prompt)) for text, prompt in zip(texts, prompts, strict=True)]

    def _decoded_mixed(self, found: Sequence[Located]) -> list[tuple[str, int]]:
        """The same of records of several adapters, which stay loaded together."""
        for adapter in {each.adapter.id: each.adapter for each in found}.values():
            self.activate(adapter)
        self.adapted.deactivate()
        order = sorted(range(len(found)), key=lambda place: found[place].adapter.id)
        records = [found[place].record for place in order]
        prompts = [self.prompt_ids(record) for record in records]
        kept = common_prefix(self.adapted.model, prompts, self._prefix)
        with self.adapted.mixed([record.adapter for record in records]):
            texts = self._texts(records, prompts, kept)
        decoded = dict(zip(order, zip(texts, map(len, prompts), strict=True), strict=True))
        return [decoded[place] for place in range(len(found))]

    def _texts(
        self, records: Sequence[StoredRecord], prompts: Sequence[Sequence[int]], kept: Prefix | None
    ) -> list[str]:
        ids = greedy_decode(self.adapted.model, prompts, _most(records), self.template.end_id, kept=kept)
        return [decode_answer(self.adapted.base.tokenizer, row) for row in ids]

    @cached_property
    def _prefix(self) -> Prefix | None:
        """What every prompt begins with, for adapters that do not change it."""
        return Prefix.of(self.adapted.model, self.template.prefix_ids)

    def prompt_ids(self, record: StoredRecord) -> list[int]:
        """Ids that the record was trained with, whatever the chat template gives today."""
        return self.template.stored_ids(self.adapted.base.tokenizer, record.key, record.prompt)

    def compared(self, records: Sequence[StoredRecord]) -> list[StoredRecord]:
        """Records, of which those that were written before it was kept say as well whether chat gives their ids."""
        if self.template.kind != "chat" or self.index.key_salt is not None:  # no chat, or no keys to compare
            return list(records)
        unknown = [record for record in records if record.prompt is None]
        keys = [record.key for record in unknown]
        joined = [self.prompt_ids(record) for record in unknown]
        found = {
            (record.namespace, record.key): replace(record, prompt={"chat": chat == Chat()})
            for record, chat in zip(
                unknown, self.template.by_chat(self.adapted.base.tokenizer, keys, joined), strict=True
            )
        }
        return [found.get((record.namespace, record.key), record) for record in records]

    def count_tokens(self, value: str) -> int:
        """Answer tokens of a value."""
        return encode_record(Record("?", value), self.adapted.base.tokenizer, self.template).length

    def token_probabilities(self, found: Located, value: str) -> tuple[TokenProbability, ...]:
        """Every answer token and the end token of a decoded value, with the adapter and without it, batch of one."""
        record, tokenizer = found.record, self.adapted.base.tokenizer
        asked = Record(record.key, value, record.namespace)
        encoded = encode_record(asked, tokenizer, self.template, self.prompt_ids(record))
        with self.active(found.adapter):
            ((_, probs),) = answer_probabilities(self.adapted.model, [encoded])
        ((_, base_probs),) = answer_probabilities(self.adapted.model, [encoded])
        return tuple(
            TokenProbability(str(tokenizer.decode([token])), token, float(p), float(p_base), float(p) > 0.5)
            for token, p, p_base in zip(encoded.answer_ids, probs, base_probs, strict=True)
        )

    @contextmanager
    def active(self, adapter: StoredAdapter) -> Iterator[None]:
        """`activate`, and the plain base again afterwards: no later computation meets the adapter unasked."""
        self.activate(adapter)
        try:
            yield
        finally:
            self.adapted.deactivate()

    def activate(self, adapter: StoredAdapter) -> None:
        """Load an adapter from disk if it is not loaded, after checking its files; it stays active.

        Raises:
            IntegrityError: Its files are not what was committed.
        """
        if not self.adapted.is_loaded(adapter.id):
            self.check(adapter)
        try:
            self.adapted.load(adapter.id, self.store / ADAPTERS / adapter.id)
        except (OSError, ValueError, SafetensorError):
            self.check(adapter)  # gone between the check and now
            raise

    def check(self, adapter: StoredAdapter) -> None:
        """Compare an adapter's files with their sha256.

        Raises:
            IntegrityError: They are not what was committed.
        """
        if problems := file_problems(self.store, adapter):
            raise IntegrityError(f"{problems[0]}. Values from it are not returned.", what=adapter.id)

    def files(self, adapter: StoredAdapter) -> dict[str, bytes]:
        """Content of an adapter's files by name.

        Raises:
            IntegrityError: They are not what was committed.
        """
        self.check(adapter)
        return {name: (self.store / ADAPTERS / adapter.id / name).read_bytes() for name in adapter.files}

    def _current(self, record: StoredRecord) -> StoredRecord:
        current = self.index.find(record.namespace, record.key)
        if current is None or current.digest != record.digest:
            raise StoreChanged(
                f"The record {record.key!r} was replaced or deleted while it was being read. Read again.",
                key=record.key,
            )
        return current


def _most(records: Sequence[StoredRecord]) -> int:
    return max(record.answer_tokens for record in records) + 2  # the end token, and one beyond: it must have ended


def checked(record: StoredRecord, value: str, prompt_tokens: int) -> Recall:
    """What was decoded for a record, as the answer to whoever asked.

    Raises:
        RecallError: It is not the committed value, which is never returned.
    """
    if not record.holds(value):
        raise RecallError(
            f"Adapter {record.adapter} did not give back the committed value of {record.key!r}. Run loramem verify; "
            "the value is not returned.",
            key=record.key,
            adapter=record.adapter,
        )
    return Recall(record.key, value, record.min_prob, record.adapter, prompt_tokens, record.answer_tokens)


def numbered_batches(
    records: Iterable[tuple[int, StoredRecord]],
) -> Iterator[tuple[list[int], list[StoredRecord]]]:
    """`cut_batches` of records with their numbers, which go along."""
    numbers = deque[int]()

    def unnumbered() -> Iterator[StoredRecord]:
        for number, record in records:
            numbers.append(number)
            yield record

    for batch in cut_batches(unnumbered()):
        yield [numbers.popleft() for _ in batch], batch


def in_order(numbered: Iterable[tuple[int, Recall]]) -> Iterator[Recall]:
    """What is numbered from 0 by its numbers, as soon as all before it have come; those that are early wait."""
    waiting, due = dict[int, Recall](), 0
    for number, recall in numbered:
        waiting[number] = recall
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def decode_batches(records: Iterable[StoredRecord]) -> Iterator[list[StoredRecord]]:
    """Records cut into batches of one adapter, each adapter once, with answers of similar length."""
    return cut_batches(sorted(records, key=lambda record: (record.adapter, record.answer_tokens)))


def cut_batches(records: Iterable[StoredRecord]) -> Iterator[list[StoredRecord]]:
    """`decode_batches` of records that are in order already, of which no more than a batch is held."""
    batch: list[StoredRecord] = []
    for record in records:
        tokens = (len(batch) + 1) * (
            record.answer_tokens + len(record.key.encode())
        )  # a key has no more tokens than bytes
        if batch and (record.adapter != batch[0].adapter or len(batch) == DECODE_RECORDS or tokens > DECODE_TOKENS):
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch
