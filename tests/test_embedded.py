"""The embedded base model and its recipe."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramem import base_path
from loramem.embedded import build
from loramem.embedded.corpus import Generator, StandardLibrary, standard_library


@pytest.fixture(scope="module")
def library() -> StandardLibrary:
    return standard_library()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_path())


def test_the_embedded_model_is_a_small_qwen3_in_bf16() -> None:
    model = AutoModelForCausalLM.from_pretrained(base_path())
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.bfloat16
    assert 5_000_000 < sum(p.numel() for p in model.parameters()) < 8_000_000
    assert model.config.max_position_embeddings == 16384
    assert sum(path.stat().st_size for path in base_path().iterdir()) < 16 * 2**20


def test_the_card_states_the_hash_of_the_weights() -> None:
    card = (base_path() / "README.md").read_text()
    assert hashlib.sha256((base_path() / "model.safetensors").read_bytes()).hexdigest() in card


@settings(max_examples=200)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = any(token in text for token in ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"))
    assert special or tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens(tokenizer) -> None:
    assert len(tokenizer) == 4096
    assert len(tokenizer("9100672710", add_special_tokens=False)["input_ids"]) == 10


def test_the_model_reads_16384_positions() -> None:
    """Loss on a long text does not blow up at positions that were only reached by skipping."""
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)
    text = "\n".join(Path(path).read_text() for path in (argparse_path(), ast_path()))
    ids = torch.tensor(tokenizer(text)["input_ids"][:512])[None]
    near = model(ids, labels=ids).loss.item()
    far = model(ids, labels=ids, position_ids=torch.arange(512)[None] + 16384 - 512).loss.item()
    assert far < near + 0.5


def argparse_path() -> str:
    import argparse

    return argparse.__file__


def ast_path() -> str:
    import ast

    return ast.__file__


def test_the_recipe_generates_no_phone_numbers_and_no_names(library: StandardLibrary) -> None:
    generator = Generator(library, seed=1)
    for slot in range(3000):
        prompt, completion = generator.fact(slot, 0)
        assert not re.search(r"<\|assistant\|>\d{10}<\|end\|>", prompt + completion)
        assert not re.search(r"<\|user\|>[A-Z][a-z]+ [A-Z][a-z]+:?<\|end\|>", prompt)


def test_an_interrupted_build_resumes_to_the_same_weights(library: StandardLibrary, tmp_path: Path) -> None:
    recipe = build.Recipe(
        steps=6, text_rows=1, lookup_rows=1, explained_rows=1, row_tokens=32, long_row_tokens=64, long_share=0.4,
        fact_rows=2, fact_row_tokens=24, fact_slots=4, fact_exposures=2, warmup_steps=2,
    )  # fmt: skip
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base_path() / "tokenizer.json"))
    text = np.array(
        tokenizer.encode("\n".join(library.documents["argparse.py"].splitlines()[:200])).ids, dtype=np.uint16
    )
    batches = build.Batches(recipe, tokenizer, library, text)
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()

    whole = build.Training(recipe)
    build.train(whole, batches, tmp_path / "whole", compiled=False, checkpoint_steps=3)

    first = build.Training(recipe)
    first.recipe = replace(recipe)  # the same recipe; only three of its six steps are run here
    stop_after(first, 3, batches, tmp_path / "halves")
    second = build.Training(recipe)
    build.train(second, batches, tmp_path / "halves", compiled=False, checkpoint_steps=3)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def stop_after(training: build.Training, steps: int, batches: build.Batches, work: Path) -> None:
    """Run a training that is interrupted right after its checkpoint at ``steps``."""
    update = training.update

    def interrupted() -> None:
        if training.step == steps:
            raise KeyboardInterrupt
        update()

    training.update = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        build.train(training, batches, work, compiled=False, checkpoint_steps=steps)
