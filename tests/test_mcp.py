"""The MCP server as the official client sees it: over stdio in a process of its own, and in this process."""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from mcp import Client, ClientSession, StdioServerParameters, stdio_client

from loramem import MemoryStore
from loramem.endpoint.mcp_server import MOST_KEYS, mcp_server

from .conftest import ROOT, numbers

RECORDS = numbers(6)
_Result = TypeVar("_Result")


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcp") / "memory"
    with MemoryStore(folder, str(base)) as store:
        store.write(RECORDS)
        store.write({"door": "0417#"}, namespace="team")
    return folder


@pytest.fixture
def store(place: Path, base: Path) -> Iterator[MemoryStore]:
    with MemoryStore(place, str(base)) as opened:
        yield opened


def talk(store: MemoryStore, session: Callable[[Client], Awaitable[_Result]], **options: bool) -> _Result:
    """What a conversation with a server in this process gives."""

    async def run() -> _Result:
        async with Client(mcp_server(store, **options)) as client:
            return await session(client)

    return asyncio.run(run())


def test_a_session_over_stdio_lists_recalls_writes_and_meets_an_unknown_key(place: Path, base: Path) -> None:
    command = ["-m", "loramem_cli", "mcp", "--store", str(place), "--model", str(base)]
    server = StdioServerParameters(command=sys.executable, args=command, cwd=str(ROOT))

    async def run() -> None:
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            assert set(tools) == {"recall", "list_keys", "remember"}
            assert tools["recall"].output_schema and tools["recall"].annotations.read_only_hint
            recalled = await session.call_tool("recall", {"key": "key 1"})
            assert recalled.structured_content["value"] == recalled.content[0].text == RECORDS["key 1"]
            unknown = await session.call_tool("recall", {"key": "key 11"})
            assert unknown.is_error and "KeyNotFound" in unknown.content[0].text
            error = unknown.structured_content["error"]
            assert error["type"] == "KeyNotFound" and "key 1" in error["close"]
            done = await session.call_tool("remember", {"key": "new", "value": "1234"})
            assert done.structured_content["written"] == 1 and done.structured_content["min_prob"] >= 0.6
            assert (await session.call_tool("recall", {"key": "new"})).structured_content["value"] == "1234"

    asyncio.run(run())
    with MemoryStore(place, str(base)) as store:
        assert store.recall("new") == "1234"
        store.erase("new")


def test_keys_are_listed_by_namespace_text_and_page(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def session(client: Client) -> list[Any]:
        asked = [{}, {"namespace": "team"}, {"containing": "y 3"}, {"offset": 4}]
        return [(await client.call_tool("list_keys", each)).structured_content for each in asked]

    everything, team, some, last = talk(store, session)
    assert everything == {"keys": list(RECORDS), "total": 6, "namespaces": ["", "team"]}
    assert team["keys"] == ["door"] and some["keys"] == ["key 3"]
    assert last["keys"] == list(RECORDS)[4:] and last["total"] == 6
    monkeypatch.setattr("loramem.endpoint.mcp_server.MOST_KEYS", 2)
    assert len(talk(store, session)[0]["keys"]) == 2 < MOST_KEYS


def test_a_conflict_is_typed_and_replaces_only_when_told(store: MemoryStore) -> None:
    async def session(client: Client) -> list[Any]:
        record = {"key": "door", "value": "9999", "namespace": "team"}
        refused = await client.call_tool("remember", record)
        replaced = await client.call_tool("remember", {**record, "replace": True})
        again = await client.call_tool("remember", record)
        return [refused, replaced, again, await client.call_tool("recall", {"key": "door", "namespace": "team"})]

    refused, replaced, again, now = talk(store, session)
    assert refused.is_error and refused.structured_content["error"]["type"] == "ConflictingRecord"
    assert replaced.structured_content["written"] == 1 and again.structured_content["written"] == 0
    assert now.structured_content["value"] == "9999"


def test_what_cannot_be_written_is_typed(store: MemoryStore) -> None:
    async def session(client: Client) -> Any:
        return await client.call_tool("remember", {"key": "k", "value": "<eos>"})

    refused = talk(store, session)
    assert refused.is_error and refused.structured_content["error"]["type"] == "SpecialTokenInText"


def test_a_read_only_server_has_no_tool_that_writes(store: MemoryStore) -> None:
    async def session(client: Client) -> set[str]:
        return {tool.name for tool in (await client.list_tools()).tools}

    assert talk(store, session, read_only=True) == {"recall", "list_keys"}


def test_what_fails_unforeseen_names_neither_key_nor_value(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("key 1 is secret")

    async def session(client: Client) -> Any:
        return await client.call_tool("recall", {"key": "key 1"})

    monkeypatch.setattr(MemoryStore, "recall_each", fail)
    with caplog.at_level(logging.INFO):
        result = talk(store, session)
    assert result.is_error and "secret" not in str(result) + caplog.text and "RuntimeError" in caplog.text
