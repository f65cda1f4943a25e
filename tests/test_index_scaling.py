"""The measurement of how an index grows, at a size of a test."""

from contextlib import closing
from pathlib import Path

import pytest

from loramem.index.index import Index

from .benchmarks import index_scaling


def test_it_measures_stores_that_check_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_scaling, "COMMITS", 3)
    found = list(index_scaling.measure(tmp_path / "memory", [500, 1000]))
    assert [one.rows for one in found] == [500, 1000]
    assert all(one.commit_ms >= one.computing_ms > 0 and one.peak_mb > 1 for one in found)


def test_no_question_about_one_key_looks_through_the_history(tmp_path: Path) -> None:
    with closing(Index(tmp_path / "index.db")) as index:
        index.migrate()
        asked = list[str]()
        index.db.conn.set_trace_callback(asked.append)
        index.versions("", "a", renamed=True)
        index.asked_ever("", "a")
        index.successor("", "a")
        index.db.conn.set_trace_callback(None)
        queries = [query for query in asked if "versions" in query and "where" in query]
        plans = [str(tuple(step)) for query in queries for step in index.db.conn.execute(f"explain query plan {query}")]
        named = ("key=?", "successor=?", "question_of=?")  # a namespace alone is most of a store
        looked = [step for step in plans if "SCAN" in step or "SEARCH versions" in step]
        assert len(looked) >= 3 and all(any(name in step for name in named) for step in looked), looked
