"""Timings are a cache: believed where they are, missed by nobody where they are not."""

import json
from pathlib import Path

import pytest

from loramem.planning.timings import KEPT, default_file, note_time, seconds_per_visit

WEIGHTS = "0123456789ab"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_they_lie_in_the_users_cache(tmp_path: Path) -> None:
    assert default_file() == tmp_path / "cache" / "loramem" / "timings.json"


def test_before_the_first_write_nothing_is_known_and_nothing_is_made() -> None:
    assert seconds_per_visit(WEIGHTS) is None
    assert not default_file().parent.exists()


def test_a_write_is_remembered_by_what_a_token_and_visit_took() -> None:
    note_time(WEIGHTS, "cpu", training_s=6.0, tokens_visited=3000)
    assert seconds_per_visit(WEIGHTS) == 0.002
    assert seconds_per_visit(WEIGHTS, "cpu") == 0.002


def test_base_models_and_devices_are_told_apart() -> None:
    note_time(WEIGHTS, "cpu", 5.0, 1)
    note_time(WEIGHTS, "cuda", 1.0, 1)
    note_time("ba9876543210", "cpu", 7.0, 1)
    assert seconds_per_visit(WEIGHTS, "cpu") == 5
    assert seconds_per_visit(WEIGHTS, "cuda") == 1
    assert seconds_per_visit(WEIGHTS) == 3  # of any device
    assert seconds_per_visit("ba9876543210") == 7
    assert seconds_per_visit(WEIGHTS, "mps") is None


def test_the_median_of_the_last_ones_is_believed() -> None:
    for seconds in (1.0, 2.0, 90.0):
        note_time(WEIGHTS, "cpu", seconds, 1)
    assert seconds_per_visit(WEIGHTS) == 2
    for _ in range(KEPT):
        note_time(WEIGHTS, "cpu", 4.0, 1)
    assert json.loads(default_file().read_text()) == {f"{WEIGHTS}:cpu": [4.0] * KEPT}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'{"0123456789ab:cpu": "soon"}', b'{"0123456789ab:cpu": 3}'],
    ids=repr,
)
def test_a_damaged_file_is_forgotten_and_replaced(content: bytes) -> None:
    default_file().parent.mkdir(parents=True)
    default_file().write_bytes(content)
    assert seconds_per_visit(WEIGHTS) is None
    note_time(WEIGHTS, "cpu", 3.0, 1)
    assert seconds_per_visit(WEIGHTS) == 3


def test_a_cache_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    note_time(WEIGHTS, "cpu", 3.0, 1)
    assert seconds_per_visit(WEIGHTS) is None


def test_a_file_that_cannot_be_replaced_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    note_time(WEIGHTS, "cpu", 3.0, 1)
    monkeypatch.setattr(Path, "replace", refuse)
    note_time(WEIGHTS, "cpu", 5.0, 1)
    assert seconds_per_visit(WEIGHTS) == 3


def test_nothing_is_left_beside_the_file_but_its_lock() -> None:
    note_time(WEIGHTS, "cpu", 3.0, 1)
    assert {path.name for path in default_file().parent.iterdir()} <= {"timings.json", "timings.lock"}
