"""From key and value to token ids: prompt | answer | end token.

The prompt is (prefix ids) + (ids of the key) + (suffix ids). Prefix and suffix come from the base model's chat
template once, when a store is created, and are frozen as ids from then on: a template may contain today's date, or
trim what it is given. Where the template as a chat server tokenizes it gives a key other ids that can stand for it
(`loramem.records.chat`), the prompt is these, and they are kept with the record.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from loramem.errors import (
    NotRoundTrip,
    PromptCollision,
    SpecialTokenInText,
    TooLong,
    UnreachableToken,
    UnsupportedBaseModel,
    is_failure,
    reason,
)
from loramem.records import chat
from loramem.records.record import Record

PLACEHOLDER = "LORAMEM-KEY"
ANSWER_PLACEHOLDER = "LORAMEM-VALUE"


@dataclass(frozen=True)
class PromptTemplate:
    """Token ids around the key, and the id that ends an answer."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    end_id: int
    kind: str
    """"chat" (from the tokenizer's chat template) or "plain" (key, line feed, value)."""

    @classmethod
    def of(cls, tokenizer: Any, unreachable: Collection[int] = (), vocabulary: int | None = None) -> "PromptTemplate":
        """The template of a transformers tokenizer: its chat template, or a plain one if it has none.

        Args:
            unreachable: Ids that the base model cannot give p > 0.5 (`loramem.models.unreachable.unreachable_tokens`).
            vocabulary: Ids that the base model has an embedding for.

        Raises:
            UnsupportedBaseModel: No usable end token, or a chat template that does not contain the key once or needs
                a token that the base model does not have.
        """
        if tokenizer.eos_token_id is None:
            raise UnsupportedBaseModel(
                "The tokenizer has no end-of-sequence token, so that an answer could not end. Set eos_token in its "
                "tokenizer_config.json."
            )
        template = _chat(tokenizer) if tokenizer.chat_template else _plain(tokenizer, unreachable)
        if (
            beyond := first_beyond((*template.prefix_ids, *template.suffix_ids, template.end_id), vocabulary)
        ) is not None:
            raise UnsupportedBaseModel(
                f"The prompt needs the token {tokenizer.convert_ids_to_tokens(beyond)!r} of id {beyond}, and the base "
                f"model has an embedding for {vocabulary} ids. Give the tokenizer that belongs to the weights."
            )
        if template.end_id in unreachable:
            raise UnsupportedBaseModel(
                f"The end token {tokenizer.convert_ids_to_tokens(template.end_id)!r} was never trained in this base "
                "model: its row of the unembedding equals that of another token, so it cannot reach p > 0.5."
            )
        return template

    def prompt_ids(self, tokenizer: Any, key: str) -> list[int]:
        """Ids of the whole prompt for a key, joined; a committed record may have others (`stored_ids`)."""
        return [*self.prefix_ids, *_ids(tokenizer, key), *self.suffix_ids]

    def stored_ids(self, tokenizer: Any, key: str, prompt: Mapping[str, Any] | None) -> list[int]:
        """Ids that a committed record was trained with.

        Args:
            prompt: What its row keeps (`loramem.records.chat.Chat.kept`); "own" in place of "ids" where these are not
            told.
        """
        if prompt is not None and "ids" in prompt:
            return list(prompt["ids"])
        joined = self.prompt_ids(tokenizer, key)
        if prompt is not None and prompt.get("own"):
            return list(self.by_chat(tokenizer, [key], [joined])[0].ids or joined)
        return joined

    def by_chat(self, tokenizer: Any, keys: Sequence[str], joined: Sequence[Sequence[int]]) -> list[chat.Chat]:
        """What a chat server would make of keys now; nothing to compare with for a plain prompt.

        Args:
            joined: `prompt_ids` of each.
        """
        if self.kind != "chat":
            return [chat.Chat()] * len(keys)
        return chat.compare(tokenizer, self, PLACEHOLDER, keys, joined)


