"""A base on one device leaves the others of the machine alone."""

from pathlib import Path

import peft.peft_model
import pytest
import torch

from loramem import MemoryStore

from .conftest import numbers


def test_a_store_on_the_cpu_neither_looks_for_another_device_nor_seeds_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object) -> str:
        raise AssertionError("another device was touched")

    monkeypatch.setattr(peft.peft_model, "infer_device", touched)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched)
    records = numbers(4)
    with MemoryStore(tmp_path / "m", str(base), device="cpu") as store:
        keys = list(records)
        store.write({key: records[key] for key in keys[:2]})
        store.write({key: records[key] for key in keys[2:]})  # a second adapter joins the first
        assert [store.recall(key) for key in keys] == list(records.values())
