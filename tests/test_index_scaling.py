"""The measurement of how an index grows, at a size of a test."""

from pathlib import Path

import pytest

from .benchmarks import index_scaling


def test_it_measures_stores_that_check_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_scaling, "COMMITS", 3)
    found = list(index_scaling.measure(tmp_path / "memory", [500, 1000]))
    assert [one.rows for one in found] == [500, 1000]
    assert all(one.commit_ms >= one.computing_ms > 0 and one.peak_mb > 1 for one in found)
