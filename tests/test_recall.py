"""Decoding in batches, greedy or sampled: a common prefix is run once; a batch is one adapter's, of similar length."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from loramem.models.decoding import greedy_decode
from loramem.models.prefix import SHARED_PREFIX_TOKENS, shared_prefix
from loramem.store import read
from loramem.store.read import decode_batches

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "llama": LlamaConfig(**SHAPE),
    "gpt2": GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        eos_token_id=2,
        bos_token_id=1,
    ),
}
NEVER = 63  # an end token that these random models do not happen to choose below


def random_model(config: Qwen3Config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig()
    return model


def prompts(shared: int) -> list[list[int]]:
    """Four prompts of different lengths that begin alike."""
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(3, 60, (shared,), generator=generator).tolist()
    return [[*prefix, *torch.randint(3, 60, (n,), generator=generator).tolist()] for n in (3, 7, 5, 2)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_shared_prefix_decodes_as_each_prompt_does_alone(config: Qwen3Config) -> None:
    model, batch = random_model(config), prompts(SHARED_PREFIX_TOKENS)
    assert shared_prefix(model, batch) == SHARED_PREFIX_TOKENS
    together = greedy_decode(model, batch, 12, NEVER)
    assert together == [greedy_decode(model, [prompt], 12, NEVER)[0] for prompt in batch]
    assert len({tuple(row) for row in together}) > 1


def test_a_shared_prefix_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = random_model(CONFIGS["qwen3"]), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    greedy_decode(model, prompts(SHARED_PREFIX_TOKENS), 2, NEVER)
    assert seen == [(1, SHARED_PREFIX_TOKENS), (4, 7), (4, 1)]


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (prompts(SHARED_PREFIX_TOKENS - 1), "too short to be worth a pass"),
        (prompts(SHARED_PREFIX_TOKENS)[:1], "nobody to share with"),
    ],
)
def test_a_prefix_is_not_shared(batch: list[list[int]], why: str) -> None:
    assert shared_prefix(random_model(CONFIGS["qwen3"]), batch) == 0, why


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    assert shared_prefix(random_model(CONFIGS["qwen3"]), [[5] * 40] * 3) == 39


def test_a_sliding_window_would_count_the_padding_so_nothing_is_shared() -> None:
    model, batch = random_model(MistralConfig(**SHAPE, sliding_window=8)), prompts(SHARED_PREFIX_TOKENS)
    assert shared_prefix(model, batch) == 0
    assert greedy_decode(model, batch, 6, NEVER) == [greedy_decode(model, [prompt], 6, NEVER)[0] for prompt in batch]


# Batches of stored records


def stored(adapter: str, key: str, answer_tokens: int) -> SimpleNamespace:
    return SimpleNamespace(adapter=adapter, key=key, answer_tokens=answer_tokens)


def test_every_record_is_in_one_batch_of_its_adapter_and_each_adapter_comes_once() -> None:
    records = [stored("ab"[index % 2], f"key {index}", index) for index in range(9)]
    batches = list(decode_batches(records))
    assert sorted(record.key for batch in batches for record in batch) == sorted(record.key for record in records)
    assert [{record.adapter for record in batch} for batch in batches] == [{"a"}, {"b"}]
    assert [record.answer_tokens for record in batches[0]] == [0, 2, 4, 6, 8]


def test_a_batch_is_cut_at_its_most_records_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "DECODE_RECORDS", 4)
    assert [len(batch) for batch in decode_batches([stored("a", "k", 1)] * 9)] == [4, 4, 1]
    monkeypatch.setattr(read, "DECODE_TOKENS", 22)
    assert [len(batch) for batch in decode_batches([stored("a", "k", 10)] * 5)] == [2, 2, 1]
    assert [len(batch) for batch in decode_batches([stored("a", "k", 1000)] * 2)] == [1, 1]
    assert list(decode_batches([])) == []
