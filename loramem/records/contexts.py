"""Chats that a key comes up in: a system message, earlier turns, and at last the key as the user's message.

To the base model a key in a chat is another prompt. Each such prompt of a record is trained and proved beside the
key alone, with the ids that a chat server makes of the whole; none of them is a row of the index.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramem.errors import ArgumentError, InputError, PromptCollision, TooLong, UnreachableToken, reason
from loramem.records import chat
from loramem.records.prompts import PLACEHOLDER, EncodedRecord, PromptTemplate, first_beyond
from loramem.records.record import lone_surrogate, shown

Context = tuple[tuple[str, str], ...]
"""Role and content of each message before the key."""
Messages = Sequence[Mapping[str, Any]]
"""The same as chat servers take it: ``[{"role": "system", "content": "…"}]``."""


def as_contexts(given: Iterable[Messages]) -> tuple[Context, ...]:
    """Chats, each once, in their order.

    Raises:
        ArgumentError: One is no list of messages that a user's message can follow.
    """
    if isinstance(given, str | Mapping):
        raise _refused(given, "contexts must be a list of chats, each a list of messages")
    return tuple(dict.fromkeys(map(_context, given)))


def _context(messages: Any) -> Context:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _refused(messages, "a chat must be a list of messages, at least one")
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        texts = [text for text in (fields.get("role"), fields.get("content")) if isinstance(text, str)]
        if fields.keys() != {"role", "content"} or len(texts) < 2:
            raise _refused(message, 'a message must be {"role": …, "content": …}, both strings')
        if not texts[0] or any(lone_surrogate(text) is not None for text in texts):
            raise _refused(message, "a message must have a role, and text that UTF-8 can hold")
    if messages[-1]["role"] == "user":
        raise _refused(messages[-1], "a chat must not end with a user's message: the key is the next one")
    return tuple((message["role"], message["content"]) for message in messages)


def saved_contexts(given: Any) -> tuple[Context, ...]:
    """What JSON made of contexts.

    Raises:
        ArgumentError: They are none.
    """
    try:
        return as_contexts([[{"role": role, "content": text} for role, text in context] for context in given])
    except (TypeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise _refused(given, "a chat must be pairs of role and content") from None


def _refused(given: object, rule: str) -> ArgumentError:
    return ArgumentError(f"In contexts, {rule}, not {shown(given)}.", argument="contexts", value=given)


def read_contexts(file: Path) -> tuple[Context, ...]:
    """Chats of a UTF-8 file: a line of JSON for each, or a JSON list of them (``.json``).

    Each is a list of messages, or an object whose ``messages`` are these.

    Raises:
        InputError: It cannot be read, holds none, or one is none; says in which line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {reason(error)}.") from None
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror}.") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    whole = file.suffix.lower() == ".json"
    found = list[Context]()
    for number, line in [(1, text)] if whole else lines:
        try:
            given = json.loads(line)
            found += as_contexts(map(_messages, given if whole and isinstance(given, list) else [given]))
        except (ValueError, RecursionError) as error:
            where = str(file) if whole else f"{file}, line {number}"
            raise InputError(f"{where}: {reason(error, 400)}") from None
    if not found:
        raise InputError(f'{file} holds no chat. Write one a line, such as [{{"role": "system", "content": "…"}}].')
    return tuple(dict.fromkeys(found))


def _messages(given: Any) -> Any:
    return given["messages"] if isinstance(given, Mapping) and given.keys() == {"messages"} else given


def prompts_in(tokenizer: Any, context: Context, keys: Sequence[str]) -> list[tuple[int, ...]]:
    """Ids that a chat server makes of each key as the user's message at the end of a chat; raises what the template
    does."""
    texts = [chat.render(tokenizer, [*context, ("user", key)], generate=True) for key in keys]
    return [tuple(ids) for ids in chat.token_ids(tokenizer, texts)]


