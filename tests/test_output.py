"""What the command prints: exact, in ASCII that says the same, or refused in one line, whatever stdout can say."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem import MemoryStore
from loramem.errors import InvalidField, StoreError
from loramem.index.commits import commit_records
from loramem.index.index import Index

from .hub_server import HubServer

RECORDS = {"k\u00e9": "1\u00e9\u2603", "red": "\x1b[31m7\x1b[0m"}
ODD = {"from": "an older version \ud800", "\udfff": ["\ud83d"]}
Shown = Callable[..., tuple[int, bytes, str]]


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose first record has metadata with lone surrogates, as older versions took them."""
    path = tmp_path_factory.mktemp("output") / "store"
    with MemoryStore(path, str(base)) as store:
        store.write(RECORDS)
    index = Index.open(path / "index.db")
    known = index.find("", "k\u00e9")
    assert known is not None
    commit_records(index, [replace(known, metadata=ODD)])
    index.close()
    return path


@pytest.fixture
def shown(written: Path, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Runs a command on the store with streams of an encoding; exit code, bytes of stdout, text of stderr."""

    def get(*arguments: str, encoding: str = "utf-8") -> tuple[int, bytes, str]:
        out, err = io.BytesIO(), io.BytesIO()
        with monkeypatch.context() as patched:
            patched.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
            patched.setattr("sys.stderr", io.TextIOWrapper(err, encoding=encoding, write_through=True))
            code = run([*arguments, "--store", str(written)])
            return code, out.getvalue(), err.getvalue().decode(errors="replace")

    return get


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_json_says_the_same_in_every_encoding(shown: Shown, encoding: str) -> None:
    code, out, err = shown("recall", "--all", "--json", encoding=encoding)
    assert (code, err) == (0, "")
    assert {line["key"]: line["value"] for line in map(json.loads, out.decode().splitlines())} == RECORDS
    assert out.isascii() == (encoding != "utf-8")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_value_that_stdout_cannot_say_is_refused_before_it_is_printed(shown: Shown, encoding: str) -> None:
    code, out, err = shown("recall", "k\u00e9", encoding=encoding)
    assert (code, out, len(err.splitlines())) == (1, b"", 1)
    assert "PYTHONIOENCODING=utf-8" in err
    assert "--json" in err
    code, out, _ = shown("recall", "--all", encoding=encoding)
    assert code == 1
    assert out in (b"", b"red\t\x1b[31m7\x1b[0m\n")  # whole lines alone


def test_a_value_that_looks_like_a_colour_is_printed_to_the_byte(shown: Shown) -> None:
    assert shown("recall", "red") == (0, b"\x1b[31m7\x1b[0m\n", "")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_lists_show_what_an_older_store_holds(shown: Shown, encoding: str) -> None:
    code, out, _ = shown("ls", "--json", encoding=encoding)
    assert code == 0
    assert [json.loads(line)["metadata"] for line in out.decode().splitlines()] == [ODD, {}]
    for arguments in (["ls"], ["stats"], ["history", "k\u00e9"], ["explain", "k\u00e9"]):
        code, out, err = shown(*arguments, encoding=encoding)
        assert (code, err) == (0, ""), arguments
        assert out


def test_an_older_store_is_copied_and_published_or_refused(
    written: Path, base: Path, hub: HubServer, tmp_path: Path
) -> None:
    with MemoryStore(written) as store:
        store.export(tmp_path / "all.tar")
        assert store.push("me/keys", include_keys=True).records == 2
        with pytest.raises(StoreError, match=r"'ké'.*loramem update"):
            store.push("me/values", include_keys=True, include_values=True)
        with pytest.raises(InvalidField, match="lone surrogate"):
            store.update("k\u00e9", "2")
    with MemoryStore.import_bundle(tmp_path / "all.tar", tmp_path / "copy") as copy:
        assert [record.metadata for record in copy.records()] == [ODD, {}]
        assert copy.update("k\u00e9", metadata={"from": "now"}).written == 0
        assert next(copy.records()).metadata == {"from": "now"}


@pytest.mark.parametrize("command", ["write - <&-", "write - --format csv </dev/null", "recall k >&-", "ls >&- 2>&-"])
def test_closed_streams_end_in_one_line(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m loramem_cli {command}'],
        env={**os.environ, "LORAMEM_STORE": str(tmp_path / "store")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, 10)
    assert len(done.stderr.splitlines()) == ("2>&-" not in command)
    assert not (tmp_path / "store").exists()


def test_a_question_to_a_closed_stdin_is_an_interrupt(written: Path, hub: HubServer, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert run(["push", "me/asked", "--store", str(written)]) == 130
    sys.stdin.close()  # what was opened in its place
    assert "Interrupted" in capsys.readouterr().err
