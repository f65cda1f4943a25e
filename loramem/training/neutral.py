"""Neutral positions: where a base is to stay what it is, as features of its end.

Text, the base's own answers to ordinary questions, and its own answers where unknown keys are asked for in the trained
form. All of it is run through the frozen base once; of each position what enters the end is kept, in bfloat16, which
is 2.3 kB for a width of 576. What does not depend on the records is kept in the user's cache, per base.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loramem._util.cache import cache_folder
from loramem.embedded.corpus import standard_library
from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import BaseModel
from loramem.models.batches import group_by_length
from loramem.models.decoding import greedy_decode
from loramem.models.features import PASS_RECORDS, PASS_TOKENS, Features, collect
from loramem.records.contexts import Context, asked_in_contexts, prompts_in
from loramem.records.prompts import EncodedRecord, encode_record
from loramem.records.questions import asking
from loramem.records.record import Record
from loramem.training import neutral_text
from loramem.training.settings import KeepBase
from loramem.training.trainer import autocast_dtype

log = logging.getLogger(__name__)

FORMAT = 1
"""Of cached files and of what they hold: another way of making neutral material is another format."""
WINDOW, WINDOWS = 256, 4
"""Tokens of text that are read together, and how many windows of one document: many documents rather than long ones."""
ANSWER_TOKENS, KEY_ANSWER_TOKENS = 24, 16
"""Of the base's answers to questions and to unknown keys."""
DECODED, COLLECTED = 128, 1024
"""Answers that are decoded together, and sequences whose features are held in the base's dtype at a time."""
HELD_OUT_TEXT, HELD_OUT_KEYS, OTHER_WORDS = 5_000, 200, 40
REFUSALS, NOT_ALIKE = 100, 0.85
"""Unknown keys that are trained to be refused, and how alike (`difflib.SequenceMatcher.ratio`) none of them is to a
key: a gate that opens a crack at a near miss of its key would have to be outweighed there."""
IN_CONTEXTS = 4
"""Of so many questions in chats one with all of the base's answer."""
ANSWERED = 16
"""Of so many unknown keys one with all of the base's answer, the others with its first token."""
TEXT, QUESTIONS, UNKNOWN = "text", "questions", "unknown keys"
NOBODY = Record("neutral", "neutral")


@dataclass(frozen=True)
class Positions:
    """Neutral positions of one kind."""

    features: Features
    """Hidden states in bfloat16; ``mixed`` is empty."""
    first: Tensor
    """(N,) whether an answer begins there."""

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def joined(cls, parts: Sequence["Positions"]) -> "Positions":
        return cls(Features.joined([part.features for part in parts]), torch.cat([part.first for part in parts]))


@dataclass(frozen=True)
class Neutral:
    """Neutral positions by kind: `TEXT`, `QUESTIONS`, `UNKNOWN`."""

    kinds: dict[str, Positions]
    asks: tuple[int, ...] = ()
    """Of the records that are trained, in their order: which key each asks for, by number. The others, last of all, are
    unknown keys with the answer that refuses."""

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))


@dataclass(frozen=True)
class Material:
    """Neutral positions to train with, and others to measure with."""

    trained: Neutral
    measured: Neutral
    questions: tuple[EncodedRecord, ...]
    """Those that are measured, with the base's own answers."""
    other_words: tuple[EncodedRecord, ...] = ()
    """Records that have questions, each in words that none is trained in."""
    other_contexts: tuple[EncodedRecord, ...] = ()
    """Where records are trained in chats: some of them, each in a chat that none is trained in."""
    refusals: tuple[EncodedRecord, ...] = ()
    """Unknown keys with the answer that they are to get, to train with; none where that is the base's own."""
    refused: tuple[EncodedRecord, ...] = ()
    """Others, to measure with: those whose first position is measured."""


