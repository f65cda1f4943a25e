"""A file of the user's cache: the value that was saved, the one before, or none."""

import math
from pathlib import Path

import pytest

from loramem._util.cache import JsonFile, cache_folder


def a_number(content: dict[str, float]) -> float:
    return float(content["number"])


@pytest.fixture
def file(tmp_path: Path) -> JsonFile[float]:
    return JsonFile(tmp_path / "folder" / "number.json", a_number)


def test_it_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "loramem"


def test_what_was_saved_last_is_known_and_nothing_is_left_beside(file: JsonFile[float]) -> None:
    assert file.known() is None
    for number in (7.0, 8.0):
        file.save({"number": number})
    assert file.known() == file.load() == 8.0
    assert list(file.path.parent.iterdir()) == [file.path]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"number": "x"}'], ids=repr)
def test_a_damaged_file_is_as_good_as_none(file: JsonFile[float], content: bytes) -> None:
    file.save({"number": 7})
    file.path.write_bytes(content)
    assert file.known() is None
    file.remember({"number": 8})
    assert file.known() == 8.0


def test_a_folder_in_its_place_is_none_either(file: JsonFile[float]) -> None:
    file.path.mkdir(parents=True)
    assert file.known() is None
    file.remember({"number": 8})
    assert list(file.path.parent.iterdir()) == [file.path]
    with pytest.raises(OSError):
        file.save({"number": 8})


def test_what_json_cannot_say_leaves_the_old_value(file: JsonFile[float]) -> None:
    file.save({"number": 7})
    with pytest.raises(ValueError, match="JSON"):
        file.save({"number": math.nan})
    assert file.known() == 7.0
