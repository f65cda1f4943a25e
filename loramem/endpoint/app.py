"""The endpoint as a Starlette application: routes, and what goes wrong on them as answers.

Nothing that was asked or answered is logged: what fails unforeseen is logged by its kind and place alone.
"""

import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Literal

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from loramem.endpoint.admission import Admission
from loramem.endpoint.backends import Backend, Turns
from loramem.endpoint.limits import Limits
from loramem.endpoint.problems import problem
from loramem.endpoint.protocol import (
    Answer,
    ChatRequest,
    Request,
    TextRequest,
    check_whole,
    completion,
    dumps,
    events,
    models,
    parse,
    question_of,
)
from loramem.errors import KeyNotFound, LoramemError, RequestRefused

log = logging.getLogger(__name__)

Unknown = Literal["error", "base"]
"""What becomes of a key that no record has: an error with close keys, or the base model's own answer."""
_Handler = Callable[[HttpRequest], Awaitable[Response]]


class Endpoint:
    """The routes over one backend.

    Args:
        backend: Who decodes.
        admission: Who is let in.
        unknown: See `Unknown`.
    """

    def __init__(self, backend: Backend, admission: Admission, unknown: Unknown = "error") -> None:
        self.backend, self.admission, self.unknown = backend, admission, unknown
        self.started = int(time.time())

    def app(self) -> Starlette:
        """The application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with self.backend.running():
                yield

        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/v1/models", self._guarded(self._models), methods=["GET"]),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._text), methods=["POST"]),
        ]
        handlers = {404: _no_route, 405: _no_route}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    def _guarded(self, handler: _Handler) -> _Handler:
        async def guarded(request: HttpRequest) -> Response:
            try:
                self.admission.check(request)
                return await handler(request)
            except LoramemError as error:
                return problem(error)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                log.error("%s at %s:%s", type(error).__name__, where.filename, where.lineno)  # its text may hold a key
                return problem(LoramemError("The server failed at this request; its log says where."))

        return guarded

    async def _health(self, _: HttpRequest) -> Response:
        return Response(dumps({"status": "ok"}), media_type="application/json")

    async def _models(self, _: HttpRequest) -> Response:
        async with self.admission.room():
            held = await self.backend.namespaces()
        return Response(dumps(models(held, self.started)), media_type="application/json")

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._complete(parse(ChatRequest, await self.admission.body(request)))

    async def _text(self, request: HttpRequest) -> Response:
        return await self._complete(parse(TextRequest, await self.admission.body(request)))

    async def _complete(self, request: Request) -> Response:
        async with self.admission.room():
            answer = await self._answer(request)
        if request.stream:
            return StreamingResponse(_each(events(request, answer)), media_type="text/event-stream")
        return Response(dumps(completion(request, answer)), media_type="application/json")

    async def _answer(self, request: Request) -> Answer:
        try:
            answer = await self.backend.recall(question_of(request))
        except KeyNotFound:
            if self.unknown == "error":
                raise
            return await self.backend.converse(_turns(request), self._tokens(request))
        check_whole(request, answer)
        return answer

    def _tokens(self, request: Request) -> int:
        limits: Limits = self.admission.limits
        asked = request.max_completion_tokens or request.max_tokens or limits.base_tokens
        return min(asked, limits.base_tokens)


def _turns(request: Request) -> Turns | str:
    """The whole conversation, or the prompt.

    Raises:
        RequestRefused: A turn is no text.
    """
    if isinstance(request, TextRequest):
        return request.key or ""
    turns = [(message.role, message.text) for message in request.messages]
    if any(text is None for _, text in turns):
        raise RequestRefused("A message is no text.", status=400, code="invalid_request", param="messages")
    return [(role, text or "") for role, text in turns]


async def _each(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def _no_route(request: HttpRequest, error: Exception) -> Response:
    status = 405 if request.url.path in ("/health", "/v1/models", "/v1/chat/completions", "/v1/completions") else 404
    return problem(
        RequestRefused(f"There is no {request.method} {request.url.path} here.", status=status, code="unknown_url")
    )