def _chat(tokenizer: Any) -> PromptTemplate:
    def render(*turns: tuple[str, str], generate: bool) -> str:
        try:
            return chat.render(tokenizer, turns, generate=generate)
        except Exception as error:  # a template is a program of the model's: it refuses roles, adds None to text…
            raise UnsupportedBaseModel(
                f"The chat template does not take a plain question ({type(error).__name__}: {reason(error)}). Correct "
                "it, or remove it from the model's folder for plain prompts."
            ) from error

    prompt = render(("user", PLACEHOLDER), generate=True)
    if prompt.count(PLACEHOLDER) != 1:
        raise UnsupportedBaseModel(
            f"The chat template shows the user's message {prompt.count(PLACEHOLDER)} times; once is needed."
        )
    prefix, suffix = prompt.split(PLACEHOLDER)
    exchange = render(("user", PLACEHOLDER), ("assistant", ANSWER_PLACEHOLDER), generate=False)
    after = _ids(tokenizer, exchange.partition(ANSWER_PLACEHOLDER)[2])
    # What follows the assistant's text ends the turn (<|im_end|>, <|eot_id|>...); it need not be eos_token.
    end_id = after[0] if after and after[0] in special_ids(tokenizer) else tokenizer.eos_token_id
    return PromptTemplate(tuple(_ids(tokenizer, prefix)), tuple(_ids(tokenizer, suffix)), end_id, "chat")


def _plain(tokenizer: Any, unreachable: Collection[int]) -> PromptTemplate:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end in unreachable and start is not None:
        end = start  # some models saw only the start token between documents
    suffix = tuple(_ids(tokenizer, "\n"))
    if not suffix:
        raise UnsupportedBaseModel("The tokenizer has no token for a line feed, which ends the key in a plain prompt.")
    return PromptTemplate(() if start is None else (start,), suffix, end, "plain")


def _ids(tokenizer: Any, text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except BaseException as error:  # such as a word-level vocabulary without an unknown token
        if not is_failure(error):
            raise
        raise UnsupportedBaseModel(
            f"The tokenizer has no tokens for {text[:40]!r} ({reason(error)}). Use another base model, or encode the "
            "text (base64, \\u escapes)."
        ) from error
    return ids


def _many_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`_ids` of each, several times faster than one by one."""
    try:
        return list(chat.token_ids(tokenizer, texts))
    except BaseException as error:
        if not is_failure(error):
            raise
        return [_ids(tokenizer, text) for text in texts]  # the one that it has no tokens for is named


def first_beyond(ids: Iterable[int], vocabulary: int | None) -> int | None:
    """The first of these ids that a base model of so many has no embedding for; None without one, or a limit."""
    return None if vocabulary is None else next((token for token in ids if token >= vocabulary), None)


@dataclass(frozen=True)
class EncodedRecord:
    """A record as token ids."""

    record: Record
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The value's tokens and the end token: all of them are trained and certified."""
    prompt: Mapping[str, Any] | None = None
    """What the index keeps of the prompt (`loramem.records.chat.Chat.kept`); None for a plain prompt."""
    in_contexts: tuple[tuple[int, ...], ...] = ()
    """Prompts in which the value is trained and proved as well (`loramem.records.contexts`)."""

    @cached_property
    def prompt_sha256(self) -> str:
        """Of the prompt's ids: what the index knows prompts by."""
        return prompt_digest(self.prompt_ids)

    def bare(self) -> "EncodedRecord":
        """What training reads of it: no metadata, nothing that the index keeps of the prompt."""
        return EncodedRecord(self.record.bare(), self.prompt_ids, self.answer_ids, in_contexts=self.in_contexts)

    @property
    def length(self) -> int:
        """ℓ, the number of answer tokens; the end token is not counted (the paper's accounting)."""
        return len(self.answer_ids) - 1

    @property
    def total_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def prompt_digest(prompt_ids: Iterable[int]) -> str:
    """SHA-256 of token ids as JSON writes them, and Python too, which is faster."""
    return hashlib.sha256(str(list(prompt_ids)).encode()).hexdigest()


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of answer ids without the end token, byte for byte: nothing stripped, nothing cleaned up."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def encode_records(
    records: Iterable[Record],
    tokenizer: Any,
    template: PromptTemplate,
    max_tokens: int,
    unreachable: Collection[int] = (),
    vocabulary: int | None = None,
    *,
    kept: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    taken: Callable[[Record, Sequence[int]], bool] = lambda record, ids: False,
) -> list[EncodedRecord]:
    """`tokenize`, then `settle`: records that could come back exactly, and can be told from one another.

    Raises what these raise.
    """
    records = list(records)
    return settle(
        records,
        tokenize(records, tokenizer, template, max_tokens, unreachable, vocabulary, kept=kept),
        max_tokens,
        taken,
    )


