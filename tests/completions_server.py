"""A small server with vLLM's wire format for completions, that answers what it is told to: no model behind it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answers = Callable[[str, tuple[int, ...]], dict[str, Any] | None]
"""Text, token ids, probabilities and reason of the end, of an adapter and a prompt; None of an adapter it lacks."""


@dataclass
class Completions:
    """What is served, and what was asked."""

    answers: Answers
    token: str | None = None
    busy: int = 0
    """Requests that are told to come again."""
    slow_s: float = 0.0
    broken: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests.append(body)
        if self.busy:
            self.busy -= 1
            return 503, {"error": {"message": "busy", "code": 503}}
        if self.broken:
            return 200, {"object": "something else"}
        found = self.answers(body.get("lora_path", body["model"]), tuple(body["prompt"]))
        if found is None:
            message = f"The model `{body['model']}` does not exist."
            return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
        if "refused" in found:
            return 400, {"error": {"message": found["refused"], "type": "BadRequestError", "code": 400}}
        choice = {
            "index": 0,
            "text": found["text"],
            "finish_reason": found["finish_reason"],
            "stop_reason": None,
            "token_ids": found["ids"],
            "logprobs": {"token_logprobs": found["logprobs"], "tokens": [str(one) for one in found["ids"] or []]},
        }
        return 200, {"object": "text_completion", "model": body["model"], "choices": [choice]}


@contextmanager
def serving_completions(served: Completions) -> Iterator[Completions]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"object": "list", "data": [{"id": "base", "owned_by": "vllm"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(served.slow_s)
            self._answer(*served.post(body))

        def _answer(self, status: int, content: Any) -> None:
            if served.token is not None and self.headers["Authorization"] != f"Bearer {served.token}":
                status, content = 401, {"error": "Unauthorized"}
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:  # a client that went away in the middle of an answer
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
