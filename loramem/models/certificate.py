"""The proof that an adapter as saved gives every value back, and what it certifies.

Every record is decoded in two batch compositions. In the first it is free-running, token by token. In the second the
decoder is handed the value as a draft and checks it as speculative decoding does: one pass over the draft, and it
stands if the likeliest token at every position is the draft's next one. What greedy decoding gives at a position
depends on the tokens before it alone, so a draft that stands is what free-running decoding in that composition gives.
The pass also says every token's probability, which is the certificate. Of an adapter behind the last attention, the
pass through the layers below is the one that training read its features from: no adapter changes it; what is computed
anew is the end of the model with the adapter as saved. The least certain records of a write are decoded free-running
once more, each alone.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from loramem._util.hardware import hardware
from loramem.errors import RecallError
from loramem.models.batches import Batches, answer_logits, group_by_length, per_position, shuffled, token_losses
from loramem.models.decoding import DECODE_RECORDS, DECODE_TOKENS, decode_records, forced_batch
from loramem.models.ending import Ending
from loramem.models.features import PASS_RECORDS, PASS_TOKENS
from loramem.records.prompts import EncodedRecord

ALONE = 16
DOUBT = 0.7
"""Probability below which rounding in other company may yet take a record below what is certified."""


@dataclass(frozen=True)
class Proof:
    """That every record of an adapter was decoded exactly, and under which conditions."""

    min_probs: tuple[float, ...]
    """Per record, in the order given: the lowest teacher-forced probability of its answer tokens and end token."""
    conditions: dict[str, object]
    """dtypes, device and what it is, batch shapes and torch version the proof holds for; JSON-able."""
    in_contexts: tuple[float, ...] = ()
    """The same of every record in each chat that it was proved in, those of a record one after another
    (`loramem.records.contexts`)."""

    @property
    def every(self) -> tuple[float, ...]:
        """Of all that was decoded."""
        return (*self.min_probs, *self.in_contexts)

    @property
    def min_prob(self) -> float:
        return min(self.every)

    def parted(self, records: int) -> "Proof":
        """A proof of so many records and then of what they are in chats, as one that knows which is which."""
        return replace(self, min_probs=self.min_probs[:records], in_contexts=self.min_probs[records:])


@dataclass(frozen=True)
class Examination:
    """What the active adapter said of every record."""

    min_probs: tuple[float, ...]
    """As in `Proof`."""
    wrong: dict[int, str]
    """Records that were not decoded exactly, by index, and the composition in which."""
    batch_sizes: dict[str, list[int]]
    """Records per batch that occur in each composition, ascending."""


def examine(model: PreTrainedModel, records: Sequence[EncodedRecord], ending: Ending | None = None) -> Examination:
    """Decode every record from the active adapter in both compositions, and score its tokens.

    Args:
        ending: The model's end, with the adapter, over features of just these records, whose composition is the second.
    """
    drafts = shuffled(records, PASS_RECORDS, PASS_TOKENS)
    free = free_running(records)
    min_probs, wrong = [0.0] * len(records), dict[int, str]()
    for index, least, stands in _check_drafts(model, records, drafts) if ending is None else _check_ending(ending):
        min_probs[index] = least
        if not stands:
            wrong[index] = "shuffled, the value as a draft"
    wrong |= dict.fromkeys(misrecalled(model, records, free), "by length")
    return Examination(tuple(min_probs), wrong, {"by length": _sizes(free), "drafts": _sizes(drafts)})


def lowest_probabilities(
    model: PreTrainedModel, records: Sequence[EncodedRecord], compositions: Sequence[Batches]
) -> list[float]:
    """Per record, the lowest teacher-forced probability of its tokens from the active adapter, over compositions of
    batches: half precision rounds otherwise in every company of records."""
    lowest = [math.inf] * len(records)
    for batches in compositions:
        for index, least, _ in _check_drafts(model, records, batches):
            lowest[index] = min(lowest[index], least)
    return lowest


def free_running(records: Sequence[EncodedRecord]) -> Batches:
    """The composition that a proof decodes token by token."""
    return group_by_length(records, range(len(records)), DECODE_RECORDS, DECODE_TOKENS)


def prove(
    model: PreTrainedModel,
    records: Sequence[EncodedRecord],
    adapter: str,
    dtypes: Mapping[str, str],
    ending: Ending | None = None,
) -> Proof:
    """Examine the active adapter, and take nothing less than every record.

    Args:
        adapter: Name for error messages.
        dtypes: Recorded with the proof: "base" and "adapter".
        ending: See `examine`.

    Raises:
        RecallError: A decoded answer differs from the record; names the first.
    """
    found = examine(model, records, ending)
    for index, batches in found.wrong.items():
        doubtful = {*found.wrong, *in_doubt(found.min_probs)}
        how = f"batches {batches}, lowest p {found.min_probs[index]:.3f}"
        raise _refused(adapter, records[index], how, dtypes, [records[other].record.key for other in doubtful])
    return Proof(
        found.min_probs,
        {
            "dtypes": dtypes,
            "device": model.device.type,
            "hardware": hardware(model.device.type),
            "torch": torch.__version__,
            "decoded_batches": found.batch_sizes,
        },
    )


def prove_alone(
    model: PreTrainedModel, records: Sequence[EncodedRecord], adapter: str, dtypes: Mapping[str, str]
) -> None:
    """Decode records from the active adapter free-running, one by one.

    Raises:
        RecallError: See `prove`.
    """
    for index in misrecalled(model, records, [[index] for index in range(len(records))]):
        raise _refused(adapter, records[index], "alone", dtypes)


def least_certain(min_probs: Sequence[float], count: int = ALONE) -> list[int]:
    """Indices of the lowest probabilities, lowest first."""
    return heapq.nsmallest(count, range(len(min_probs)), key=min_probs.__getitem__)


def in_doubt(min_probs: Sequence[float]) -> list[int]:
    """Of the least certain those that another composition may refuse."""
    return [index for index in least_certain(min_probs) if min_probs[index] < DOUBT]


@torch.inference_mode()
def _check_drafts(
    model: PreTrainedModel, records: Sequence[EncodedRecord], batches: Batches
) -> Iterator[tuple[int, float, bool]]:
    """Of every record: index, lowest probability of its tokens, and whether each is the likeliest."""
    for batch in batches:
        tensors = forced_batch(model, [records[index] for index in batch])
        logits = answer_logits(model, tensors)
        least = torch.exp(-token_losses(logits, tensors).amax(1)).tolist()
        wrong = per_position(logits.argmax(-1) != tensors.targets[tensors.supervised], tensors).any(1).tolist()
        for index, probability, is_wrong in zip(batch, least, wrong, strict=True):
            yield index, probability, not is_wrong


def _check_ending(ending: Ending) -> Iterator[tuple[int, float, bool]]:
    """The same of the records that features are of."""
    counts = ending.features.owners.bincount().tolist()
    losses, likeliest = (each.split(counts) for each in ending.scores())
    for index, (mine, stands) in enumerate(zip(losses, likeliest, strict=True)):
        yield index, math.exp(-float(mine.max())), bool(stands.all())


def misrecalled(model: PreTrainedModel, records: Sequence[EncodedRecord], batches: Batches) -> Iterator[int]:
    """Indices of records that the active adapter does not decode exactly, free-running, as they are found."""
    for index, ids in decode_records(model, records, batches):
        if tuple(ids) != records[index].answer_ids[:-1]:
            yield index


def _refused(
    adapter: str, record: EncodedRecord, how: str, dtypes: Mapping[str, str], doubtful: Sequence[str] = ()
) -> RecallError:
    key = record.record.key
    return RecallError(
        f"Adapter {adapter} does not decode {key!r} exactly in {dtypes['base']} ({how}). Nothing was committed; write "
        "again with a higher rank or another seed, or a store for fewer dtypes (serve).",
        key=key,
        adapter=adapter,
        doubtful=doubtful,
    )


def _sizes(batches: Batches) -> list[int]:
    return sorted({len(batch) for batch in batches})