Known = Mapping[str, Any] | chat.Chat | None
"""What is known of a record's prompt: kept from before, compared now, or nothing since it is plain."""


class Tokenized(NamedTuple):
    """What a tokenizer makes of a record, whatever other records there are."""

    prompt_ids: tuple[int, ...]
    """Joined, or as kept."""
    answer_ids: tuple[int, ...]
    known: Known


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    template: PromptTemplate,
    max_tokens: int,
    unreachable: Collection[int] = (),
    vocabulary: int | None = None,
    *,
    kept: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> list[Tokenized]:
    """Ids of records, refusing whatever could not come back exactly.

    Args:
        max_tokens: Context length of the base model.
        unreachable: Ids that the base model cannot give p > 0.5.
        vocabulary: Ids that the base model has an embedding for.
        kept: Prompts of records that were written before, by namespace and key; they stay as they are.

    Raises:
        SpecialTokenInText: Key or value contains the text of a special token.
        NotRoundTrip: The value's ids do not decode to the value.
        UnreachableToken: The value needs a token that can never be decoded, or key or value one that the base model
            does not have.
        TooLong: Prompt, answer and end token exceed ``max_tokens``.
    """
    specials = special_texts(tokenizer)
    prompts = _prompts(records, tokenizer, template, kept or {})
    answers = _many_ids(tokenizer, [record.value for record in records])
    found = []
    for record, (ids, known), answer_ids in zip(records, prompts, answers, strict=True):
        for text, name in ((record.key, "key"), (record.value, "value")):
            if special := next((special for special in specials if special in text), None):
                raise SpecialTokenInText(
                    f"The {name} of {record.key!r} contains {special!r}, a special token of this base model. "
                    "Write it differently, or use another base model.",
                    token=special,
                    key=record.key,
                    line=record.line,
                )
        entry = encode_record(record, tokenizer, template, ids, answer_ids)
        if (beyond := first_beyond((*entry.prompt_ids, *entry.answer_ids), vocabulary)) is not None:
            text = str(tokenizer.convert_ids_to_tokens(beyond))
            raise UnreachableToken(
                f"Key {record.key!r} or its value needs the token {text!r} of id {beyond}; this base model has an "
                f"embedding for {vocabulary} ids. Write it differently, or use another base model.",
                token=text,
                key=record.key,
                line=record.line,
            )
        if never := [token for token in entry.answer_ids if token in unreachable]:
            text = str(tokenizer.convert_ids_to_tokens(never[0]))
            raise UnreachableToken(
                f"The value of key {record.key!r} needs the token {text!r}, which this base model never learned: its "
                "row of the unembedding equals that of another token, so it cannot reach p > 0.5. Use another base.",
                token=text,
                key=record.key,
                line=record.line,
            )
        if entry.total_tokens > max_tokens:
            raise TooLong(
                f"Key {record.key!r} needs {entry.total_tokens} tokens (prompt {len(entry.prompt_ids)}, answer "
                f"{entry.length}, end 1); the base model's context is {max_tokens}. Split the value.",
                tokens=entry.total_tokens,
                limit=max_tokens,
                key=record.key,
                line=record.line,
            )
        found.append(Tokenized(entry.prompt_ids, entry.answer_ids, known))
    return found


