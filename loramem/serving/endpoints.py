"""Asking a server over HTTP: the wire formats of llama.cpp's server and of OpenAI's completions, as vLLM and SGLang
have them. Prompts are token ids, decoding is greedy, and what counts as an answer has ended by itself.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import TracebackType
from typing import Any

import httpx2

from loramem.errors import ServerError, reason
from loramem.serving.targets import LLAMA_CPP, NAMES, PEFT, SGLANG, VLLM, Target

TRIES, WAIT_S = 4, 0.25
"""Of a request that meets a server which is busy or not there for a moment; the wait doubles from try to try."""
FOR_A_MOMENT = frozenset({429, 502, 503, 504})
ABOUT_THE_REQUEST = frozenset({400, 413, 422})
"""Statuses that say no to one request alone, such as one beyond the context."""
KEY_VARIABLE = "LORAMEM_API_KEY"
"""What a server's bearer token is read from, where it wants one."""
OWNERS: Mapping[str, Target] = {"vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMA_CPP}
"""Who says in ``/v1/models`` that a model is theirs."""


@dataclass(frozen=True)
class Answer:
    """What a server made of a prompt."""

    text: str
    ids: tuple[int, ...] | None
    """Of its tokens, without the end token; None where the server tells none."""
    refused: str | None = None
    """Why there is no answer."""
    ended: bool = False
    """Whether it stopped by itself."""
    min_prob: float | None = None
    """Lowest probability of its tokens, the end token among them; None where the server tells none."""


class Endpoint:
    """A server that adapters are asked of. A context manager, safe to share between threads.

    Args:
        url: Without the path of an API, such as "http://localhost:8000".
        timeout_s: For one answer.

    Raises:
        ServerError: There is no server, or none whose kind can be told.
    """

    def __init__(self, url: str, target: Target | None = None, *, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE)
        try:
            self._client = httpx2.Client(
                base_url=self.url,
                timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
                headers={"Authorization": f"Bearer {key}"} if key else {},
            )
            self.target = target or self._told()
            self._numbers = self._loaded() if self.target == LLAMA_CPP else {}
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            raise ServerError(f"{url!r} is no URL of a server ({reason(error)}).", url=url) from None
        if self.target == PEFT:
            raise ServerError("PEFT is no server. Give vllm, sglang or llama.cpp.", url=url)

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def require(self, adapters: Sequence[str]) -> None:
        """Refuse a server of llama.cpp that lacks one of the adapters: it would answer from the base, in silence.

        Raises:
            ServerError: Names the first.
        """
        if self.target == LLAMA_CPP and (missing := [name for name in adapters if name not in self._numbers]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ServerError(
                f"The server at {self.url} was started without adapter {missing[0]}{more}. Start it with "
                f"--lora-scaled {missing[0]}.gguf:0,… as the README of a deployed folder says.",
                url=self.url,
            )

    def ask(self, adapter: str, prompt_ids: Sequence[int], max_tokens: int, end_id: int) -> Answer:
        """The greedy answer of an adapter.

        Raises:
            ServerError: No server, no such adapter, no right to ask, or something that is no answer.
        """
        greedy = {"prompt": list(prompt_ids), "temperature": 0.0}
        if self.target == LLAMA_CPP:
            # The prompt cache would go on from what another adapter computed.
            own = {"lora": [{"id": self._numbers[adapter], "scale": 1.0}], "cache_prompt": False, "return_tokens": True}
            asked = {**greedy, **own, "n_predict": max_tokens, "n_probs": 1, "repeat_penalty": 1.0}
            found = self._json("POST", "/completion", asked)
        else:
            own = {"model": adapter} if self.target == VLLM else {"model": "default", "lora_path": adapter}
            asked = {**greedy, **own, "max_tokens": max_tokens, "logprobs": 1, "repetition_penalty": 1.0}
            found = self._json(
                "POST", "/v1/completions", {**asked, "stop_token_ids": [end_id], "return_token_ids": True}
            )
        if isinstance(found, _Refusal):
            return Answer("", None, refused=found.why)
        try:
            return _of_llama_cpp(found, end_id) if self.target == LLAMA_CPP else _of_openai(found, end_id)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(
                f"The server at {self.url} gives something else than a completion of {NAMES[self.target]} "
                f"({type(error).__name__}: {reason(error)}). Say with --target what it is.",
                url=self.url,
            ) from None

    def _told(self) -> Target:
        """What the server says it is."""
        found = self._json("GET", "/v1/models")
        models = found.get("data") if isinstance(found, dict) else None
        owners = {str(each.get("owned_by")) for each in models or () if isinstance(each, dict)}
        known = [target for owner, target in OWNERS.items() if owner in owners]
        if len(known) != 1:
            raise ServerError(
                f"The server at {self.url} does not say what it is. Say it with --target vllm, sglang or llama.cpp.",
                url=self.url,
            )
        return known[0]

    def _loaded(self) -> dict[str, int]:
        """llama.cpp's numbers of its adapters, by the names of their files."""
        found = self._json("GET", "/lora-adapters")
        try:
            assert isinstance(found, list)
            return {PurePath(each["path"]).stem: int(each["id"]) for each in found}
        except (AssertionError, KeyError, TypeError, ValueError):
            raise ServerError(
                f"The server at {self.url} is not llama.cpp's: it lists no adapters.", url=self.url
            ) from None

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What a request gives as JSON, tried again where the server is busy; `_Refusal` where this one is refused."""
        wait_s = WAIT_S
        for left in reversed(range(TRIES)):
            try:
                answer = self._client.request(method, path, json=body)
            except httpx2.TimeoutException:
                raise ServerError(
                    f"The server at {self.url} did not answer in time. Give it longer with --timeout, or fewer "
                    "requests at once with --at-once.",
                    url=self.url,
                ) from None
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL):
                raise
            except httpx2.TransportError as error:
                if not left:
                    raise ServerError(f"No server answers at {self.url} ({reason(error)}).", url=self.url) from None
            else:
                if answer.status_code not in FOR_A_MOMENT or not left:
                    return self._content(answer, path)
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last try returns or raises")

    def _content(self, answer: httpx2.Response, path: str) -> Any:
        if answer.status_code in ABOUT_THE_REQUEST:
            return _Refusal(f"refused with status {answer.status_code}: {_said(answer)}")
        if not answer.is_success:
            raise ServerError(
                f"The server at {self.url} says {answer.status_code} to {path}: {_said(answer)}", url=self.url
            )
        try:
            return answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ServerError(f"The server at {self.url} gives no JSON at {path}.", url=self.url) from None


@dataclass(frozen=True)
class _Refusal:
    """No to one request."""

    why: str


def _said(answer: httpx2.Response) -> str:
    """A server's own words, as far as they are about the error: a body may hold the request."""
    try:
        found = answer.json()
        error = found.get("error", found) if isinstance(found, dict) else found
        return " ".join(str(error.get("message") or error.get("detail") if isinstance(error, dict) else error).split())[
            :200
        ]
    except ValueError:
        return answer.reason_phrase


def _of_llama_cpp(found: Mapping[str, Any], end_id: int) -> Answer:
    tokens = [int(token) for token in found["tokens"]]
    probabilities = [math.exp(token["logprob"]) for token in found["completion_probabilities"]]
    # It ends at any token that its file calls one of end; another than the store's is another answer.
    ended = found["stop_type"] == "eos" and tokens[-1:] == [end_id]
    return Answer(found["content"], tuple(_before(tokens, end_id)), None, ended, min(probabilities, default=None))


def _of_openai(found: Mapping[str, Any], end_id: int) -> Answer:
    (choice,) = found["choices"]
    tokens = choice.get("token_ids")
    told = (choice.get("logprobs") or {}).get("token_logprobs") or []
    probabilities = [math.exp(value) for value in told if value is not None]
    ids = None if tokens is None else tuple(_before([int(token) for token in tokens], end_id))
    return Answer(choice["text"], ids, None, choice["finish_reason"] == "stop", min(probabilities, default=None))


def _before(tokens: Sequence[int], end_id: int) -> Sequence[int]:
    """Tokens without the end token."""
    return tokens[: tokens.index(end_id)] if end_id in tokens else tokens
