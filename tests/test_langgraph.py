"""The LangGraph store: the same answers as the library's own in memory, and a graph that remembers through weights."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    Item,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore

from loramem import MemoryStore
from loramem.endpoint.langgraph_store import LoramemStore
from loramem.errors import ArgumentError, InvalidField, RecallError
from loramem.store.read import Reader

ADA, BOB, SITE = ("users", "ada"), ("users", "bob"), ("sites", "home", "v1")


@pytest.fixture
def memory(base: Path, tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "memory", str(base)) as store:
        yield store


@pytest.fixture
def items(memory: MemoryStore) -> LoramemStore:
    return LoramemStore(memory)


def shown(result: Any) -> Any:
    """A result without its times."""
    if isinstance(result, Item):
        return result.namespace, result.key, result.value
    return [shown(each) for each in result] if isinstance(result, list) else result


def test_an_item_comes_back_from_the_weights(items: LoramemStore, memory: MemoryStore) -> None:
    value = {"code": "0417#", "floor": -1, "of": ["é", None, True], "more": {"a": 1.5}}
    items.put(ADA, "door", value)
    item = items.get(ADA, "door")
    assert (item.value, item.key, item.namespace) == (value, "door", ADA)
    assert item.created_at == item.updated_at
    assert items.get(ADA, "gate") is items.get(BOB, "door") is None
    assert memory.verify().ok and memory.namespaces() == ["users.ada"]


def test_a_put_replaces_keeps_when_it_was_created_and_a_delete_ends_it(items: LoramemStore) -> None:
    items.put(ADA, "door", {"code": 1})
    first = items.get(ADA, "door")
    items.put(ADA, "door", {"code": 2})
    second = items.get(ADA, "door")
    assert second.value == {"code": 2}
    assert second.created_at == first.created_at <= second.updated_at
    items.delete(ADA, "door")
    items.delete(ADA, "door")  # nothing there is nothing to do
    assert items.get(ADA, "door") is None


def test_puts_of_one_batch_are_one_write_after_its_reads(items: LoramemStore, memory: MemoryStore) -> None:
    puts = [PutOp(ADA, "a", {"n": 1}), PutOp(ADA, "a", {"n": 2}), PutOp(BOB, "b", {"n": 3})]
    assert items.batch([*puts, GetOp(ADA, "a")]) == [None, None, None, None]
    assert items.get(ADA, "a").value == {"n": 2}
    assert [len(memory.history("a", "users.ada")), len(memory.adapters())] == [1, 2]


def test_records_of_other_origin_are_items_too(items: LoramemStore, memory: MemoryStore) -> None:
    memory.write({"door:": "0417", "list": "[1]"}, namespace="team")
    assert items.get(("team",), "door:").value == {"value": "0417"}
    assert items.get(("team",), "list").value == {"value": "[1]"}
    assert items.search(())[0].namespace == ("team",)


def test_every_operation_answers_as_the_librarys_own_store(items: LoramemStore) -> None:
    rng, theirs = random.Random(3), InMemoryStore()
    paths, keys = [ADA, BOB, SITE, ("users",)], ["a", "b", "c"]
    for _ in range(6):
        puts = [
            PutOp(rng.choice(paths), rng.choice(keys), rng.choice([None, {"n": rng.randrange(3), "of": {"x": "y"}}]))
            for _ in range(3)
        ]
        assert items.batch(puts) == theirs.batch(puts)
        ops: list[Any] = [GetOp(path, key) for path in paths for key in keys]
        assert shown(items.batch(ops)) == shown(theirs.batch(ops))
        searches = [
            SearchOp(prefix, wanted, limit, 0)
            for prefix in ((), ("users",), ADA, ("nobody",))
            for wanted in (None, {"n": 1}, {"n": {"$gte": 1}}, {"n": {"$ne": 1}}, {"of": {"x": "y"}}, {"n": {"$lt": 0}})
            for limit in (100,)
        ]
        for ours, other in zip(items.batch(searches), theirs.batch(searches), strict=True):
            assert sorted(map(repr, shown(ours))) == sorted(map(repr, shown(other)))  # the order is each store's own
        held = {tuple(path) for path in items.list_namespaces()}
        for conditions in ((), (("prefix", ("users",)),), (("suffix", ("v1",)),), (("prefix", ("*", "ada")),)):
            asked = [
                ListNamespacesOp(tuple(MatchCondition(*each) for each in conditions) or None, depth, 10, 0)
                for depth in (None, 1, 2)
            ]
            for ours, other in zip(items.batch(asked), theirs.batch(asked), strict=True):
                # theirs goes on naming a namespace whose last item was deleted
                assert set(ours) <= set(other) and all(any(p[: len(o)] == o for p in held) for o in ours)


def test_a_search_is_paged_and_decodes_no_more_than_is_shown(
    items: LoramemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    items.batch([PutOp(ADA, f"k{n}", {"n": n}) for n in range(6)])
    asked, each = list[int](), MemoryStore.recall_each
    monkeypatch.setattr(MemoryStore, "recall_each", lambda self, keys: (asked.append(len(keys)), each(self, keys))[1])
    assert [item.key for item in items.search(ADA, limit=2, offset=3)] == ["k3", "k4"]
    assert sum(asked) == 2
    assert [item.key for item in items.search(ADA, filter={"n": {"$gt": 1}}, limit=2, offset=1)] == ["k3", "k4"]
    assert items.search(ADA, limit=2, offset=9) == []


def test_async_operations_answer_alike_side_by_side(items: LoramemStore) -> None:
    async def run() -> list[Any]:
        await items.aput(ADA, "a", {"n": 1})
        await items.aput(BOB, "b", {"n": 2})
        found = await asyncio.gather(items.aget(ADA, "a"), items.aget(BOB, "b"), items.asearch(("users",)))
        await items.adelete(ADA, "a")
        return [shown(each) for each in (*found, await items.aget(ADA, "a"), await items.alist_namespaces())]

    first, second, both, gone, left = asyncio.run(run())
    assert (first, second, gone, left) == ((ADA, "a", {"n": 1}), (BOB, "b", {"n": 2}), None, [BOB])
    assert both == [first, second]


def test_what_cannot_be_is_refused(items: LoramemStore) -> None:
    with pytest.raises(InvalidNamespaceError):
        items.put((), "k", {"n": 1})
    with pytest.raises(InvalidNamespaceError):
        items.batch([PutOp(("a.b",), "k", {"n": 1})])
    for value in ({"n": float("nan")}, {"n": object()}):
        with pytest.raises(InvalidField, match="is not JSON"):
            items.put(ADA, "k", value)
    with pytest.raises(NotImplementedError):
        items.put(ADA, "k", {"n": 1}, ttl=5)
    items.put(ADA, "k", {"n": "x"})
    for wanted in ({"n": {"$near": 1}}, {"n": {"$gt": 1}}):
        with pytest.raises(ArgumentError):
            items.search(ADA, filter=wanted)


def test_a_wrong_value_is_an_error_and_no_item(items: LoramemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    items.put(ADA, "k", {"n": 1})
    monkeypatch.setattr(Reader, "_texts", lambda *_: ['{"n":2}'])
    with pytest.raises(RecallError):
        items.get(ADA, "k")


def test_a_graph_remembers_from_one_run_to_the_next(items: LoramemStore) -> None:
    class State(TypedDict):
        said: str
        answer: str

    def remember(state: State, *, store: BaseStore) -> dict[str, str]:
        key, _, value = state["said"].partition(" is ")
        if value:
            store.put(ADA, key, {"text": value})
            return {"answer": "noted"}
        item = store.get(ADA, key)
        return {"answer": "unknown" if item is None else item.value["text"]}

    graph = StateGraph(State)
    graph.add_node("remember", remember)
    graph.add_edge(START, "remember")
    graph.add_edge("remember", END)
    app = graph.compile(store=items)
    answers = [app.invoke({"said": said, "answer": ""})["answer"] for said in ("the door is 0417#", "the door", "it")]
    assert answers == ["noted", "0417#", "unknown"]