def _prompts(
    records: Sequence[Record],
    tokenizer: Any,
    template: PromptTemplate,
    kept: Mapping[tuple[str, str], Mapping[str, Any]],
) -> list[tuple[list[int], Known]]:
    """Ids of the prompts, joined or as kept, and what is known of each."""
    keys = [record.key for record in records]
    joined = [[*template.prefix_ids, *ids, *template.suffix_ids] for ids in chat.token_ids(tokenizer, keys)]
    before = [kept.get((record.namespace, record.key)) for record in records]
    fresh = [index for index, prompt in enumerate(before) if prompt is None]
    prompts: list[tuple[list[int], Known]] = [
        (list(prompt.get("ids", ids)) if prompt else ids, prompt) for ids, prompt in zip(joined, before, strict=True)
    ]
    if template.kind == "chat":
        found = template.by_chat(tokenizer, [keys[index] for index in fresh], [joined[index] for index in fresh])
        for index, compared in zip(fresh, found, strict=True):
            prompts[index] = joined[index], compared
    return prompts


def settle(
    records: Sequence[Record],
    tokenized: Sequence[Tokenized],
    max_tokens: int,
    taken: Callable[[Record, Sequence[int]], bool] = lambda record, ids: False,
) -> list[EncodedRecord]:
    """Each record with the prompt it is written with: the template's own ids where nothing speaks against them.

    Args:
        taken: Whether ids are the prompt of another key already.

    Raises:
        PromptCollision: Two keys of one namespace have the same prompt ids.
    """
    used = {
        (record.namespace, ids.prompt_ids)
        for record, ids in zip(records, tokenized, strict=True)
        if not isinstance(ids.known, chat.Chat) or ids.known.ids is None
    }
    settled = []
    for record, (prompt_ids, answer_ids, known) in zip(records, tokenized, strict=True):
        if isinstance(known, chat.Chat):
            own = known.ids
            if own is not None and len(own) + len(answer_ids) > max_tokens:
                known = chat.Chat(why=chat.LONG)
            elif own is not None and ((record.namespace, own) in used or taken(record, own)):
                known = chat.Chat(why=chat.TAKEN)
            elif own is not None:
                prompt_ids = own
            used.add((record.namespace, prompt_ids))
        kept = known.kept() if isinstance(known, chat.Chat) else known
        settled.append(EncodedRecord(record, prompt_ids, answer_ids, kept))
    return _distinct(settled)


def _distinct(encoded: list[EncodedRecord]) -> list[EncodedRecord]:
    prompts: dict[tuple[str, tuple[int, ...]], Record] = {}
    for entry in encoded:
        record = entry.record
        other = prompts.setdefault((record.namespace, entry.prompt_ids), record)
        if other.key != record.key:
            raise PromptCollision(
                f"Keys {other.key!r} and {record.key!r} are the same to this base model: their prompts have the "
                "same token ids. Rename one.",
                other=other.key,
                key=record.key,
                line=record.line,
            )
    return encoded


def encode_record(
    record: Record,
    tokenizer: Any,
    template: PromptTemplate,
    prompt_ids: Sequence[int] | None = None,
    answer_ids: Sequence[int] | None = None,
) -> EncodedRecord:
    """One record as ids, checked for an exact round trip of its value.

    Args:
        prompt_ids: Of a record that was written before; prefix, key and suffix unless given.
        answer_ids: What the tokenizer gives for the value, if it was asked.
    """
    answer = _ids(tokenizer, record.value) if answer_ids is None else list(answer_ids)
    if (got := decode_answer(tokenizer, answer)) != record.value or template.end_id in answer:
        raise NotRoundTrip(
            f"The value of key {record.key!r} does not survive this tokenizer: {record.value!r} comes back as "
            f"{got!r}. Use another base model, or encode the value (base64, \\u escapes).",
            expected=record.value,
            got=got,
            key=record.key,
            line=record.line,
        )
    prompt = template.prompt_ids(tokenizer, record.key) if prompt_ids is None else prompt_ids
    return EncodedRecord(record, tuple(prompt), (*answer, template.end_id))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens; `all_special_ids` knows only those with a role (eos, bos...)."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def special_texts(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer turns into special tokens, longest first."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(texts, key=lambda text: (-len(text), text))
