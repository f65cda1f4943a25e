"""Answers of the tests' Hub, and the ways to spoil one.

What huggingface_hub 2.4 made of each when it was tried, which push and pull rest on:

"Waits" are the client's own pauses between tries: 1, 2, 4, 8 and 8 s where it backs off, 1 s each where a download
goes on. "Raw" is an error of its HTTP library, outside the tree of `huggingface_hub.errors`: RemoteProtocolError for
a connection dropped, cut short or with headers above 100 kB, ReadTimeout, ConnectError.

    hf_hub_download asks HEAD, then GET
      HEAD 500, 503, 429           once more at once, then with five waits; then LocalEntryNotFoundError
      HEAD slow                    a second try with 60 s instead of etag_timeout (10 s)
      HEAD dropped, long header    raw, at once
      HEAD with another size       OSError "Consistency check failed", or ValueError where it says more than 50 GB
      HEAD with ".." in the ETag   into a local_dir: FileNotFoundError; into the cache: WRITES WHERE IT SAYS
      GET 500, 503                 HfHubHTTPError, at once (429: five waits)
      GET dropped, truncated, slow five times more, one wait each, on from the last whole 10 MiB; then raw
      GET of another size          OSError "Consistency check failed"
      GET of other bytes           NOTHING IS NOTICED: the client compares no hash
      not there                    RemoteEntryNotFoundError; LocalEntryNotFoundError means that no answer came.
                                   Both are EntryNotFoundError, so catching that one takes an outage for an absence.
    list_repo_tree (and within snapshot_download)
      500, dropped, truncated      five waits; then HfHubHTTPError or raw (snapshot_download: LocalEntryNotFoundError
                                   instead of the former)
      not JSON, a field missing    JSONDecodeError, KeyError
      sizes not true               nothing is noticed
      names                        ValueError for "..", "\\", absolute or with a drive, after other files have come;
                                   nothing against .git/config, .cache/huggingface/... (the client's own notes in a
                                   local_dir), line feeds, or a name that is another's folder
    model_info                     500: HfHubHTTPError; dropped: raw; no second try
    create_commit
      preupload, LFS batch         five waits; then HfHubHTTPError or raw
      LFS PUT, verify              five waits; then RuntimeError, the cause in `__cause__`
      commit 412, 500              HfHubHTTPError at once
      commit dropped               raw at once, WHETHER OR NOT IT TOOK EFFECT: look at the head afterwards
    create_repo                    500: HfHubHTTPError; dropped: raw; no second try
    no token                       RepositoryNotFoundError (401); a wrong token: HfHubHTTPError (401); another's: 403
    Hub not reachable              downloads: LocalEntryNotFoundError (a lone file after five waits); else raw
    offline                        downloads: LocalEntryNotFoundError; else OfflineModeIsEnabled; no request, no wait
      a local_dir with anything in snapshot_download RETURNS IT AS IF IT WERE WHOLE, unreachable or offline

Only downloads and model_info(timeout=...) ever time out: every other call waits for an answer for good.
"""

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


def rewritten(change: Callable[[Any], Any]) -> Fault:
    """The answer's JSON changed: other sizes or names in a listing, fields that are missing."""
    return Fault(lambda answer: replace(answer, body=json.dumps(change(json.loads(answer.body))).encode()))
