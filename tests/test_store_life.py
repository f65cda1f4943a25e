"""The suite that grows a store, changes it, compacts it and opens it again."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from loramem import MemoryStore, Record
from loramem.records.prompts import EncodedRecord
from loramem.suites import store_life


def test_a_small_life_keeps_what_lives_and_forgets_what_was_deleted(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("WRITES", 2), ("OPENINGS", 1), ("WARM", 2), ("LOOKUPS", 3), ("FRESH", 9)):
        monkeypatch.setattr(store_life, name, few)
    programs: list[str] = []
    monkeypatch.setattr(store_life, "_seconds", lambda program, *_: float(programs.append(program) or 1.5))
    cell = store_life.Cell(10, 0, str(base), "cpu")

    result = store_life.run(cell)

    assert [write["records"] for write in result["growth"]] == [5, 10]
    assert (result["live"], result["exact"], result["wrong"], result["deleted_known"]) == (9, 9, 0, 0)
    assert (result["verified"], result["damaged"], result["adapters"]) == (9, 0, 1)
    assert len(result["erased_ranks"]) == 1 and 1 <= result["erased_ranks"][0] <= 10
    assert programs == [store_life.OPENING, store_life.PLAIN] and result["open_s"] == 1.5
    line = {"cell": cell.identity, "result": result}
    shown = store_life.table([line])
    assert len(shown.rows) == 2 and "9 of 9 live records exact, 0 wrong, 0 of 1 deleted ones known" in shown.notes[0]
    (plot,) = store_life.plots([line])
    assert [point.x for point in plot.series[0].points] == [5, 10]


def test_every_erased_value_has_fresh_ones_of_its_own_beside_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def equal(_: object, encoded: Sequence[EncodedRecord]) -> list[tuple[int, torch.Tensor]]:
        asked.append([entry.record.value for entry in encoded])
        return [(index, torch.ones(1)) for index in range(len(encoded))]

    records = [Record(f"key {number}", f"{number}") for number in range(5)]
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(records)
        store.delete(["key 1", "key 3"])
        monkeypatch.setattr("loramem.models.decoding.answer_probabilities", equal)
        monkeypatch.setattr(store_life, "FRESH", 2)
        assert store_life._ranks(store, records, {"key 1": "1", "key 3": "3"}, ["90", "91", "92", "93"]) == [1, 1]
    assert asked == [["1", "90", "91"], ["3", "92", "93"]]


def test_places_that_are_not_uniform_have_a_small_p() -> None:
    result = {
        "growth": [{"records": 10, "seconds": 1.0, "visits": 40, "size_mb": 1.0, "peak_memory_mb": 500.0}],
        **dict.fromkeys(("update_s", "delete_s", "compact_s", "before_compaction_mb", "size_mb"), 1.0),
        **dict.fromkeys(("live", "exact", "wrong", "deleted_known", "damaged", "adapters"), 1),
        **dict.fromkeys(("open_s", "plain_s", "warm_recall_ms", "lookup_ms"), 1.0),
    }
    for ranks, uniform in ((list(range(1, 101)), True), ([1, 2, 3, 4, 5] * 20, False)):
        line = {"cell": {"records": 10, "seed": 0}, "result": {**result, "erased_ranks": ranks}}
        p = float(store_life.table([line]).notes[1].rpartition("p = ")[2].rstrip("."))
        assert (p > 0.9) == uniform and (p < 0.01) != uniform


@pytest.mark.slow
def test_the_programs_that_open_a_store_run(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        (adapter,) = store.write({"key": "1234"}).adapters
    folder = str(tmp_path / "memory" / "adapters" / adapter)
    assert store_life._seconds(store_life.OPENING, str(tmp_path / "memory"), "cpu", "key") > 0
    assert store_life._seconds(store_life.PLAIN, str(base), "cpu", folder, "key") > 0
