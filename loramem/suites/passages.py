"""What a suite has predicted to see what an adapter does to it: neutral text, and questions for keys nobody wrote."""

import random
from collections.abc import Sequence
from pathlib import Path

from loramem.embedded.corpus import is_held_out, standard_library
from loramem.errors import InputError
from loramem.models.base_model import BaseModel
from loramem.records.prompts import encode_records
from loramem.records.record import Record
from loramem.suites.divergence import Passage, windows
from loramem.training.neutral import held_out_passages

WINDOW = 256  # tokens that are read together
DOCUMENTATION, SOURCE, UNKNOWN, HELD_OUT = "documentation", "source code", "unknown keys", "held-out text"
HELD_OUT_TOKENS = 5_000


def every_passage(
    base: BaseModel, strangers: Sequence[Record], data: Path | None, tokens: int, seed: int
) -> dict[str, list[Passage]]:
    """All of it by name: natural text, text that nothing here was trained on, and questions.

    Args:
        strangers: Records that were never written.
        data, tokens, seed: See `neutral_passages`.
    """
    held_out = [
        Passage((*one.prompt_ids, *one.answer_ids), len(one.prompt_ids))
        for one in held_out_passages(base, min(HELD_OUT_TOKENS, tokens))
    ]
    return {**neutral_passages(base, data, tokens, seed), HELD_OUT: held_out, UNKNOWN: questions(base, strangers)}


def neutral_passages(base: BaseModel, data: Path | None, tokens: int, seed: int) -> dict[str, list[Passage]]:
    """Natural text by name, as windows of token ids; about ``tokens`` of each.

    Args:
        data: A file in place of documentation and source code.

    Raises:
        InputError: The file is not UTF-8, or shorter than a window.
    """
    found = {}
    for name, documents in neutral_documents(data, seed).items():
        width, ids = min(WINDOW, base.max_tokens), list[int]()
        for document in documents:
            ids += base.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= tokens:
                break
        found[name] = windows(ids[: max(tokens, width)], width, base.tokenizer.bos_token_id)
        if not found[name]:
            raise InputError(f"{name} has {len(ids)} tokens; neutral text needs at least {width}.")
    return found


def neutral_documents(data: Path | None, seed: int) -> dict[str, list[str]]:
    """Texts by name: a file's; or shuffled topics of Python's documentation and source that loramem-tiny never saw.

    loramem-tiny was trained on nearly all topics, so that its loss on them is low and damage shows; source code held
    out of its training is text that it can only generalise to.

    Raises:
        InputError: The file is not UTF-8.
    """
    if data is not None:
        try:
            return {data.name: [data.read_text(encoding="utf-8")]}
        except UnicodeDecodeError as error:
            raise InputError(f"{data} is not UTF-8: {error}.") from None
    documents, rng = standard_library().documents, random.Random(seed)
    topics = [text for name, text in documents.items() if name.startswith("topic:")]
    source = [text for name, text in documents.items() if not name.startswith("topic:") and is_held_out(name)]
    return {DOCUMENTATION: rng.sample(topics, len(topics)), SOURCE: rng.sample(source, len(source))}


def questions(base: BaseModel, strangers: Sequence[Record]) -> list[Passage]:
    """The store's prompt for keys that it does not hold, each with the first token of the value it could have had."""
    encoded = encode_records(strangers, base.tokenizer, base.template, base.max_tokens, base.unreachable)
    return [Passage((*one.prompt_ids, one.answer_ids[0]), len(one.prompt_ids)) for one in encoded]
