"""The store as long-term memory of LangGraph: `langgraph.store.base.BaseStore`, whose values are in the weights.

An item's value is kept as its JSON text, so that it comes back to the letter; a record that was written otherwise is
the item ``{"value": text}``. A namespace's labels are joined by periods, which no label may hold. A put trains, which
takes seconds: puts of one ``batch`` are one write, and belong into the background of a graph or between its runs.
There is no semantic search: as with other stores without an index, ``query`` changes nothing.
"""

import asyncio
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    validate_op_namespace,
)

from loramem import MemoryStore, Record, StoredRecord
from loramem.errors import ArgumentError, InvalidField, KeyNotFound, LoramemError

CREATED = "created_at"
"""Metadata of a record that was put again: when its key was first put; `StoredRecord.written_at` is the last time."""
DECODED = 256  # items that a filter looks at in one go
Path = tuple[str, ...]


class LoramemStore(BaseStore):
    """Items of LangGraph in a store of loramem.

    Args:
        store: Stays open as long as this is used, and may be used otherwise as well.

    Example:
        >>> import tempfile
        >>> with MemoryStore(tempfile.mkdtemp() + "/memory") as memory:
        ...     items = LoramemStore(memory)
        ...     items.put(("users", "ada"), "door", {"code": "0417"})
        ...     items.get(("users", "ada"), "door").value
        {'code': '0417'}
    """

    __slots__ = ("store",)

    def __init__(self, store: MemoryStore) -> None:
        self.store = store

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Answer operations in their order: reads see what was there before, then all puts are one write.

        Raises:
            ArgumentError: A filter has an operator that is not known.
            InvalidField: A value is not JSON.
            LoramemError: As `MemoryStore.recall` and `MemoryStore.write`; what was read is lost then.
        """
        asked = list(ops)
        for op in asked:
            validate_op_namespace(op)
        gets = [(_name(op.namespace), op.key) for op in asked if isinstance(op, GetOp)]
        items = iter(self._items(gets))
        results: list[Result] = [
            next(items)
            if isinstance(op, GetOp)
            else self._search(op)
            if isinstance(op, SearchOp)
            else self._namespaces(op)
            if isinstance(op, ListNamespacesOp)
            else None
            for op in asked
        ]
        self._put({(_name(op.namespace), op.key): op.value for op in asked if isinstance(op, PutOp)})
        return results

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """`batch` in a thread of its own."""
        return await asyncio.to_thread(self.batch, list(ops))

    def _items(self, asked: Sequence[tuple[str, str]]) -> Iterator[Item | None]:
        """Items by namespace and key, recalled in as few batches as can be; None for what is not there."""
        for answer, (namespace, key) in zip(self.store.recall_each(asked), asked, strict=True):
            try:
                if isinstance(answer, LoramemError):
                    raise answer
                row = self.store.record(key, namespace)
            except KeyNotFound:  # or it was deleted since it was recalled
                yield None
            else:
                yield Item(value=_value(answer.value), key=key, namespace=_path(namespace), **_times(row))

    def _search(self, op: SearchOp) -> list[SearchItem]:
        """Items below a namespace in the order they were written, those that a filter leaves."""
        held = [
            name for name in self.store.namespaces() if _path(name)[: len(op.namespace_prefix)] == op.namespace_prefix
        ]
        keys: Iterator[tuple[str, str]] = ((name, key) for name in held for key in self.store.keys(name))
        wanted, last = op.filter or {}, op.offset + op.limit
        found = list[SearchItem]()
        if not wanted:  # then only what is shown is decoded
            keys, last = islice(keys, op.offset, last), op.limit
        while len(found) < last and (some := list(islice(keys, DECODED))):
            found += (
                SearchItem(item.namespace, item.key, item.value, item.created_at, item.updated_at)
                for item in self._items(some)
                if item is not None and all(_holds(item.value.get(name), asked) for name, asked in wanted.items())
            )
        return found[op.offset : last] if wanted else found[:last]

    def _namespaces(self, op: ListNamespacesOp) -> list[Path]:
        held = [_path(name) for name in self.store.namespaces() if name]
        matching = [path for path in held if all(_matches(path, each) for each in op.match_conditions or ())]
        cut = sorted({path[: op.max_depth] for path in matching})
        return cut[op.offset : op.offset + op.limit]

    def _put(self, values: Mapping[tuple[str, str], Mapping[str, Any] | None]) -> None:
        """Write and delete; what there is of a key already says when it was first put."""
        written, deleted = list[Record](), dict[str, list[str]]()
        for (namespace, key), value in values.items():
            try:
                row = self.store.record(key, namespace)
            except KeyNotFound:
                row = None
            if value is not None:
                created = {} if row is None else {CREATED: _times(row)["created_at"].isoformat()}
                written.append(Record(key, _text(key, value), namespace, created))
            elif row is not None:
                deleted.setdefault(namespace, []).append(key)
        for namespace, keys in deleted.items():
            self.store.delete(keys, namespace)
        if written:
            self.store.write(written, on_conflict="replace")


def _name(path: Path) -> str:
    return ".".join(path)


def _path(name: str) -> Path:
    return tuple(name.split(".")) if name else ()


def _times(row: StoredRecord) -> dict[str, datetime]:
    written = datetime.fromisoformat(row.written_at)
    created = row.metadata.get(CREATED)
    return {
        "created_at": datetime.fromisoformat(created) if isinstance(created, str) else written,
        "updated_at": written,
    }


def _text(key: str, value: Mapping[str, Any]) -> str:
    """An item's value as the record's.

    Raises:
        InvalidField: It is not JSON.
    """
    try:
        return json.dumps(dict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidField(f"The value of {key!r} is not JSON ({error}).", key=key) from None


def _value(text: str) -> dict[str, Any]:
    """An item's value from the record's: the object that it spells, or its text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"value": text}


def _matches(path: Path, condition: MatchCondition) -> bool:
    """Whether a namespace begins or ends as asked; * is any label."""
    asked = condition.path
    part = path[: len(asked)] if condition.match_type == "prefix" else path[len(path) - len(asked) :]
    return len(path) >= len(asked) and all(label in ("*", own) for own, label in zip(part, asked, strict=True))


def _holds(value: Any, asked: Any) -> bool:
    """Whether a field is as a filter asks: equal, in what an object names, or by operators.

    Raises:
        ArgumentError: There is no such operator, or it cannot order these two.
    """
    if isinstance(asked, Mapping):
        if any(name.startswith("$") for name in asked):
            return all(_compare(value, name, other) for name, other in asked.items())
        return isinstance(value, Mapping) and all(_holds(value.get(name), other) for name, other in asked.items())
    if isinstance(asked, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(asked)
        return same and all(_holds(own, other) for own, other in zip(value, asked, strict=True))
    return bool(value == asked)


def _compare(value: Any, name: str, other: Any) -> bool:
    if name in ("$eq", "$ne"):
        return bool((value == other) == (name == "$eq"))
    ordered = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
    if name not in ordered:
        raise ArgumentError(f"The operators are $eq, $ne, {', '.join(ordered)}, not {name}", argument=name, value=other)
    try:
        return bool(ordered[name](float(value), float(other)))
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} orders numbers, not {value!r} and {other!r}", argument=name, value=other) from None
