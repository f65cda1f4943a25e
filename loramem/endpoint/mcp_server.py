"""The store as tools of an MCP server: recall a key, list keys, remember a record.

What the store refuses is a result that says so, with the error's class and its facts as structured content, so that an
agent can go on from it (close keys of an unknown one) and a program need not read its text. Nothing is logged but the
kind of what fails unforeseen: stdout carries the protocol, and keys are nobody else's business.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from typing import Annotated, Any, TypeVar

from mcp.server import MCPServer
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, Field

from loramem import MemoryStore
from loramem.errors import LoramemError

log = logging.getLogger(__name__)

MOST_KEYS = 100
INSTRUCTIONS = (
    "Exact facts that were written into the weights of a language model. recall gives a value to the letter or an "
    "error, never a guess: do not answer with a value of your own where it fails. Keys are exact."
)


class Recalled(BaseModel):
    """A record."""

    key: str
    value: str = Field(description="To the letter, decoded from the weights and equal to what was written.")
    min_prob: float = Field(description="The record's certificate: lowest probability of any of its tokens.")
    adapter: str


class Keys(BaseModel):
    """Some keys of a namespace."""

    keys: list[str]
    total: int = Field(description="Of those that match.")
    namespaces: list[str] = Field(description="All that hold records; the empty one is the default.")


class Remembered(BaseModel):
    """What a write came to."""

    written: int = Field(description="0 where the record was there already with this value.")
    min_prob: float | None
    elapsed_s: float


_Key = Annotated[str, Field(description="The key, to the letter.")]
_Given = TypeVar("_Given", bound=BaseModel)
_Namespace = Annotated[str, Field(description="Recall space; the default one if empty.")]


def mcp_server(store: MemoryStore, *, read_only: bool = False) -> MCPServer[Any]:
    """A server of a store's tools; ``run("stdio")`` serves until the client goes.

    Args:
        read_only: Leave out the tool that writes.
    """
    server: MCPServer[Any] = MCPServer(
        "loramem", instructions=INSTRUCTIONS, version=version("loramem"), log_level="WARNING"
    )

    async def recall(key: _Key, namespace: _Namespace = "") -> Annotated[CallToolResult, Recalled]:
        """The value of a key, exactly as it was written. An unknown key is an error that names close keys."""

        def call() -> Recalled:
            (found,) = store.recall_each([(namespace, key)])
            if isinstance(found, LoramemError):
                raise found
            return Recalled(key=key, value=found.value, min_prob=found.min_prob, adapter=found.adapter)

        return await _result(call, lambda recalled: recalled.value)

    async def list_keys(
        namespace: _Namespace = "",
        containing: Annotated[str, Field(description="Only keys that contain this text.")] = "",
        offset: Annotated[int, Field(ge=0, description="Leave out so many.")] = 0,
    ) -> Annotated[CallToolResult, Keys]:
        """Keys of a namespace, in the order they were written, a hundred at a time."""

        def call() -> Keys:
            matching = [key for key in store.keys(namespace) if containing in key]
            chosen = list(islice(matching, offset, offset + MOST_KEYS))
            return Keys(keys=chosen, total=len(matching), namespaces=store.namespaces())

        return await _result(call, lambda held: "\n".join(held.keys))

    async def remember(
        key: _Key,
        value: Annotated[str, Field(description="The value, to the letter.")],
        namespace: _Namespace = "",
        replace: Annotated[bool, Field(description="End the value that the key has, if it has another.")] = False,
    ) -> Annotated[CallToolResult, Remembered]:
        """Write a record into the weights, proved before it counts; takes seconds. It cannot be taken back here."""

        def call() -> Remembered:
            report = store.write([(key, value)], namespace=namespace, on_conflict="replace" if replace else "error")
            return Remembered(written=report.written, min_prob=report.min_prob, elapsed_s=report.elapsed_s)

        return await _result(call, lambda done: "written" if done.written else "there already")

    reads = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
    server.add_tool(recall, annotations=reads)
    server.add_tool(list_keys, annotations=reads)
    if not read_only:
        writes = ToolAnnotations(destructive_hint=True, idempotent_hint=True, open_world_hint=False)
        server.add_tool(remember, annotations=writes)
    return server


async def _result(call: Callable[[], _Given], text: Callable[[_Given], str]) -> CallToolResult:
    """What a call gives, or the error that it ends in; it may take seconds, during which others are answered."""
    try:
        given = await asyncio.to_thread(call)
    except LoramemError as error:
        facts = {name: value for name, value in vars(error).items() if _is_json(value)}
        return _failed(type(error).__name__, str(error), facts)
    except Exception as error:
        log.error("%s in a tool", type(error).__name__)  # its text may hold a key or a value
        return _failed(type(error).__name__, "The server failed at this call.", {})
    return CallToolResult(
        content=[TextContent(type="text", text=text(given))], structured_content=given.model_dump(mode="json")
    )


def _failed(kind: str, message: str, facts: dict[str, Any]) -> CallToolResult:
    return CallToolResult(
        content=[TextContent(type="text", text=f"{kind}: {message}")],
        structured_content={"error": {"type": kind, "message": message, **facts}},
        is_error=True,
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
