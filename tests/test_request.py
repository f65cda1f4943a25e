"""A write's request is the same after the journal and after an adapter's row, and those of older versions are read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramem import WriterSettings
from loramem.errors import StoreFormatError, UnknownChoice
from loramem.index.index import Index
from loramem.index.rows import RENAMED, Ended
from loramem.records.record import Record
from loramem.store.request import WriteRequest

SETTINGS = st.builds(
    WriterSettings,
    objective=st.sampled_from(["sft", "memft-ot", "memft-sw"]),
    long_tokens=st.integers(1, 10**6),
    max_rank=st.integers(1, 512),
    seed=st.integers(0, 2**31),
)
NAMES = st.text(max_size=5)
REQUESTS = st.builds(
    WriteRequest,
    goal=st.sampled_from(["fast", "small"]),
    rank=st.none() | st.integers(1, 512),
    settings=SETTINGS,
    one_adapter=st.booleans(),
    partial=st.booleans(),
    ended=st.lists(st.builds(Ended, NAMES, NAMES, st.just(RENAMED), st.none() | NAMES), max_size=2).map(tuple),
)


@given(request=REQUESTS)
def test_json_gives_it_back_and_an_adapters_row_what_rewriting_needs(request: WriteRequest) -> None:
    assert WriteRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    training = json.loads(json.dumps({"settings": asdict(request.settings), "request": request.kept, "steps": 3}))
    again = WriteRequest.of_adapter(training)
    assert again == WriteRequest(request.goal, request.rank, request.settings, request.one_adapter)
    assert hash(again) == hash(WriteRequest.of_adapter(training))


OLD: dict[str, Any] = {"objective": "memft-sw", "max_rank": 64, "optimizer": "muon", "curriculum": False}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"goal": "small", "rank": 4, "partial": True},
            WriteRequest("small", 4, WriterSettings(max_rank=64), False, True),
        ),
        (
            {"goal": "fast", "rank": None, "partial": False, "plan": {}},
            WriteRequest(settings=WriterSettings(max_rank=64)),
        ),
        (
            {"goal": "fast", "rank": None, "partial": False, "ended": [["", "old", "renamed", "new"]]},
            WriteRequest(settings=WriterSettings(max_rank=64), ended=(Ended("", "old", "renamed", "new"),)),
        ),
    ],
)
def test_a_journal_without_newer_names_and_with_retired_settings_is_read(
    fields: dict[str, Any], expected: WriteRequest
) -> None:
    assert WriteRequest.from_json({**fields, "settings": OLD}) == expected
    with pytest.raises(StoreFormatError, match="unknown"):
        WriteRequest.from_json({**fields, "settings": {**OLD, "unknown": 1}})


def test_the_row_of_an_adapter_that_does_not_say_was_asked_for_with_the_defaults() -> None:
    assert WriteRequest.of_adapter({"settings": OLD}) == WriteRequest(settings=WriterSettings(max_rank=64))


def test_the_index_keeps_it_as_it_is(tmp_path: Path) -> None:
    index, request = Index(tmp_path / "index.db"), WriteRequest("small", 2, ended=(Ended("", "a", RENAMED, "é"),))
    index.migrate()
    index.begin_write([Record("é", "1")], request.to_json())
    pending = index.pending_write()
    assert pending is not None
    assert WriteRequest.from_json(pending.request) == request
    index.close()


def test_what_no_plan_can_follow_is_refused() -> None:
    with pytest.raises(UnknownChoice, match="goal must be one of fast, small"):
        WriteRequest("medium").check()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 1 and 8, not 9"):
        WriteRequest(rank=9, settings=WriterSettings(max_rank=8)).check()
    WriteRequest(rank=8, settings=WriterSettings(max_rank=8)).check()
