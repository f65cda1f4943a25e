"""One long text of a given number of tokens, with a given share of them replaced by random ones.

The paper's long-context task: tokens at evenly spaced positions are replaced, so that every prefix has nearly the
nominal share (arXiv 2605.30260). Random tokens are drawn so that the text gives the same tokens when it is read
again: what is drawn is what is learned.
"""

import random
from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from loramem.embedded.corpus import StandardLibrary, is_held_out
from loramem.errors import InputError

WINDOW = 16  # tokens before and after a drawn one that a tokenizer could merge it with
DRAWS = 200


def long_text(tokenizer: PreTrainedTokenizerBase, length: int, noise: float, seed: int = 0) -> str:
    """Standard-library source that loramem-tiny was never trained on, with random tokens in it.

    Args:
        length: Tokens.
        noise: Share of random tokens, from 0 to 1; at positions floor((i + ½) / noise), or just after.
        seed: Of the random tokens, and of the document that the text begins with; 0 is the first.

    Raises:
        ValueError: The noise is not a share, or the length is not positive.
        InputError: The tokenizer does not give the drawn tokens back.
    """
    if not 0 <= noise <= 1 or length < 1:
        raise ValueError(f"noise must be between 0 and 1 and length at least 1, not {noise} and {length}")
    replaced = round(length * noise)
    places = {int((i + 0.5) * length / replaced) for i in range(replaced)}
    ids = _source(tokenizer, length, seed)
    return _decode(tokenizer, _replaced(tokenizer, ids, places, random.Random(seed)) if places else ids)


def _source(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[int]:
    ids: list[int] = []
    texts = [text for name, text in StandardLibrary().documents.items() if is_held_out(name) and text.strip()]
    first = seed % len(texts)
    for text in texts[first:] + texts[:first]:
        ids += _encode(tokenizer, text)
        if len(ids) >= length:
            return ids[:length]
    raise ValueError(f"The held-out standard library has {len(ids)} tokens, {length} are too many.")


def _replaced(tokenizer: PreTrainedTokenizerBase, ids: list[int], places: set[int], rng: random.Random) -> list[int]:
    """The tokens with random ones at these places; at the next one where none stays itself between its neighbours."""
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(len(tokenizer)) if token not in special]
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
        raise InputError("This tokenizer does not give random tokens back as they were drawn; take another seed.")
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
