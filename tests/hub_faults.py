"""Answers of the tests' Hub, and the ways to spoil one: test_hub_faults.py says what the client makes of each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What goes over the wire; a Content-Length among the headers is sent even if it is not the truth."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0
    dropped: bool = False


class Refusal(Exception):
    """An answer that says no, in the headers that the client reads."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        body = json.dumps({"error": message}).encode()
        named = {"X-Error-Code": code} if code else {}
        self.answer = Answer(status, body, named | {"X-Error-Message": message} | headers)


@dataclass(frozen=True)
class Fault:
    """A change to an answer; `performed` tells whether the request takes effect before."""

    change: Callable[[Answer], Answer]
    performed: bool = True


def status(code: int, message: str = "asked for by the test", **headers: str) -> Fault:
    """A refusal with this status, nothing done."""
    return Fault(lambda _: Refusal(code, "", message, **headers).answer, performed=False)


def stale_parent() -> Fault:
    """What a commit is told when another was faster."""
    return status(412, "A commit has happened since. Please refresh and try again.")


def dropped(performed: bool = False) -> Fault:
    """The connection is closed without an answer, before or after the request took effect."""
    return Fault(lambda answer: replace(answer, dropped=True), performed)


def slow(seconds: float) -> Fault:
    """The right answer, late."""
    return Fault(lambda answer: replace(answer, delay_s=seconds))


def truncated() -> Fault:
    """Half of the body under the length of the whole, then the connection is closed."""

    def half(answer: Answer) -> Answer:
        headers = {**answer.headers, "Content-Length": str(len(answer.body))}
        return replace(answer, body=answer.body[: len(answer.body) // 2], headers=headers)

    return Fault(half)


def other_bytes() -> Fault:
    """A body of the same length, every byte another."""
    return Fault(lambda answer: replace(answer, body=bytes(byte ^ 1 for byte in answer.body)))


def header(name: str, value: str) -> Fault:
    """One header more or another, e.g. a very long one, or a size that is not the truth."""
    return Fault(lambda answer: replace(answer, headers={**answer.headers, name: value}))


def body(content: bytes) -> Fault:
    """Another body, of whatever size, under the headers of the right one."""
    return Fault(lambda answer: replace(answer, body=content))


def rewritten(change: Callable[[Any], Any]) -> Fault:
    """The answer's JSON changed: other sizes or names in a listing, fields that are missing."""
    return Fault(lambda answer: replace(answer, body=json.dumps(change(json.loads(answer.body))).encode()))
