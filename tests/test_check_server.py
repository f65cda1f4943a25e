"""`loramem check --server`: every key asked of a server over vLLM's wire format, and what servers do wrong is told."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.errors import ServerError, UnknownChoice
from loramem.serving import endpoints

from .completions_server import Completions, serving_completions
from .conftest import numbers

RECORDS = numbers(6)


@pytest.fixture(scope="module")
def memory(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "memory"
    with MemoryStore(path, str(base)) as store:
        store.write(dict(list(RECORDS.items())[:3]))
        store.write(dict(list(RECORDS.items())[3:]))
    return path


@pytest.fixture
def store(memory: Path) -> Iterator[MemoryStore]:
    with MemoryStore(memory, create=False) as opened:
        yield opened


@pytest.fixture
def right(store: MemoryStore) -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
    """What a server that computes as the store does would answer, by adapter and prompt."""
    found = {}
    template, tokenizer = store.manifest.template(), store.base.tokenizer
    for record in store.records():
        ids = tokenizer(RECORDS[record.key], add_special_tokens=False)["input_ids"]
        found[record.adapter, tuple(template.stored_ids(tokenizer, record.key, record.prompt))] = {
            "text": RECORDS[record.key],
            "ids": [*ids, template.end_id],
            "logprobs": [-0.01] * len(ids) + [math.log(0.75)],
            "finish_reason": "stop",
        }
    return found


@pytest.fixture
def server(right: dict[tuple[str, tuple[int, ...]], dict[str, Any]]) -> Iterator[Completions]:
    with serving_completions(Completions(lambda model, prompt: right.get((model, prompt)))) as served:
        yield served


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "WAIT_S", 0.001)


def test_every_key_is_asked_by_ids_and_compared(memory: Path, server: Completions) -> None:
    told = list[tuple[int, int]]()
    with MemoryStore(memory, create=False) as store:
        report = store.check_server(server.url, progress=lambda *counts: told.append(counts))
        assert "base" not in vars(store._session)  # no weights are needed to ask
        end_id = store.manifest.template().end_id
        committed = {record.adapter: 1.0 for record in store.records()}
    assert report.ok and report.target == "vllm"
    assert [(one.records, one.exact, dict(one.failed)) for one in report.adapters] == [(3, 3, {})] * 2
    assert [one.min_prob for one in report.adapters] == pytest.approx([0.75, 0.75])
    assert {one.adapter for one in report.adapters} == set(committed)
    assert told == [(count, 6) for count in range(1, 7)]
    for request in server.requests:
        asked = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 6, "stop_token_ids": [end_id]}
        assert request | asked == request and all(isinstance(token, int) for token in request["prompt"])


def test_the_command_names_the_keys_that_fail_and_exits_3(
    store: MemoryStore,
    server: Completions,
    right: dict[tuple[str, tuple[int, ...]], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["check", "--store", str(store.path), "--server", server.url + "/v1/", "--at-once", "2"]
    assert run(arguments) == 0
    assert capsys.readouterr().out.count("3/3") == 2
    wrong, longer, refused = list(right)[:3]  # of one adapter
    failing = {record.key for record in store.records() if record.adapter == wrong[0]}
    right[wrong] |= {"text": "1234", "ids": None}
    right[longer] |= {"finish_reason": "length"}
    right[refused] = {"refused": "maximum context length is 2"}
    assert run(arguments) == 3
    shown = capsys.readouterr()
    assert "0/3" in shown.out
    for words in ("another answer", "the value, and no end", "status 400: maximum context length is 2"):
        assert words in shown.err
    assert run([*arguments, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and {key for one in report["adapters"] for key in one["failed"]} == failing


def test_without_token_ids_the_text_is_compared(
    store: MemoryStore, server: Completions, right: dict[tuple[str, tuple[int, ...]], dict[str, Any]]
) -> None:
    for answer in right.values():
        answer["ids"], answer["logprobs"] = None, []
    for target in ("vllm", "sglang"):
        report = store.check_server(server.url, target)
        assert report.ok and {one.min_prob for one in report.adapters} == {None}
    assert server.requests[-1]["lora_path"] in {adapter.id for adapter in store.adapters()}


def test_a_busy_server_is_asked_again(store: MemoryStore, server: Completions) -> None:
    server.busy = 3
    assert store.check_server(server.url, at_once=1).ok
    server.busy = 4
    with pytest.raises(ServerError, match="says 503 to /v1/completions: busy"):
        store.check_server(server.url, at_once=1)


def test_what_is_no_server_of_the_adapters_is_told(
    store: MemoryStore,
    server: Completions,
    right: dict[tuple[str, tuple[int, ...]], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ServerError, match=r"No server answers at http://127\.0\.0\.1:9"):
        store.check_server("http://127.0.0.1:9")
    for url in ("ftp://127.0.0.1", "no url", "http://[::1"):
        with pytest.raises(ServerError):
            store.check_server(url)
    with pytest.raises(ServerError, match=r"not llama\.cpp's|gives no JSON|lists no adapters"):
        store.check_server(server.url, "llama.cpp")
    with pytest.raises(UnknownChoice):
        store.check_server(server.url, "ollama")  # type: ignore[arg-type]
    server.slow_s = 0.3
    with pytest.raises(ServerError, match="did not answer in time"):
        store.check_server(server.url, "vllm", timeout_s=0.1)
    server.slow_s, server.broken = 0.0, True
    with pytest.raises(ServerError, match="something else than a completion"):
        store.check_server(server.url)
    server.broken, server.token = False, "secret"
    with pytest.raises(ServerError, match="says 401"):
        store.check_server(server.url)
    monkeypatch.setenv("LORAMEM_API_KEY", "secret")
    assert store.check_server(server.url).ok
    either = "|".join(stored.id for stored in store.adapters())
    right.clear()
    with pytest.raises(ServerError, match=rf"says 404 to /v1/completions: The model `({either})` does not exist"):
        store.check_server(server.url)


def test_a_server_is_asked_alone(store: MemoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    for also in (["--dtype", "bfloat16"], ["--target", "vllm", "--target", "sglang"], [str(store.path)]):
        assert run(["check", "--store", str(store.path), "--server", "http://localhost:1", *also]) == 2
    capsys.readouterr()


def test_a_store_without_keys_cannot_ask(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramem.errors import StoreError

    monkeypatch.setattr(store._session, "manifest", replace(store.manifest, key_salt="0" * 64))
    with pytest.raises(StoreError, match="digests of its keys"):
        store.check_server("http://localhost:1")
