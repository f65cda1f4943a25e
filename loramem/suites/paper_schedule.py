"""The published training settings: a row per length, method and family of models, and the order of the batches.

Settings of the published code (arXiv 2605.30260): a fixed number of epochs, no early stop, the last weights count. SFT
and MemFT-OT draw a new order every epoch; MemFT-SW's curriculum takes growing parts of one order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from loramem.errors import ArgumentError


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which batches one published run trains."""

    learning_rate: float
    """At the first step; it falls linearly to 0."""
    epochs: int
    batch_records: int
    boundaries: tuple[int, ...] = ()
    """MemFT-SW's curriculum: epochs at which the exposed share of the records grows, the last is the end. None: all
    records in every epoch, in a new order each time."""
    accumulate: int = 1
    """Batches to an optimiser step."""

    @classmethod
    def published(cls, records: int, method: str = "memft-sw", family: str = "qwen") -> "Schedule":
        """PhoneBook's row for as many records, or for the next fewer (the first for less than the first).

        Published batches divide the records; where the row's does not, the largest smaller one that does.

        Args:
            method: "sft", "memft-ot" or "memft-sw".
            family: "qwen" (ten answer tokens to a record) or "llama" (four).
        """
        row = cls.row(records, method, family)
        batch = max(size for size in range(1, row.batch_records + 1) if records % size == 0)
        return replace(row, batch_records=batch)

    @classmethod
    def row(cls, records: int, method: str, family: str = "qwen") -> "Schedule":
        """The row that `published` takes, with its own batch."""
        rows = _PHONEBOOK[family, "memft-sw" if method == "memft-sw" else "sft"]
        return rows[max((size for size in rows if size <= records), default=min(rows))]

    @classmethod
    def long_context(cls) -> "Schedule":
        """The row of one long record: every method, model and length."""
        return cls(1e-2, 2000, 1)

    def shortened(self, factor: int) -> "Schedule":
        """A part of the epochs, for tries: nothing published."""
        boundaries = tuple(max(1, boundary // factor) for boundary in self.boundaries)
        return replace(self, epochs=max(1, self.epochs // factor), boundaries=boundaries)

    def exposed(self, records: int) -> list[int]:
        """Records trained on in each epoch.

        Raises:
            ArgumentError: Batches do not divide the records, so that some would never be trained on.
        """
        from loramem.training.objectives import exposed_records, exposure

        if records % self.batch_records:
            raise ArgumentError(
                f"Batches of {self.batch_records} do not divide {records} records.", argument="records", value=records
            )
        if not self.boundaries:
            return [records] * self.epochs
        return [
            exposed_records(records, exposure(epoch, self.boundaries), self.batch_records)
            for epoch in range(self.epochs)
        ]

    def steps(self, records: int) -> int:
        """Optimiser steps of the whole run."""
        return sum(math.ceil(exposed / (self.batch_records * self.accumulate)) for exposed in self.exposed(records))

    def batches(self, records: int, seed: int) -> Iterator[list[list[int]]]:
        """What each optimiser step trains on: its batches, as indices of the records."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(records, generator=generator).tolist()
        for epoch, exposed in enumerate(self.exposed(records)):
            if epoch and not self.boundaries:
                order = torch.randperm(records, generator=generator).tolist()
            cut = [order[start : start + self.batch_records] for start in range(0, exposed, self.batch_records)]
            yield from (cut[start : start + self.accumulate] for start in range(0, len(cut), self.accumulate))


def whole_batches(records: int, family: str) -> int:
    """The number of records nearest to this one that the rows' batches of every method divide.

    The same number where the nearest is none at all: fewer records than half of such a number.
    """
    unit = math.lcm(*(Schedule.row(records, method, family).batch_records for method in ("sft", "memft-sw")))
    return round(records / unit) * unit or records


# By records: PhoneBook's lengths are ten times as many answer tokens with Qwen3-8B, four times with Llama-3.1-8B.
_PHONEBOOK = {
    ("qwen", "sft"): {
        **{records: Schedule(1e-2, 200, 4) for records in (100, 200, 400)},
        **{records: Schedule(1e-2, 200, 8) for records in (800, 1200, 1600, 2400)},
        3200: Schedule(1e-2, 200, 16),
    },
    ("qwen", "memft-sw"): {
        100: Schedule(1e-2, 300, 10, (20, 40, 60, 80, 300)),
        200: Schedule(1e-2, 300, 10, (20, 40, 60, 80, 300)),
        400: Schedule(1e-2, 350, 10, (30, 60, 90, 120, 350)),
        800: Schedule(7e-3, 350, 20, (30, 60, 90, 120, 350), 2),
        1200: Schedule(5e-3, 500, 40, (60, 120, 180, 240, 500), 2),
        1600: Schedule(5e-3, 600, 40, (80, 160, 240, 320, 600), 2),
        2400: Schedule(5e-3, 600, 40, (80, 160, 240, 320, 600), 2),
        3200: Schedule(5e-3, 700, 40, (100, 200, 300, 400, 700), 2),
    },
    ("llama", "sft"): {
        **{records: Schedule(1e-2, 200, 10) for records in (250, 500, 1000, 2000, 3000, 4000)},
        **{records: Schedule(1e-2, 200, 20) for records in (6000, 8000)},
    },
    ("llama", "memft-sw"): {
        250: Schedule(1e-2, 300, 25, (20, 40, 60, 80, 300)),
        500: Schedule(1e-2, 400, 25, (40, 80, 120, 160, 400)),
        1000: Schedule(7e-3, 400, 50, (40, 80, 120, 160, 400)),
        2000: Schedule(5e-3, 600, 50, (80, 160, 240, 320, 600), 2),
        3000: Schedule(5e-3, 700, 50, (100, 200, 300, 400, 700), 2),
        4000: Schedule(5e-3, 700, 50, (100, 200, 300, 400, 700), 2),
        6000: Schedule(3e-3, 700, 50, (100, 200, 300, 400, 700), 4),
        8000: Schedule(3e-3, 800, 50, (120, 240, 360, 480, 800), 4),
    },
}
