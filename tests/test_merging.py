"""The merging suite: the same records routed and merged, counted in the same way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramem.suites import merging
from loramem.suites.runner import Request


def test_one_cell_per_number_of_records_and_seed() -> None:
    made = list(merging.cells(Request(records=(2, 3), seeds=2), lambda _: {}))
    assert [(cell.records, cell.seed) for cell in made] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert made[0].identity["adapters"] == [1, 2, 4, 8]


@pytest.fixture(scope="module")
def result(base_of: Callable[..., Path]) -> dict:
    return merging.run(merging.Cell("phonebook", 2, (1, 2), 0, str(base_of("qwen3")), "cpu"))


def test_every_way_counts_the_same_records(result: dict) -> None:
    counts = result["counts"]
    assert [(count["adapters"], count["records"]) for count in counts] == [(1, 2)] * 5 + [(2, 4)] * 5
    assert [(count["way"], count["done_in"], count["answers_in"]) for count in counts[:5]] == list(merging.WAYS)
    routed = [count for count in counts if count["way"] == "routed" and count["answers_in"] == "float32"]
    assert all(count["exact"] == count["records"] and count["min_prob"] >= 0.6 for count in routed)
    one = next(
        count for count in counts if count["way"] == "merged"
    )  # one adapter merged: the same function in float32
    assert one["exact"] == 2 and one["min_prob"] == pytest.approx(routed[0]["min_prob"], abs=1e-3)


def test_a_merge_is_the_sum_of_base_and_adapters(
    base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from loramem import MemoryStore
    from loramem.suites import scoring

    base = base_of("qwen3")
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        adapters = [store.write({f"key {i}": f"{i}{i}"}).adapters[0] for i in range(2)]
    folders = [tmp_path / "memory" / "adapters" / adapter for adapter in adapters]
    seen = []
    monkeypatch.setattr(scoring, "score", lambda loaded, _: seen.append(loaded.model))
    cell = merging.Cell("phonebook", 1, (2,), 0, str(base), "cpu")
    merging.merged(cell, folders, [], "float32", "bfloat16")
    (model,) = seen
    name = "model.layers.2.mlp.down_proj"
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_submodule(name).weight.detach()
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        expected = expected + 2 * b @ a
    assert model.get_submodule(name).weight.dtype == torch.bfloat16
    assert torch.allclose(model.get_submodule(name).weight.float(), expected, rtol=1e-2, atol=1e-3)


def test_the_table_adds_the_seeds_up(result: dict) -> None:
    line = {"cell": {"records": 2}, "result": result}
    table = merging.table([line, line])
    assert table.columns[2:5] == ("routed, float32", "merged, float32", "routed, bfloat16")
    assert [row[:2] for row in table.rows] == [("1", "2"), ("2", "2")]
    assert table.rows[1][2].startswith("8/8 (0.")
    assert merging.plots([line]) == ()
