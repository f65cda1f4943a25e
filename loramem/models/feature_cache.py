"""Features that were collected to price records, kept until the same records are trained."""

from collections.abc import Sequence

from loramem.models.features import Features
from loramem.records.prompts import EncodedRecord

MOST_BYTES = 512 * 2**20
_Ids = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class FeatureCache:
    """Features of one model by the list of records that they were collected from.

    Of the same records in another company they would differ in the last bits, by which an adapter would depend on what
    else is in memory.

    Args:
        most_bytes: What does not fit beside what is there already is not kept.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._kept = dict[_Ids, Features]()

    def keep(self, records: Sequence[EncodedRecord], features: Features) -> None:
        if sum(each.size_bytes for each in self._kept.values()) + features.size_bytes <= self.most_bytes:
            self._kept[_ids(records)] = features

    def pop(self, records: Sequence[EncodedRecord]) -> Features | None:
        """What was kept of just these records in this order, which is forgotten."""
        return self._kept.pop(_ids(records), None)

    def clear(self) -> None:
        self._kept.clear()


def _ids(records: Sequence[EncodedRecord]) -> _Ids:
    return tuple((tuple(record.prompt_ids), tuple(record.answer_ids)) for record in records)
