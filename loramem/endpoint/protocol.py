"""OpenAI's chat and text completions: what of a request counts here, and what an answer looks like.

The key is the last user message, or the prompt, to the letter. What a recalled record cannot be (one of several
samples, cut short, with log-probabilities) is refused rather than ignored; how to sample is ignored, for an answer is
decoded greedily whatever is asked.
"""

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from loramem.errors import RequestRefused
from loramem.records.record import Record

MODEL = "loramem"
"""Name of the default namespace's model; another namespace's is this, a slash, and its name."""


class _Part(BaseModel):
    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a chat."""

    role: str
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str | None:
        """Its content where that is text; None for anything else."""
        if not isinstance(self.content, list):
            return self.content
        return self.content[0].text if len(self.content) == 1 and self.content[0].type == "text" else None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Format(BaseModel):
    type: str


class _Request(BaseModel):
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | int | None = None
    response_format: _Format | None = None


class ChatRequest(_Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)

    @property
    def key(self) -> str | None:
        """The last user message; None without one that is a text."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), None)


class TextRequest(_Request):
    """Body of /v1/completions."""

    prompt: str | list[str]

    @property
    def key(self) -> str | None:
        """The prompt; None if there are several."""
        if isinstance(self.prompt, str):
            return self.prompt
        return self.prompt[0] if len(self.prompt) == 1 else None


Request = ChatRequest | TextRequest
_Kind = TypeVar("_Kind", ChatRequest, TextRequest)


def parse(kind: type[_Kind], body: bytes) -> _Kind:
    """A request from its body.

    Raises:
        RequestRefused: It is not JSON, lacks a field, or asks for what a record cannot be.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestRefused(
            f"{where or 'The body'}: {first['msg']}.", status=400, code="invalid_request", param=where or None
        ) from None
    asked = {
        "n": request.n not in (None, 1),
        "best_of": request.best_of not in (None, 1),
        "echo": bool(request.echo),
        "suffix": bool(request.suffix),
        "logprobs": request.logprobs not in (None, False),
        "response_format": request.response_format is not None and request.response_format.type != "text",
    }
    if refused := [name for name, given in asked.items() if given]:
        raise RequestRefused(
            f"A record has one answer, as it was written: leave {refused[0]} out.",
            status=400,
            code="unsupported_parameter",
            param=refused[0],
        )
    return request


@dataclass(frozen=True)
class Question:
    """What is asked of the store."""

    namespace: str
    key: str


def question_of(request: Request) -> Question:
    """The key of a request, and the namespace that its model stands for.

    Raises:
        RequestRefused: No such model, or no key.
        RecordError: No record can have this key or namespace.
    """
    head, _, namespace = request.model.partition("/")
    if head != MODEL or request.model == MODEL + "/":
        raise RequestRefused(
            f"There is no model {request.model!r}. Use {MODEL!r}, or {MODEL + '/NAMESPACE'!r} for another namespace.",
            status=404,
            code="model_not_found",
            param="model",
        )
    if request.key is None:
        what = "a user message of one text" if isinstance(request, ChatRequest) else "one prompt"
        where = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise RequestRefused(f"Give the key as {what}.", status=400, code="no_key", param=where)
    Record(request.key, "?", namespace)
    return Question(namespace, request.key)


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    """The end token not counted."""
    ended: bool = True
    """False for an answer of the base model that was cut at the most tokens asked for."""
    adapter: str | None = None
    """None for an answer of the base model, which is no record."""
    min_prob: float | None = None


def check_whole(request: Request, answer: Answer) -> None:
    """Refuse what would cut a record: it is answered whole or not at all.

    Raises:
        RequestRefused: The record is longer than asked for, or holds a stop sequence.
    """
    for name in ("max_tokens", "max_completion_tokens"):
        most = vars(request)[name]
        if most is not None and most < answer.completion_tokens:
            raise RequestRefused(
                f"The record has {answer.completion_tokens} tokens, and {name} is {most}: it is not cut. Allow as "
                f"many, or leave {name} out.",
                status=400,
                code="answer_too_long",
                param=name,
            )
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if any(stop and stop in answer.text for stop in stops):
        raise RequestRefused(
            "The record holds a stop sequence: it is not cut. Leave stop out.", status=400, code="answer_stops",
            param="stop",
        )  # fmt: skip


def completion(request: Request, answer: Answer) -> dict[str, Any]:
    """The body of an answer."""
    chat = isinstance(request, ChatRequest)
    said: dict[str, Any] = (
        {"message": {"role": "assistant", "content": answer.text, "refusal": None}} if chat else {"text": answer.text}
    )
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": _finish(answer)}
    return {**_head(request, answer, stream=False), "choices": [choice], "usage": _usage(answer)}


def events(request: Request, answer: Answer) -> Iterator[bytes]:
    """The same as server-sent events. A record comes in one piece: nothing is sent before its digest agreed."""
    head = _head(request, answer, stream=True)

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + dumps({**head, "choices": choices, **more}) + b"\n\n"

    def choice(content: str | None, finish: str | None) -> list[dict[str, Any]]:
        if isinstance(request, ChatRequest):
            delta = {} if content is None else {"role": "assistant", "content": content}
            return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        return [{"index": 0, "text": content or "", "logprobs": None, "finish_reason": finish}]

    yield event(choice(answer.text, None))
    yield event(choice(None, _finish(answer)))
    if request.stream_options is not None and request.stream_options.include_usage:
        yield event([], usage=_usage(answer))
    yield b"data: [DONE]\n\n"


def models(namespaces: list[str], created: int) -> dict[str, Any]:
    """The body of /v1/models: one model per namespace, the default one in any case."""
    names = [MODEL, *(f"{MODEL}/{namespace}" for namespace in namespaces if namespace)]
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": created, "owned_by": MODEL} for name in names],
    }


def dumps(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _head(request: Request, answer: Answer, *, stream: bool) -> dict[str, Any]:
    chat = isinstance(request, ChatRequest)
    kind: Literal["chat.completion.chunk", "chat.completion", "text_completion"] = (
        "text_completion" if not chat else "chat.completion.chunk" if stream else "chat.completion"
    )
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "loramem": {"adapter": answer.adapter, "min_prob": answer.min_prob},  # no field of OpenAI's; clients pass it on
    }


def _finish(answer: Answer) -> str:
    return "stop" if answer.ended else "length"


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completed = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completed, "total_tokens": prompt + completed}
