"""Long texts with random tokens: what is drawn is what the tokenizer reads again, at evenly spaced positions."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import loramem
from loramem.errors import ArgumentError, InputError
from loramem.planning.long_text import long_text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(loramem.base_path())


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("length", [50, 333])
def test_a_text_has_the_tokens_that_were_asked_for(
    tokenizer: PreTrainedTokenizerBase, length: int, noise: float
) -> None:
    assert len(ids(tokenizer, long_text(tokenizer, length, noise))) == length


def test_noise_replaces_evenly_spaced_tokens_and_no_others(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = ids(tokenizer, long_text(tokenizer, 300, 0.0))
    noisy = ids(tokenizer, long_text(tokenizer, 300, 0.4))
    changed = {place for place, (one, other) in enumerate(zip(plain, noisy, strict=True)) if one != other}
    nominal = {int((i + 0.5) / 0.4) for i in range(120)}
    assert 115 <= len(changed) <= 120  # a drawn token may be the one that stood there
    assert len(changed & nominal) >= 100  # the others stand where the tokenizer lets them
    for end in (50, 100, 200, 300):
        assert len([place for place in changed if place < end]) == pytest.approx(0.4 * end, abs=6)


def test_random_throughout_is_spread_over_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = ids(tokenizer, long_text(tokenizer, 400, 1.0))
    assert len(set(drawn)) > 300
    assert not set(drawn) & set(tokenizer.all_special_ids)


def test_the_seed_decides_the_noise_and_the_document(tokenizer: PreTrainedTokenizerBase) -> None:
    assert long_text(tokenizer, 60, 1.0, seed=1) == long_text(tokenizer, 60, 1.0, seed=1)
    assert long_text(tokenizer, 60, 1.0, seed=1) != long_text(tokenizer, 60, 1.0, seed=2)
    assert long_text(tokenizer, 60, 0.0, seed=1) != long_text(tokenizer, 60, 0.0, seed=2)


@pytest.mark.parametrize(("length", "noise"), [(0, 0.5), (10, -0.1), (10, 1.1)])
def test_nonsense_is_refused(tokenizer: PreTrainedTokenizerBase, length: int, noise: float) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        long_text(tokenizer, length, noise)
    with pytest.raises(InputError, match="too many"):
        long_text(tokenizer, 10**8, 0.0)
