"""Who decodes: the store's own model, in this process."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

from loramem import MemoryStore
from loramem.endpoint.batcher import Batcher
from loramem.endpoint.limits import Limits
from loramem.endpoint.protocol import Answer, Question
from loramem.errors import LoramemError, RequestRefused, reason
from loramem.records.chat import render
from loramem.results import Recall

Turns = Sequence[tuple[str, str]]
"""Roles and texts of a conversation."""


class Backend(Protocol):
    """Answers questions, each record checked against its digest."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Within this context it can be asked."""
        ...

    async def recall(self, question: Question) -> Answer:
        """A record. Raises what `loramem.MemoryStore.recall` raises."""
        ...

    async def converse(self, turns: Turns | str, max_tokens: int) -> Answer:
        """What the base model says to a conversation, or goes on with after a text: no record, nothing proved."""
        ...

    async def namespaces(self) -> list[str]:
        """Those that hold records."""
        ...


class OwnModel:
    """The store's model, loaded here; concurrent questions are decoded together."""

    def __init__(self, store: MemoryStore, limits: Limits) -> None:
        self.store = store
        self._batcher = Batcher(self._decode, limits)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        decoding = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            decoding.cancel()
            with suppress(asyncio.CancelledError):
                await decoding

    async def recall(self, question: Question) -> Answer:
        return answer_of(await self._batcher.ask(question))

    async def converse(self, turns: Turns | str, max_tokens: int) -> Answer:
        return await self._batcher.alone(lambda: self._continue(turns, max_tokens))

    async def namespaces(self) -> list[str]:
        return await asyncio.to_thread(self.store.namespaces)

    def _decode(self, questions: Sequence[Question]) -> list[Recall | LoramemError]:
        return self.store.recall_each([(question.namespace, question.key) for question in questions])

    def _continue(self, turns: Turns | str, max_tokens: int) -> Answer:
        from loramem.models.decoding import greedy_decode
        from loramem.records.prompts import decode_answer

        base = self.store.base
        prompt = conversation_ids(base.tokenizer, turns)
        if len(prompt) + max_tokens > base.max_tokens:
            raise RequestRefused(
                f"The conversation has {len(prompt)} tokens; with {max_tokens} more it exceeds the base model's "
                f"{base.max_tokens}.",
                status=400,
                code="context_length_exceeded",
            )
        (ids,) = greedy_decode(base.model, [prompt], max_tokens, base.template.end_id)
        return Answer(decode_answer(base.tokenizer, ids), len(prompt), len(ids), ended=len(ids) < max_tokens)


def answer_of(recall: Recall) -> Answer:
    """A recalled record as it is sent back."""
    return Answer(
        recall.value,
        recall.prompt_tokens,
        recall.answer_tokens,
        adapter=recall.adapter,
        min_prob=recall.min_prob,
    )


def conversation_ids(tokenizer: Any, turns: Turns | str) -> list[int]:
    """Token ids of a conversation by the chat template, or of a text where it is one or there is no template.

    Raises:
        RequestRefused: The template does not take it, or it has no tokens.
    """
    text, special = turns, True
    if not isinstance(turns, str):
        if not tokenizer.chat_template:
            text = "\n".join(content for _, content in turns) + "\n"
        else:
            try:
                text, special = render(tokenizer, turns, generate=True), False
            except Exception as error:  # a template is a program of the model's, and refuses roles as it likes
                raise RequestRefused(
                    f"The base model's chat template does not take this conversation ({reason(error)}).",
                    status=400,
                    code="invalid_conversation",
                    param="messages",
                ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise RequestRefused("The prompt has no tokens.", status=400, code="no_key", param="prompt")
    return ids
