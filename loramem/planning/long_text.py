"""One long text of a given number of tokens, with a given share of them replaced by random ones.

The paper's long-context task: tokens at evenly spaced positions are replaced, so that every prefix has nearly the
nominal share (arXiv 2605.30260). Random tokens are drawn so that the text gives the same tokens when it is read
again: what is drawn is what is learned.
"""

import random
from collections.abc import Collection, Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from loramem.embedded.corpus import is_held_out, standard_library
from loramem.errors import ArgumentError, InputError, RecordError

WINDOW = 16  # tokens before and after a drawn one that a tokenizer could merge it with
DRAWS = 200


def long_text(
    tokenizer: PreTrainedTokenizerBase, length: int, noise: float, seed: int = 0, excluded: Collection[int] = ()
) -> str:
    """Standard-library source that loramem-tiny was never trained on, with random tokens in it.

    Args:
        length: Tokens.
        noise: Share of random tokens, from 0 to 1; at positions floor((i + ½) / noise), or just after.
        seed: Of the random tokens, and of the document that the text begins with; 0 is the first.
        excluded: See `with_noise`.

    Raises:
        ArgumentError: The noise is not a share, or the length is not positive.
        InputError: There is not as much source.
        RecordError: The tokenizer does not give the drawn tokens back.
    """
    _check(length, noise)
    return with_noise(tokenizer, _source(tokenizer, length, seed), noise, seed, excluded)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[int]:
    """The first ``length`` tokens of a text, or a few fewer: no cut inside what the tokenizer reads as one.

    Raises:
        ArgumentError: The length is not positive.
        InputError: The text is shorter, or its tokens are not read again as they are anywhere near the end.
    """
    _check(length, 0.0)
    ids = _encode(tokenizer, text)
    if len(ids) < length:
        raise InputError(f"The text has {len(ids):,} tokens of this base model, {length:,} are asked for.")
    for end in range(length, max(length - WINDOW, 0), -1):
        if _encode(tokenizer, _decode(tokenizer, ids[:end])) == ids[:end]:
            return ids[:end]
    raise InputError(f"This tokenizer does not read the first {length:,} tokens of the text again as they are.")


def with_noise(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    noise: float,
    seed: int,
    excluded: Collection[int] = (),
) -> str:
    """The text of tokens, of which a share is replaced by random ones.

    Args:
        ids: n tokens that are read again as they are.
        noise: Share of random tokens k/n, from 0 to 1; at positions floor((i + ½) n/k), or just after.
        seed: Of the random tokens.
        excluded: Tokens that are not drawn, besides those that were added to the vocabulary.

    Raises:
        ArgumentError: The noise is not a share, or there are no tokens.
        RecordError: The tokenizer does not give the drawn tokens back.
    """
    _check(len(ids), noise)
    places = noise_places(len(ids), noise)
    if not places:
        return _decode(tokenizer, ids)
    return _decode(tokenizer, _replaced(tokenizer, ids, places, random.Random(seed), excluded))


def noise_places(length: int, noise: float) -> set[int]:
    """Evenly spaced positions, floor((i + ½) n/k) for i below k, of a share k/n of n tokens (arXiv 2605.30260)."""
    replaced = round(length * noise)
    return {int((i + 0.5) * length / replaced) for i in range(replaced)}


def _check(length: int, noise: float) -> None:
    if not 0 <= noise <= 1:
        raise ArgumentError(f"noise must be between 0 and 1, not {noise}", argument="noise", value=noise)
    if length < 1:
        raise ArgumentError(f"length must be at least 1, not {length}", argument="length", value=length)


def _source(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[int]:
    ids: list[int] = []
    texts = [text for name, text in standard_library().documents.items() if is_held_out(name) and text.strip()]
    first = seed % len(texts)
    for text in texts[first:] + texts[:first]:
        ids += _encode(tokenizer, text)
        if len(ids) >= length:
            return ids[:length]
    raise InputError(f"The held-out standard library has {len(ids):,} tokens, {length:,} are too many.")


def _replaced(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    places: set[int],
    rng: random.Random,
    excluded: Collection[int],
) -> list[int]:
    """The tokens with random ones at these places; at the next one where none stays itself between its neighbours."""
    never = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *excluded}
    vocabulary = [token for token in range(len(tokenizer)) if token not in never]
    mixed, waiting = list[int](), 0
    for place, token in enumerate(ids):
        waiting += place in places
        before = mixed[-WINDOW:]
        after = [ids[p] for p in takewhile(lambda p: p not in places, range(place + 1, min(place + WINDOW, len(ids))))]
        drawn = (rng.choice(vocabulary) for _ in range(DRAWS if waiting else 0))
        fitting = (token for token in drawn if _stays(tokenizer, [*before, token, *after], len(before)))
        chosen = next(fitting, None)
        waiting -= chosen is not None
        mixed.append(token if chosen is None else chosen)
    if waiting or _encode(tokenizer, _decode(tokenizer, mixed)) != mixed:
        raise RecordError("This tokenizer does not give random tokens back as they were drawn; take another seed.")
    return mixed


def _stays(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], place: int) -> bool:
    """Whether the tokens around ``place`` are read as they were drawn.

    At the edges of the window other neighbours are missing, which may change how a token is read (spaces belong to
    what follows them), so the last one is left to the next draw, and those far on the left are not compared.
    """
    again, left = _encode(tokenizer, _decode(tokenizer, ids)), max(place - 2, 0)
    compared, kept = again[len(again) - len(ids) + left :], list(ids[left:])
    return compared[: place + 1 - left] == kept[: place + 1 - left] and compared[:-1] == kept[:-1]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