def material(
    adapted: AdaptedModel,
    records: Sequence[EncodedRecord],
    keep: KeepBase,
    seed: int,
    contexts: Sequence[Context] = (),
) -> Material:
    """Neutral positions of a base, and such as records' own unknown keys give.

    Args:
        records: Of one adapter.
        contexts: Chats that the records are trained in: questions and unknown keys are asked there too, as many in each
            as without one.
    """
    base, bare = adapted.base, [record.record for record in records]
    keys, templates = neutral_text.keys_of(bare), neutral_text.wordings(bare)
    own = neutral_text.remembered_text(keep.text_sha256)
    with adapted.disabled(), torch.no_grad():  # compared with what the adapter will make of them, in the same dtype
        answers = _answers(base, _prompts(base, neutral_text.held_out_questions(), contexts), ANSWER_TOKENS)
    with adapted.disabled(), torch.no_grad(), _half(base):
        of_base = {
            TEXT: _cached(base, keep, seed, TEXT, own),
            QUESTIONS: _cached(base, keep, seed, QUESTIONS, own),
        }
        asked = neutral_text.worded(
            neutral_text.unknown_keys(keys, keep.unknown_keys, seed, held_out=False), templates, seed
        )
        if contexts:
            of_base[QUESTIONS] = Positions.joined([of_base[QUESTIONS], _asked_in(base, keep, seed, contexts)])
        prompts = _prompts(base, asked, contexts)
        answered = keep.unknown_keys // ANSWERED
        unknown = [
            *_firsts(base, prompts[answered:]),
            *_answers(base, prompts[:answered], KEY_ANSWER_TOKENS),
        ]
        others = neutral_text.worded(
            neutral_text.unknown_keys(keys, HELD_OUT_KEYS, seed, held_out=True), templates, seed
        )
        measured = {
            TEXT: _positions(base, _passages(base, HELD_OUT_TEXT, own, held_out=True)),
            QUESTIONS: _positions(base, answers),
            UNKNOWN: _positions(base, _firsts(base, _prompts(base, others, contexts))),
        }
        trained = {**of_base, UNKNOWN: _positions(base, unknown)}
    log.info("%d neutral positions to train with", sum(map(len, trained.values())))
    refusals, refused = tuple[EncodedRecord, ...](), tuple[EncodedRecord, ...]()
    if keep.unknown:
        far = list(islice((key for key in asked if not get_close_matches(key, keys, 1, NOT_ALIKE)), REFUSALS))
        refusals, refused = (_refusals(base, _prompts(base, some, contexts), keep.unknown) for some in (far, others))
    number = dict[str, int]()
    proved = [entry.record for entry in (*records, *asked_in_contexts(records))]
    return Material(
        Neutral(trained, tuple(number.setdefault(record.question_of or record.key, len(number)) for record in proved)),
        Neutral(measured),
        tuple(answers),
        tuple(_in_other_words(base, records)),
        tuple(_in_other_contexts(base, records, contexts)),
        refusals,
        refused,
    )


def sequences(base: BaseModel, records: Sequence[Record], keep: KeepBase, seed: int) -> list[EncodedRecord]:
    """Neutral material as token ids, in an order that looks random: for a loop that trains through the whole model."""
    asked = neutral_text.questions(keep.questions, seed)
    keys = neutral_text.unknown_keys(neutral_text.keys_of(records), keep.questions, seed, held_out=False)
    found = [
        *_passages(base, keep.text_tokens, "", held_out=False),
        *_answers(base, _prompts(base, asked), ANSWER_TOKENS),
        *_answers(base, _prompts(base, keys), KEY_ANSWER_TOKENS),
    ]
    return random.Random(seed).sample(found, len(found))


def held_out_passages(base: BaseModel, tokens: int) -> list[EncodedRecord]:
    """Windows of text that is never trained on."""
    return _passages(base, tokens, "", held_out=True)