def check_contexts(tokenizer: Any, template: PromptTemplate, contexts: Sequence[Context]) -> None:
    """Refuse chats that the base model's template does not show today as it will tomorrow, with the key once.

    Raises:
        ArgumentError: It does not, or there is no such template.
    """
    for context in contexts:
        if template.kind != "chat":
            raise _unfit(context, "it has no chat template")
        turns = [*context, ("user", PLACEHOLDER)]
        try:
            text = chat.render(tokenizer, turns, generate=True)
        except Exception as error:  # a template is a program, and may raise anything
            raise _unfit(context, f"its chat template does not take it ({reason(error)})") from error
        if chat.is_dated(tokenizer, turns, text):
            raise _unfit(context, "its chat template shows the date, so that tomorrow's prompts are others")
        if text.count(PLACEHOLDER) != 1:
            raise _unfit(context, f"its chat template shows the key {text.count(PLACEHOLDER)} times")


def _unfit(context: Context, why: str) -> ArgumentError:
    return ArgumentError(
        f"The base model cannot be asked in the chat {shown(context)}: {why}. Leave it out of the contexts.",
        argument="contexts",
        value=context,
    )


def with_contexts(
    encoded: Sequence[EncodedRecord],
    contexts: Sequence[Context],
    tokenizer: Any,
    template: PromptTemplate,
    max_tokens: int,
    vocabulary: int | None,
) -> list[EncodedRecord]:
    """Records with their prompts in each chat.

    Args:
        max_tokens, vocabulary: See `loramem.records.prompts.tokenize`.

    Raises:
        ArgumentError: See `check_contexts`.
        TooLong: A chat, a key and its value exceed ``max_tokens``.
        UnreachableToken: One has a token that the base model does not have.
        PromptCollision: Two keys have the same ids in a chat.
    """
    check_contexts(tokenizer, template, contexts)
    keys = [entry.record.key for entry in encoded]
    asked = {(entry.record.namespace, entry.prompt_ids): entry.record for entry in encoded}
    found: list[tuple[tuple[int, ...], ...]] = [()] * len(encoded)
    for context in contexts:
        for number, (entry, ids) in enumerate(zip(encoded, prompts_in(tokenizer, context, keys), strict=True)):
            record, size = entry.record, len(ids) + len(entry.answer_ids)
            if size > max_tokens:
                raise TooLong(
                    f"Key {record.key!r} in the chat {shown(context)} needs {size} tokens with its value; the base "
                    f"model's context is {max_tokens}. Shorten the chat.",
                    tokens=size,
                    limit=max_tokens,
                    key=record.key,
                    line=record.line,
                )
            if (beyond := first_beyond(ids, vocabulary)) is not None:
                text = str(tokenizer.convert_ids_to_tokens(beyond))
                raise UnreachableToken(
                    f"The chat {shown(context)} needs the token {text!r} of id {beyond}; this base model has an "
                    f"embedding for {vocabulary} ids. Write it differently.",
                    token=text,
                    key=record.key,
                    line=record.line,
                )
            other = asked.setdefault((record.namespace, ids), record)
            if other.key != record.key:
                raise PromptCollision(
                    f"Keys {other.key!r} and {record.key!r} are the same to this base model in the chat "
                    f"{shown(context)}: their prompts have the same token ids. Rename one.",
                    other=other.key,
                    key=record.key,
                    line=record.line,
                )
            found[number] = (*found[number], ids)
    return [replace(entry, in_contexts=ids) for entry, ids in zip(encoded, found, strict=True)]


def asked_in_contexts(encoded: Iterable[EncodedRecord]) -> list[EncodedRecord]:
    """Each record in each chat, as an example of its own; the chats of a record one after another."""
    return [replace(entry, prompt_ids=ids, in_contexts=()) for entry in encoded for ids in entry.in_contexts]


def owners(encoded: Sequence[EncodedRecord]) -> list[int]:
    """Of records, and then of `asked_in_contexts` of them: whose each is, by number."""
    numbers = range(len(encoded))
    return [*numbers, *(number for number in numbers for _ in encoded[number].in_contexts)]
