"""Questions to several adapters, answered in as few batches as can be: each row of a batch through its own adapter."""

from collections.abc import Iterator, Sequence

from loramem.errors import IntegrityError, RecallError
from loramem.index.rows import Located
from loramem.models.decoding import DECODE_RECORDS, DECODE_TOKENS
from loramem.results import Recall
from loramem.store.read import Reader

LONGER = 2
"""A batch ends where the next answer is so many times as long as its shortest, or `SLACK` tokens more: all rows wait
for the longest."""
SLACK = 16


Answer = Recall | RecallError | IntegrityError


def answer_each(reader: Reader, found: Sequence[Located]) -> Iterator[tuple[int, Answer]]:
    """Decode records of any adapters; yields each one's place with its answer, or the error in place of it."""
    for places in mixed_batches(reader, found):
        batch = [found[place] for place in places]
        try:
            yield from zip(places, list(reader.answers(batch)), strict=True)
        except IntegrityError as error:  # of one adapter of several: the others are asked without it
            if len({each.adapter.id for each in batch}) == 1:
                yield from ((place, error) for place in places)
                continue
            for adapter in dict.fromkeys(each.adapter.id for each in batch):
                own = [place for place in places if found[place].adapter.id == adapter]
                for place, answer in answer_each(reader, [found[place] for place in own]):
                    yield own[place], answer


def mixed_batches(reader: Reader, found: Sequence[Located]) -> Iterator[list[int]]:
    """Places of records in batches of similar answers, of one adapter or of several that may be mixed and loaded."""
    mixable = {each.adapter.id: reader.mixable(each.adapter) for each in found}

    def order(place: int) -> tuple[str, int]:
        each = found[place]
        return "" if mixable[each.adapter.id] else each.adapter.id, each.record.answer_tokens

    batch, adapters = list[int](), set[str]()
    for place in sorted(range(len(found)), key=order):
        record, adapter = found[place].record, found[place].adapter.id
        if batch:
            first = found[batch[0]]
            alike = mixable[first.adapter.id] if mixable[adapter] else first.adapter.id == adapter
            longest = LONGER * first.record.answer_tokens + SLACK
            tokens = (len(batch) + 1) * (record.answer_tokens + len(record.key.encode()))
            if (
                not alike
                or record.answer_tokens > longest
                or len(adapters | {adapter}) > reader.adapted.max_loaded
                or len(batch) == DECODE_RECORDS
                or tokens > DECODE_TOKENS
            ):
                yield batch
                batch, adapters = [], set()
        batch.append(place)
        adapters.add(adapter)
    if batch:
        yield batch