def _refusals(base: BaseModel, prompts: Sequence[tuple[int, ...]], answer: str) -> tuple[EncodedRecord, ...]:
    """Unknown keys with the answer that refuses them."""
    answers = encode_record(Record(answer, answer), base.tokenizer, base.template).answer_ids
    return tuple(replace(entry, answer_ids=answers) for entry in _firsts(base, prompts))


def _in_other_words(base: BaseModel, records: Sequence[EncodedRecord]) -> Iterator[EncodedRecord]:
    """Some of the records that have questions, in words that none has."""
    asked = {record.record.question_of for record in records}
    known = {record.record.key for record in records}
    having = [record for record in records if record.record.question_of is None and record.record.key in asked]
    for number, record in enumerate(having[:: max(1, len(having) // OTHER_WORDS)]):
        words = neutral_text.OTHER_WORDS[number % len(neutral_text.OTHER_WORDS)]
        if (question := asking(words, record.record.key)) not in known:
            yield replace(record, prompt_ids=tuple(base.template.prompt_ids(base.tokenizer, question)))


def _in_other_contexts(
    base: BaseModel, records: Sequence[EncodedRecord], contexts: Sequence[Context]
) -> Iterator[EncodedRecord]:
    """Some of the records, each in a chat that none is trained in."""
    others = [context for context in neutral_text.other_contexts() if context not in contexts]
    some = [record for record in records if record.record.question_of is None] if contexts else []
    for number, record in enumerate(some[:: max(1, len(some) // OTHER_WORDS)]):
        (ids,) = prompts_in(base.tokenizer, others[number % len(others)], [record.record.key])
        if len(ids) + len(record.answer_ids) <= base.max_tokens:
            yield replace(record, prompt_ids=ids)


def _asked_in(base: BaseModel, keep: KeepBase, seed: int, contexts: Sequence[Context]) -> Positions:
    """Questions in chats: some with the base's answers, of more where these begin."""
    questions = neutral_text.questions(keep.questions, seed)
    prompts = _prompts(base, questions, contexts, alone=False)
    answered = prompts[: keep.questions // IN_CONTEXTS]
    return _positions(base, [*_answers(base, answered, ANSWER_TOKENS), *_firsts(base, prompts[len(answered) :])])


def _half(base: BaseModel) -> torch.autocast:
    """Products as fast as the device has them: neutral positions need not be those of one dtype to the last bit."""
    cast = autocast_dtype(base.device)
    return torch.autocast(base.device.type, cast, enabled=cast is not None)


def _cached(base: BaseModel, keep: KeepBase, seed: int, kind: str, own: str) -> Positions:
    """Positions that depend on the base alone, from the cache if they are there."""
    what = {
        "format": FORMAT,
        "kind": kind,
        "base": base.fingerprint.weights,
        "tokenizer": base.fingerprint.tokenizer,
        "template": [base.template.prefix_ids, base.template.suffix_ids],
        "library": standard_library().digest(),
        "size": keep.text_tokens if kind == TEXT else keep.questions,
        "seed": seed,
        "torch": torch.__version__,
        "device": base.device.type,
        "threads": torch.get_num_threads(),  # by which sums are rounded otherwise
    }
    if own and kind == TEXT:
        what["own"] = keep.text_sha256
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_folder() / "neutral" / f"{name}.safetensors"
    if (known := _load(file)) is not None:
        return known
    if kind == TEXT:
        found = _positions(base, _passages(base, keep.text_tokens, own, held_out=False))
    else:
        asked = neutral_text.questions(4 * keep.questions, seed)
        answered = _prompts(base, asked[: keep.questions])
        others = _prompts(base, [*asked[keep.questions :], *neutral_text.excerpts(keep.questions // 2, seed)])
        found = _positions(base, [*_answers(base, answered, ANSWER_TOKENS), *_firsts(base, others)])
    _save(file, found)
    return found


def _load(file: Path) -> Positions | None:
    try:
        columns = load_file(file)
        return Positions(
            Features(**{field.name: columns[field.name] for field in fields(Features)}), columns["first"].bool()
        )
    except (OSError, SafetensorError, KeyError):
        return None


def _save(file: Path, positions: Positions) -> None:
    columns = {field.name: getattr(positions.features, field.name) for field in fields(Features)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".partial")
        save_file({**columns, "first": positions.first.to(torch.uint8)}, beside)
        beside.replace(file)
    except OSError:
        log.debug("%s is not writable", file)


def _positions(base: BaseModel, sequences: Sequence[EncodedRecord]) -> Positions:
    """Features at every answer position of sequences, some of these at a time."""
    parts, first = list[Features](), list[Tensor]()
    for start in range(0, len(sequences), COLLECTED):
        some = sequences[start : start + COLLECTED]
        found = collect(base.model, some, group_by_length(some, range(len(some)), PASS_RECORDS, PASS_TOKENS))
        slim = replace(found, mixed=found.attended[:, :0])
        parts.append(slim.to(torch.bfloat16))
        lengths = torch.tensor([len(each.answer_ids) for each in some], device=found.targets.device)
        begins = torch.zeros(len(found), dtype=torch.bool, device=lengths.device)
        begins[lengths.cumsum(0) - lengths] = True
        first.append(begins)
    return Positions(Features.joined(parts), torch.cat(first))


def _passages(base: BaseModel, tokens: int, own: str, *, held_out: bool) -> list[EncodedRecord]:
    """Windows of text, every token of them predicted from those before it."""
    start = () if base.tokenizer.bos_token_id is None else (base.tokenizer.bos_token_id,)
    width, found, count = min(WINDOW, base.max_tokens) - len(start), list[EncodedRecord](), 0
    for text in neutral_text.documents(held_out=held_out, own=own):
        ids = base.tokenizer(text[: 8 * WINDOWS * width], add_special_tokens=False, verbose=False)["input_ids"]
        for window in list(_windows(ids, width))[:WINDOWS]:
            prompt, rest = (start, window) if start else (window[:1], window[1:])
            found.append(EncodedRecord(NOBODY, tuple(prompt), tuple(rest)))
            count += len(rest)
            if count >= tokens:
                return found
    return found


def _windows(ids: Sequence[int], width: int) -> Iterator[tuple[int, ...]]:
    for first in range(0, len(ids) - width + 1, width):
        yield tuple(ids[first : first + width])


def _firsts(base: BaseModel, prompts: Sequence[tuple[int, ...]]) -> list[EncodedRecord]:
    """Each prompt with one position: where its answer begins."""
    return [EncodedRecord(NOBODY, ids, (base.template.end_id,)) for ids in prompts]


def _answers(base: BaseModel, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[EncodedRecord]:
    """Each prompt with the base's own answer, greedily decoded, cut at so many tokens."""
    answers = dict[int, tuple[int, ...]]()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), DECODED):
        some = order[start : start + DECODED]
        rows = greedy_decode(base.model, [prompts[index] for index in some], tokens, base.template.end_id)
        answers |= {
            index: tuple(row) if len(row) == tokens else (*row, base.template.end_id)
            for index, row in zip(some, rows, strict=True)
        }
    return [EncodedRecord(NOBODY, ids, answers[index]) for index, ids in enumerate(prompts)]


def _prompts(
    base: BaseModel, messages: Sequence[str], contexts: Sequence[Context] = (), *, alone: bool = True
) -> list[tuple[int, ...]]:
    """Prompts that leave room for an answer: of messages, one after another in each chat and, if ``alone``, without."""
    places = [*([None] if alone else []), *contexts]
    every = (
        tuple(base.template.prompt_ids(base.tokenizer, message))
        if (context := places[number % len(places)]) is None
        else prompts_in(base.tokenizer, context, [message])[0]
        for number, message in enumerate(messages)
    )
    return [ids for ids in every if len(ids) <= base.max_tokens - ANSWER_TOKENS]
