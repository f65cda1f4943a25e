"""A server that has the store's adapters as the one that decodes: vLLM, SGLang or llama.cpp.

The store still says which adapter holds a key and with which ids it is asked, and still compares what comes back with
the digest. Of the base model only the tokenizer is loaded here.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from loramem import MemoryStore
from loramem.endpoint.backends import Turns
from loramem.endpoint.limits import Limits
from loramem.endpoint.protocol import Answer, Question
from loramem.errors import RecallError, RequestRefused
from loramem.serving.endpoints import Endpoint


class Upstream:
    """A server's answers as a backend; as many questions at once as a batch of our own would have.

    Args:
        server: Is not closed here.
    """

    def __init__(self, store: MemoryStore, server: Endpoint, limits: Limits) -> None:
        self.store, self.server = store, server
        self._threads = ThreadPoolExecutor(limits.batch_records, thread_name_prefix="loramem-upstream")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def recall(self, question: Question) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, question)

    async def converse(self, turns: Turns | str, max_tokens: int) -> Answer:
        raise RequestRefused(
            "No record has this key, and a server that is asked for records is not asked for anything else.",
            status=404,
            code="key_not_found",
        )

    async def namespaces(self) -> list[str]:
        return await asyncio.to_thread(self.store.namespaces)

    def _ask(self, question: Question) -> Answer:
        record, prompt = self.store.prompt(question.key, question.namespace)
        self.server.require([record.adapter])
        most = record.answer_tokens + 2  # the end token, and one beyond: it must have ended
        found = self.server.ask(record.adapter, prompt, most, self.store.manifest.template().end_id)
        text = found.text if found.ids is None else self.store.decode(found.ids)
        if found.refused is not None or not found.ended or not record.holds(text):
            why = found.refused or "it did not give back the committed value, which is not returned"
            raise RecallError(
                f"Adapter {record.adapter} at {self.server.url}: {why}. Run loramem check --server {self.server.url}.",
                key=record.key,
                adapter=record.adapter,
            )
        return Answer(text, len(prompt), record.answer_tokens, adapter=record.adapter, min_prob=record.min_prob)
