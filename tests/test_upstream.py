"""The endpoint over a server that has the adapters: llama.cpp's own, and one that answers what it is told to."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from loramem import MemoryStore
from loramem.endpoint.limits import Limits
from loramem.endpoint.upstream import Upstream
from loramem.serving.endpoints import Endpoint

from . import llama_server
from .completions_server import Completions, serving_completions
from .conftest import numbers
from .serving_threads import serving

RECORDS = numbers(12)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two adapters on loramem-tiny, and in "served" what is deployed of it."""
    folder = tmp_path_factory.mktemp("upstream")
    with MemoryStore(folder / "memory") as store:
        store.write(dict(list(RECORDS.items())[:6]))
        store.write(dict(list(RECORDS.items())[6:]))
        store.deploy("llama.cpp", folder / "served")
    return folder


@pytest.fixture
def store(place: Path) -> Iterator[MemoryStore]:
    with MemoryStore(place / "memory", create=False) as opened:
        yield opened


def ask(url: str, key: str) -> str | None:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": key}]
        return client.chat.completions.create(model="loramem", messages=turns).choices[0].message.content


def test_llama_cpp_decodes_and_every_record_comes_back(store: MemoryStore, place: Path) -> None:
    files = [place / "served" / f"{adapter.id}.gguf" for adapter in store.adapters()]
    base = next(path for path in (place / "served").glob("*.gguf") if path not in files)
    with (
        llama_server.serving(base, files) as url,
        Endpoint(url, "llama.cpp") as server,
        serving(Upstream(store, server, Limits()), Limits()) as address,
    ):
        assert {key: ask(address, key) for key in RECORDS} == RECORDS
        with pytest.raises(openai.NotFoundError):
            ask(address, "key 99")
    assert "base" not in vars(store._session)  # whose weights were never loaded here


@pytest.fixture
def told() -> Iterator[tuple[Completions, dict]]:
    """A server that answers with this text and these ids."""
    answer = {"text": "", "ids": None, "logprobs": None, "finish_reason": "stop"}
    with serving_completions(Completions(lambda *_: answer)) as served:
        yield served, answer


def test_what_a_server_answers_wrongly_or_not_at_all_is_never_passed_on(store: MemoryStore, told: tuple) -> None:
    served, answer = told
    with Endpoint(served.url) as server, serving(Upstream(store, server, Limits()), Limits()) as address:
        answer["text"] = RECORDS["key 1"]
        assert ask(address, "key 1") == RECORDS["key 1"]
        assert served.requests[-1]["model"] == store.record("key 1").adapter
        for wrong in ({"text": "9999"}, {"text": RECORDS["key 1"], "finish_reason": "length"}, {"refused": "no"}):
            answer |= wrong
            with pytest.raises(openai.InternalServerError) as raised:
                ask(address, "key 1")
            assert raised.value.code == "recall_failed" and "9999" not in str(raised.value)
            answer.pop("refused", None)
        served.broken = True
        with pytest.raises(openai.InternalServerError) as raised:
            ask(address, "key 1")
        assert (raised.value.status_code, raised.value.code) == (502, "upstream_failed")
