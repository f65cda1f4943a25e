"""Recall of one record after another: nothing is switched or run again that is there already."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loramem import MemoryStore
from loramem.models import prefix
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.decoding import greedy_decode
from loramem.models.placement import Placement
from loramem.models.prefix import SHARED_PREFIX_TOKENS, Prefix

from .conftest import numbers
from .test_recall import CONFIGS, NEVER, prompts, random_model


def passes(model: PreTrainedModel) -> list[list[list[int]]]:
    """The ids of every pass from here on."""
    seen = list[list[list[int]]]()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    return seen


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_prefix_that_was_kept_serves_any_number_of_prompts(config: Any) -> None:
    model, batch = random_model(config), prompts(SHARED_PREFIX_TOKENS)
    kept = Prefix.of(model, batch[0][:SHARED_PREFIX_TOKENS])
    assert kept is not None
    alone = [greedy_decode(model, [prompt], 12, NEVER)[0] for prompt in batch]
    for _ in range(2):
        assert [greedy_decode(model, [prompt], 12, NEVER, kept=kept)[0] for prompt in batch] == alone
        assert greedy_decode(model, batch, 12, NEVER, kept=kept) == alone
    assert kept.cache.get_seq_length() == SHARED_PREFIX_TOKENS


def test_a_prompt_that_begins_otherwise_is_run_whole() -> None:
    model, batch = random_model(CONFIGS["llama"]), prompts(SHARED_PREFIX_TOKENS)
    kept = Prefix.of(model, [1] * SHARED_PREFIX_TOKENS)
    assert greedy_decode(model, batch[:1], 6, NEVER, kept=kept) == greedy_decode(model, batch[:1], 6, NEVER)


def test_recall_runs_the_prefix_of_all_prompts_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "SHARED_PREFIX_TOKENS", 1)
    records = numbers(4)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write({key: records[key] for key in list(records)[:2]})
        store.write({key: records[key] for key in list(records)[2:]})
        seen, first = passes(store.base.model), list(store.base.template.prefix_ids)
        assert {key: store.recall(key) for key in records} == records
        assert len(store.adapters()) == 2
    assert [ids for (ids,) in seen if ids[: len(first)] == first] == [first]


def test_an_adapter_in_more_than_the_last_layer_has_a_prefix_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "SHARED_PREFIX_TOKENS", 1)
    monkeypatch.setattr(AdaptedModel, "is_behind_attention", lambda *_: False)
    records = numbers(2)
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        store.write(records)
        seen, first = passes(store.base.model), list(store.base.template.prefix_ids)
        assert {key: store.recall(key) for key in records} == records
    assert all(len(ids) > len(first) for (ids,) in seen if ids[: len(first)] == first)


def test_placements_behind_the_last_attention_are_told(base: Path) -> None:
    adapted = AdaptedModel(load_base_model(str(base)))
    *behind, widest = Placement.ladder(adapted.model)
    assert [adapted.is_behind_attention(placement) for placement in behind] == [True] * len(behind)
    assert not adapted.is_behind_attention(widest)


def test_between_recalls_the_model_is_the_plain_base(base: Path, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        ids = torch.tensor([[5, 6, 7]])
        before = store.base.model(input_ids=ids).logits
        store.write({"a:": "0417"})
        store.write({"b:": "1704"})
        for key in ("a:", "b:", "a:"):
            store.recall(key)
            assert torch.equal(store.base.model(input_ids=ids).logits, before)
        model, _ = store.load("a:")
        assert not torch.equal(model(input_ids=ids).logits, before)
