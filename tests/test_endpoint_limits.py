"""Clients that are strangers, slow, too many, or talk nonsense are refused with a status; the others are served."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx2
import pytest

from loramem.endpoint import connections
from loramem.endpoint.limits import Limits
from loramem.endpoint.protocol import Answer, Question
from loramem.endpoint.server import CONNECTIONS
from loramem.errors import ArgumentError

from .serving_threads import serving

LIMITS = Limits(body_bytes=1000, body_s=0.5, queue=2, answer_s=0.5)
TOKEN = "correct horse"


class Echo:
    """Answers with the key, once it has waited as long as the key says."""

    def __init__(self) -> None:
        self.asked, self.cancelled = 0, 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def recall(self, question: Question) -> Answer:
        self.asked += 1
        try:
            await asyncio.sleep(float(question.key) if question.key.startswith("0.") or question.key == "9" else 0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Answer(question.key, 1, 1)

    async def namespaces(self) -> list[str]:
        return ["", "team"]


@pytest.fixture
def backend() -> Echo:
    return Echo()


@pytest.fixture
def url(backend: Echo) -> Iterator[str]:
    with serving(backend, LIMITS) as address:
        yield address


def body(key: str) -> dict:
    return {"model": "loramem", "messages": [{"role": "user", "content": key}]}


def post(url: str, content: bytes | dict, **headers: str) -> tuple[int, str]:
    """Status and code of the error, or the answer."""
    sent = content if isinstance(content, bytes) else json.dumps(content).encode()
    with httpx2.Client(timeout=10) as client:
        response = client.post(url + "/chat/completions", content=sent, headers=headers)
    said = response.json()
    return response.status_code, said["error"]["code"] if "error" in said else said["choices"][0]["message"]["content"]


def raw(url: str, request: bytes) -> bytes:
    """What comes back for bytes on the wire, until the server closes or an answer is whole."""
    place, received = urlsplit(url), b""
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        connection.sendall(request)
        if request.endswith(b"gone"):
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            received += part
            if b"\r\n\r\n" in received and received.endswith(b"}"):
                break
    return received


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b'"key"',
        b"\xff\xfe",
        b'{"model": "loramem"}',
        b'{"model": "loramem", "messages": []}',
        b'{"model": "loramem", "messages": "key"}',
        b'{"model": 3, "messages": [{"role": "user", "content": "k"}]}',
        b'{"model": "loramem", "messages": [{"role": "system", "content": "k"}]}',
        b'{"model": "loramem", "messages": [{"role": "user", "content": null}]}',
        b'{"model": "loramem", "messages": [{"role": "user", "content": ""}]}',
        b'{"model": "loramem", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "loramem", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        b'{"model": "loramem", "messages": [{"role": "user", "content": "k"}], "max_tokens": 0}',
        b'{"model": "loramem", "messages": [{"role": "user", "content": "k"}], "stream": "maybe"}',
        b"[" * 900,
    ],
)
def test_malformed_requests_are_bad_requests_and_reach_no_backend(url: str, backend: Echo, content: bytes) -> None:
    status, code = post(url, content)
    assert status == 400 and code in ("invalid_request", "no_key", "invalid_key")
    assert backend.asked == 0
    assert post(url, body("k")) == (200, "k")


def test_a_refusal_does_not_repeat_what_was_sent(url: str) -> None:
    with httpx2.Client() as client:
        text = client.post(url + "/chat/completions", content=b'{"model": ["my secret"], "messages": []}').text
    assert "secret" not in text and "model" in text


def test_a_long_body_is_refused_by_what_it_says_and_by_what_it_is(url: str) -> None:
    assert post(url, body("k" * 1000)) == (413, "body_too_long")
    chunk = b"200\r\n" + b"k" * 512 + b"\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    endless = raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 5)
    assert b" 413 " in endless.split(b"\r\n")[0] and b"body_too_long" in endless
    lying = raw(url, head + b"Content-Length: 99999999999\r\n\r\n{}")
    assert b" 413 " in lying.split(b"\r\n")[0]
    assert post(url, body("k")) == (200, "k")


def test_a_body_that_does_not_come_is_not_waited_for(url: str) -> None:
    answer = raw(url, b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"model')
    assert b" 408 " in answer.split(b"\r\n")[0] and b"slow_body" in answer


def test_slow_clients_take_no_place_of_the_others(url: str) -> None:
    place = urlsplit(url)
    stalled = [socket.create_connection((place.hostname, place.port)) for _ in range(CONNECTIONS * LIMITS.queue - 2)]
    try:
        for connection in stalled:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n")
        assert post(url, body("k")) == (200, "k")
    finally:
        for connection in stalled:
            connection.close()


def test_a_connection_without_a_request_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
    for sent in (b"", head):
        assert raw(url, sent) == b""  # closed: otherwise this times out
    assert post(url, body("0.4")) == (200, "0.4")  # one that takes longer than the look is let be


def test_an_answer_that_takes_too_long_is_given_up(url: str, backend: Echo) -> None:
    assert post(url, body("9")) == (504, "timeout")
    assert backend.cancelled == 1
    assert post(url, body("k")) == (200, "k")


def test_more_requests_than_there_is_room_for_are_turned_away(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post, url, body("0.4")) for _ in range(LIMITS.queue)]
        time.sleep(0.2)
        assert post(url, body("k")) == (503, "overloaded")
        assert [each.result() for each in waiting] == [(200, "0.4")] * LIMITS.queue
    assert post(url, body("k")) == (200, "k")


def test_a_client_that_goes_away_leaves_no_place_taken(url: str) -> None:
    for _ in range(2 * LIMITS.queue):
        raw(url, b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{gone")
    assert post(url, body("k")) == (200, "k")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
def test_without_the_token_nothing_is_answered(backend: Echo, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    with serving(backend, LIMITS, token=TOKEN) as url, httpx2.Client() as client:
        for response in (
            client.post(url + "/chat/completions", json=body("k"), headers=headers),
            client.get(url + "/models", headers=headers),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get(url.removesuffix("/v1") + "/health").status_code == 200
        assert post(url, body("k"), authorization=f"Bearer {TOKEN}") == (200, "k")
    assert backend.asked == 1


def test_on_loopback_other_host_names_are_refused(url: str, backend: Echo) -> None:
    assert post(url, body("k"), host="evil.example") == (421, "wrong_host")
    assert backend.asked == 0
    assert post(url, body("k"), host="localhost:8000") == (200, "k")


@pytest.mark.parametrize("limit", ["body_bytes", "body_s", "queue", "answer_s", "batch_records", "base_tokens"])
def test_limits_are_above_zero(limit: str) -> None:
    with pytest.raises(ArgumentError, match=f"{limit} must be above 0"):
        Limits(**{limit: 0})
