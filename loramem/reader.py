"""Values from the weights: the right adapter from disk, decoded, compared with the committed digest."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramem.adapters import AdaptedModel
from loramem.errors import IntegrityError, RecallError
from loramem.index import Index, StoredAdapter, StoredRecord
from loramem.prompts import PromptTemplate, decode_answer
from loramem.recall import DECODE_RECORDS, DECODE_TOKENS, answer_probabilities, greedy_decode
from loramem.reports import Recall, TokenProbability


class Reader:
    """Decodes committed records. Which adapter is active is state of the model: one caller at a time."""

    def __init__(self, store: Path, index: Index, adapted: AdaptedModel, template: PromptTemplate) -> None:
        self.store, self.index, self.adapted, self.template = store, index, adapted, template

    def decode(self, records: Sequence[StoredRecord]) -> Iterator[Recall]:
        """Decode records of one adapter in one batch.

        Raises:
            RecallError: A value is not the committed one; it is never returned.
            IntegrityError: The adapter's files are not what was committed.
        """
        for record, value in self.try_decode(records):
            if value is None:
                raise RecallError(
                    f"Adapter {record.adapter} did not give back the committed value of {record.key!r}. Run "
                    "loramem verify; the value is not returned.",
                    key=record.key,
                    adapter=record.adapter,
                )
            yield Recall(record.key, value, record.min_prob, record.adapter)

    def try_decode(self, records: Sequence[StoredRecord]) -> list[tuple[StoredRecord, str | None]]:
        """Records of one adapter with what was decoded, None where it is not the committed value."""
        tokenizer = self.adapted.base.tokenizer
        with self._active(records[0].adapter):
            ids = greedy_decode(
                self.adapted.model,
                [self.template.prompt_ids(tokenizer, record.key) for record in records],
                max(record.answer_tokens for record in records)
                + 2,  # the end token, and one beyond: it must have ended
                self.template.end_id,
            )
        values = [decode_answer(tokenizer, row) for row in ids]
        return [(r, value if r.holds(value) else None) for r, value in zip(records, values, strict=True)]

    def token_probabilities(self, record: StoredRecord, value: str) -> tuple[TokenProbability, ...]:
        """Every answer token and the end token of a decoded value, with the adapter and without it, batch of one."""
        from loramem.prompts import encode_record
        from loramem.records import Record

        tokenizer = self.adapted.base.tokenizer
        encoded = encode_record(Record(record.key, value, record.namespace), tokenizer, self.template)
        with self._active(record.adapter):
            ((_, probs),) = answer_probabilities(self.adapted.model, [encoded])
        ((_, base_probs),) = answer_probabilities(self.adapted.model, [encoded])
        return tuple(
            TokenProbability(str(tokenizer.decode([token])), token, float(p), float(p_base), float(p) > 0.5)
            for token, p, p_base in zip(encoded.answer_ids, probs, base_probs, strict=True)
        )

    @contextmanager
    def _active(self, adapter: str) -> Iterator[None]:
        """`activate`, and the plain base again afterwards: no later computation meets the adapter unasked."""
        self.activate(adapter)
        try:
            yield
        finally:
            self.adapted.rest()

    def activate(self, adapter: str) -> None:
        """Load an adapter from disk if it is not loaded, after checking its files; it stays active.

        Raises:
            IntegrityError: No such adapter, or its files are not what was committed.
        """
        row = self.index.adapter(adapter)
        if row is None:
            raise IntegrityError(f"The index has no adapter {adapter!r}.", what=adapter)
        if not self.adapted.is_loaded(adapter) and (problems := file_problems(self.store, row)):
            raise IntegrityError(f"{problems[0]}. Values from it are not returned.", what=adapter)
        self.adapted.load(adapter, self.store / "adapters" / adapter)


def decode_batches(records: Iterable[StoredRecord]) -> Iterator[list[StoredRecord]]:
    """Records cut into batches of one adapter, each adapter once, with answers of similar length."""
    batch: list[StoredRecord] = []
    for record in sorted(records, key=lambda record: (record.adapter, record.answer_tokens)):
        tokens = (len(batch) + 1) * (
            record.answer_tokens + len(record.key.encode())
        )  # a key has no more tokens than bytes
        if batch and (record.adapter != batch[0].adapter or len(batch) == DECODE_RECORDS or tokens > DECODE_TOKENS):
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch


def file_problems(store: Path, adapter: StoredAdapter) -> list[str]:
    """What of an adapter's files is not as committed, in words."""
    problems = []
    for name, expected in adapter.files.items():
        path = store / "adapters" / adapter.id / name
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            problems.append(f"Adapter {adapter.id}: {name} cannot be read ({error.strerror})")
            continue
        if found != expected:
            problems.append(f"Adapter {adapter.id}: {name} is not what was committed (sha256 differs)")
    return problems
