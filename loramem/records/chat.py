"""What a chat server makes of a key: the chat template rendered with it as the user's message, then tokenized.

loramem joins the ids around a key with the ids of the key. A server tokenizes the whole text instead, which differs
where the tokenizer merges over the seam or the template trims. Where the server's ids can stand for the key, today and
tomorrow, a record is written with them; where they cannot, only a prompt given as ids gets its value.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

DATED = "date"  # the template shows the time of the day: tomorrow's ids are others
OTHER = "template"  # it does not give the store's prefix and suffix any more
REFUSED = "refused"  # it cannot be rendered with this key
CHANGED = "changed"  # it, or the tokenizer, drops or changes something of the key: other keys would get the same ids
LONG = "length"  # its ids exceed the context
TAKEN = "taken"  # another key has these ids already

_BATCH = 512  # texts that are rendered and tokenized together


class Around(Protocol):
    """The ids around a key, frozen when a store was made: `loramem.records.prompts.PromptTemplate`."""

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...
    @property
    def suffix_ids(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Chat:
    """How a chat server would ask for a key, compared with prefix + key + suffix: the same unless something is set."""

    ids: tuple[int, ...] | None = None
    """The template's own, where they differ and can stand for the key."""
    why: str | None = None
    """Why they cannot (a word, see above)."""

    def kept(self) -> dict[str, Any]:
        """What the index keeps of it: whether the key may be asked by chat, and ids other than the joined ones."""
        if self.why is not None:
            return {"chat": False, "why": self.why}
        return {"chat": True} if self.ids is None else {"chat": True, "ids": list(self.ids)}


SAME = Chat()


def render(tokenizer: Any, turns: Sequence[tuple[str, str]], *, generate: bool, **variables: Any) -> str:
    """The chat template as text; raises whatever the template does."""
    messages = [{"role": role, "content": content} for role, content in turns]
    # Templates ignore variables they do not know; Qwen3's opens a reasoning block unless told not to.
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generate, enable_thinking=False, **variables
    )
    return text


def is_dated(tokenizer: Any, turns: Sequence[tuple[str, str]], text: str) -> bool:
    """Whether the clock had a part in how the chat template showed turns before an answer."""
    try:
        # Transformers hands templates the clock as a function of this name, which a variable of the same name hides.
        return render(tokenizer, turns, generate=True, strftime_now="") != text
    except Exception:  # it was called
        return True


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """Ids of many texts, without special tokens around them; several times faster than one by one."""
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def compare(
    tokenizer: Any, around: Around, placeholder: str, keys: Sequence[str], joined: Sequence[Sequence[int]]
) -> list[Chat]:
    """What a chat server would make of keys.

    Args:
        placeholder: A key that the template shows once, as it is.
        joined: Prefix, key and suffix of each key.
    """
    if why := _unsteady(tokenizer, around, placeholder):
        return [Chat(why=why)] * len(keys)
    shown = _decode(tokenizer, next(token_ids(tokenizer, [_message(tokenizer, placeholder)])))
    texts = list(_messages(tokenizer, keys))
    ids = token_ids(tokenizer, (text for text in texts if text is not None))
    found = []
    for key, text, ours in zip(keys, texts, joined, strict=True):
        if text is None:
            found.append(Chat(why=REFUSED))
        elif (theirs := next(ids)) == list(ours):
            found.append(SAME)
        # Ids that show each key to the letter are different ids for different keys.
        elif _decode(tokenizer, theirs) == shown.replace(placeholder, key):
            found.append(Chat(tuple(theirs)))
        else:
            found.append(Chat(why=CHANGED))
    return found


def _unsteady(tokenizer: Any, around: Around, placeholder: str) -> str | None:
    """Why the template as a whole cannot be relied on, if it cannot."""
    try:
        text = _message(tokenizer, placeholder)
    except Exception:  # a template is a program, and may raise anything
        return REFUSED
    if is_dated(tokenizer, [("user", placeholder)], text):
        return DATED
    parts = text.split(placeholder)
    if len(parts) != 2 or [*map(tuple, token_ids(tokenizer, parts))] != [around.prefix_ids, around.suffix_ids]:
        return OTHER
    return None


def _message(tokenizer: Any, key: str) -> str:
    return render(tokenizer, [("user", key)], generate=True)


def _messages(tokenizer: Any, keys: Iterable[str]) -> Iterator[str | None]:
    """The template with each key, None where it fails."""

    def one(key: str) -> str | None:
        try:
            return _message(tokenizer, key)
        except Exception:
            return None

    rest = iter(keys)
    while batch := list(islice(rest, _BATCH)):
        chats = [[{"role": "user", "content": key}] for key in batch]
        try:
            texts = tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception:  # for some key, or this tokenizer takes one conversation at a time
            texts = map(one, batch)
        yield from texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
