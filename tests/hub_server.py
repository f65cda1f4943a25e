"""A small Hub over HTTP on 127.0.0.1: what an unmodified huggingface_hub 2.4 asks for, and faults on request.

Repositories of models live in memory, every commit of theirs readable for good. Uploads use basic LFS, so the client
needs HF_HUB_DISABLE_XET=1. Fields, headers and statuses are those that the client's source reads, no more; a 401 for
a repository says RepoNotFound, since the client infers that from https addresses alone.

    with HubServer() as hub:
        hub.create("me/facts", private=True)
        hub.fault(status(500), "GET", "/resolve/", times=2)

hub_answers.py says what each address answers, hub_faults.py holds the faults, hub_repository.py the repositories;
the fixture `hub` of conftest.py points this process's client here.
"""

import re
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from .hub_answers import Call, Hub
from .hub_faults import Answer, Fault, Refusal


@dataclass(frozen=True)
class Request:
    """A request as it came: bytes of its body, and bytes of the answer's."""

    method: str
    path: str
    received_bytes: int
    sent_bytes: int
    status: int


class HubServer(Hub):
    """The server, in threads of its own, listening from the start; a context manager that stops it.

    `requests` holds what came, in order; clear it as you like.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.requests: list[Request] = []
        self._faults: list[tuple[Fault, str, re.Pattern[str]]] = []
        self._closing = threading.Event()
        self._http = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()  # ends slow answers
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """Variables that send a new process's huggingface_hub here, with this server's token and a cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": home,
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_HUB_DISABLE_XET": "1",  # else uploads go to Xet wherever hf_xet is installed
            "HF_HUB_DISABLE_TELEMETRY": "1",  # else the client asks for more than the test did
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",  # as an empty value, TRANSFORMERS_OFFLINE would count instead
        }

    def fault(self, fault: Fault, method: str, pattern: str, times: int = 1) -> None:
        """Spoil the next `times` requests of this method in whose path the pattern is found."""
        with self._lock:
            self._faults += [(fault, method, re.compile(pattern))] * times

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def respond(self, call: Call) -> Answer:
        with self._lock:
            fault = next((f for f in self._faults if f[1] == call.method and f[2].search(call.path)), None)
            if fault:
                self._faults.remove(fault)
            performed = fault is None or fault[0].performed
            try:
                answer = self.perform(call) if performed else Answer()
            except Refusal as refusal:
                answer = refusal.answer
            answer = fault[0].change(answer) if fault else answer
            sent = 0 if call.method == "HEAD" else len(answer.body)
            self.requests.append(Request(call.method, call.path, len(call.body), sent, answer.status))
        self._closing.wait(answer.delay_s)
        return answer


class _Listener(ThreadingHTTPServer):
    """Closes connections that clients keep open too: a server that is gone must be gone for them."""

    daemon_threads = True

    def server_activate(self) -> None:
        super().server_activate()
        self._connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        super().server_close()
        for connection in self._connections:
            with suppress(OSError):  # closed long ago
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # else the client gave up, as it may
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: two would wait for each other
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _serve(self) -> None:
        address = urlsplit(self.path)
        call = Call(self.command, address.path, parse_qs(address.query), self.headers, self._received())
        answer = self.hub.respond(call)
        if answer.dropped:
            self.close_connection = True
            return
        headers = {"Content-Length": str(len(answer.body))} | dict(answer.headers)
        self.close_connection |= headers["Content-Length"] != str(len(answer.body))
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815
