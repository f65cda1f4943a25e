"""The endpoint as OpenAI's own client sees it: every record, streamed or not, and errors with what to do."""

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from loramem import MemoryStore
from loramem.endpoint.backends import OwnModel
from loramem.endpoint.limits import Limits
from loramem.store.read import Reader

from .conftest import numbers
from .serving_threads import serving

RECORDS = numbers(100)
TEAM = {"key 1": "2718", "door": "0417#"}


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path_factory.mktemp("endpoint") / "memory", str(base)) as opened:
        opened.write(RECORDS)
        opened.write(TEAM, namespace="team/project")
        yield opened


@pytest.fixture(scope="module")
def url(store: MemoryStore) -> Iterator[str]:
    with serving(OwnModel(store, Limits()), Limits()) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as opened:
        yield opened


def user(key: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": key}]


def ask(client: openai.OpenAI, key: str, model: str = "loramem", **options: object) -> str | None:
    answer = client.chat.completions.create(model=model, messages=user(key), **options)
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


def test_the_official_client_recalls_every_record_as_chat(client: openai.OpenAI) -> None:
    assert {key: ask(client, key) for key in RECORDS} == RECORDS


def test_every_record_comes_as_a_stream(client: openai.OpenAI) -> None:
    for key, value in RECORDS.items():
        pieces = list(client.chat.completions.create(model="loramem", messages=user(key), stream=True))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == value
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_text_completions_take_the_key_as_the_prompt(client: openai.OpenAI) -> None:
    for key in list(RECORDS)[:10]:
        assert client.completions.create(model="loramem", prompt=key).choices[0].text == RECORDS[key]
        stream = client.completions.create(model="loramem", prompt=[key], stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == RECORDS[key]


def test_the_model_names_the_namespace(client: openai.OpenAI) -> None:
    assert ask(client, "key 1", "loramem/team/project") == "2718" != RECORDS["key 1"]
    assert [model.id for model in client.models.list()] == ["loramem", "loramem/team/project"]


def test_what_stands_around_the_last_user_message_does_not_matter(client: openai.OpenAI) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *user("Hello"), {"role": "assistant", "content": "Hi"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "key 3"}]}]
    sampled = client.chat.completions.create(model="loramem", messages=[*turns, *parts], temperature=1.5, top_p=0.3)
    assert sampled.choices[0].message.content == RECORDS["key 3"]


def test_an_answer_says_what_it_took_and_where_it_is_from(client: openai.OpenAI, store: MemoryStore) -> None:
    answer = client.chat.completions.create(model="loramem", messages=user("key 3"))
    (recall,) = store.recall_many(["key 3"])
    assert answer.usage.completion_tokens == recall.answer_tokens == 4
    assert answer.usage.prompt_tokens == recall.prompt_tokens
    assert answer.model_extra["loramem"] == {"adapter": recall.adapter, "min_prob": recall.min_prob}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = client.chat.completions.create(model="loramem", messages=user("key 3"), **options)
    assert last.usage == answer.usage


def test_an_unknown_key_is_not_found_and_close_keys_are_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="No record has the key 'key 3 '") as raised:
        ask(client, "key 3 ")
    assert raised.value.code == "key_not_found"
    assert "key 3" in raised.value.body["close"]
    with pytest.raises(openai.NotFoundError):
        ask(client, "door")  # of another namespace


@pytest.mark.parametrize("model", ["gpt-5", "loramem/", "loramemory", ""])
def test_another_model_is_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        ask(client, "key 1", model)
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"stop": "7"}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_record_is_whole_or_refused(client: openai.OpenAI, options: dict, param: str) -> None:
    key = next(key for key, value in RECORDS.items() if "7" in value)
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, key, **options)
    assert raised.value.param == param
    assert ask(client, key, max_tokens=4, n=1, stop=["x"]) == RECORDS[key]


def test_a_wrong_value_is_an_error_and_never_sent(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Reader, "_texts", lambda *_: ["nonsense"])
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, "key 5")
    assert raised.value.code == "recall_failed" and "nonsense" not in str(raised.value)


def test_what_fails_unforeseen_names_neither_key_nor_value(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("key 5 is secret")

    monkeypatch.setattr(MemoryStore, "recall_each", fail)
    with caplog.at_level(logging.DEBUG), pytest.raises(openai.InternalServerError):
        ask(client, "key 5")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("loramem", "uvicorn"))]
    assert any("RuntimeError" in line for line in ours)
    assert not any("key 5" in line or "secret" in line for line in ours)


def test_answers_leave_no_trace_in_the_log(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ask(client, "key 7")
    ours = "".join(record.getMessage() for record in caplog.records if not record.name.startswith(("openai", "http")))
    assert "key 7" not in ours and RECORDS["key 7"] not in ours


def test_an_unknown_key_may_be_the_base_models_to_answer(store: MemoryStore) -> None:
    limits = Limits(base_tokens=5)
    with (
        serving(OwnModel(store, limits), limits, unknown="base") as address,
        openai.OpenAI(base_url=address, api_key="unused", max_retries=0) as client,
    ):
        assert ask(client, "key 1") == RECORDS["key 1"]
        answer = client.chat.completions.create(model="loramem", messages=user("What is a key?"))
        assert answer.model_extra["loramem"]["adapter"] is None
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.completion_tokens <= 5
        text = client.completions.create(model="loramem", prompt="What is a key?", max_tokens=2)
        assert text.usage.completion_tokens <= 2
        with pytest.raises(openai.BadRequestError, match="exceeds the base model's"):
            ask(client, "x " * 2000)


def test_health_and_unknown_routes(url: str) -> None:
    root = url.removesuffix("/v1")
    assert httpx2.get(root + "/health").json() == {"status": "ok"}
    assert httpx2.get(root + "/docs").json()["error"]["code"] == "unknown_url"
    assert httpx2.get(url + "/chat/completions").status_code == 405
