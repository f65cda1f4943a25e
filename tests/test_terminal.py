"""What commands look like: fitted to a terminal of any width without breaking a word, and plain in a pipe."""

import io
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from loramem_cli import terminal
from loramem_cli.main import cli, run
from rich.console import Console

from loramem import MemoryStore
from loramem._util.printable import printable

from .conftest import ROOT
from .screen import ANSI, Screen

Shown = Callable[..., dict[tuple[str, ...], tuple[str, str]]]
RENAMED = "the door with a long name that no column of a table can hold beside all the others"
GATE = "the gate behind the old mill at the far end of the long road"
COMMANDS = (
    *(("ls",), ("ls", "--adapter", "?"), ("stats",), ("history", RENAMED), ("history", "gone"), ("recall", "dor")),
    *(("explain", GATE), ("explain", "nowhere"), ("verify",), ("verify", "--quick"), ("rm", "door")),
    *(("check",), ("check", "--target", "vllm", "--dtype", "bfloat16"), ("deploy", "served", "--target", "vllm")),
    *(("deploy", "ready", "--target", "peft"), ("compact",), ("repair",), ("gc",), ("erase", "late"), ("stats",)),
    *(("export", "copy.tar"), ("backup", "copy"), ("import", "copy.tar", "--store", "again"), ("put", "k", "1234")),
    *(("capacity", "--length", "4000"), ("capacity", "--length", "40", "--kind", "none"), ("capacity",)),
    *(("law", "--points"), ("suite", "list"), ("suite", "report", "."), ("write", "--discard"), ("compact", "--all")),
    ("suite", "run", "write-speed", "--no-run", "--out", str(ROOT / "docs" / "results" / "write-speed.jsonl")),
)
"""Commands whose output is laid out, and mistakes; `recall` prints values as they are."""


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two adapters with a record that was renamed and one that was deleted."""
    path = tmp_path_factory.mktemp("terminal") / "memory"
    with MemoryStore(path, str(base)) as opened:
        opened.write({"door": "1", GATE: "27", "a/b/c": "3", "tür 7": "4"})
        opened.write({"gone": "5", "late": "6"})
        opened.rename("door", RENAMED)
        opened.delete("gone")
    return path


@pytest.fixture(scope="module")
def shown(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """What stdout and stderr get of every command, on a terminal of a width or, for None, without one."""

    @cache
    def get(width: int | None, **environment: str) -> dict[tuple[str, ...], tuple[str, str]]:
        folder, told = tmp_path_factory.mktemp("shown"), {}
        shutil.copytree(written, folder / "memory")
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            patched.setenv("TERM", "xterm-256color")
            patched.delenv("NO_COLOR", raising=False)
            for name, value in {"COLUMNS": str(width or 80), **environment}.items():
                patched.setenv(name, value)
            for arguments in COMMANDS:
                out, err = (io.StringIO() if width is None else Screen() for _ in range(2))
                patched.setattr("sys.stdout", out)
                patched.setattr("sys.stderr", err)
                run(arguments)
                told[arguments] = out.getvalue(), err.getvalue()
        return told

    yield get


def plain(text: str) -> str:
    """Without colours, bars, and numbers that differ from run to run."""
    return re.sub(r"\d[\d.,]*", "0", re.sub(r"[━╸╺\u2800-\u28ff]+", "", ANSI.sub("", text)))


@pytest.mark.parametrize("width", [80, 120])
def test_every_command_fits_the_terminal_and_breaks_no_word(shown: Shown, width: int) -> None:
    whole = shown(10_000)
    for arguments, texts in shown(width).items():
        known = {word for text in whole[arguments] for word in plain(text).split()}
        for text in texts:
            assert not [line for line in ANSI.sub("", text).splitlines() if len(line) > width], arguments
            assert set(plain(text).split()) <= known | WORKING, arguments


WORKING = set(
    "loading the base model of facts learned, certified, the least certain once more certified s min h left".split()
)
"""What bars say, which come and go with the clock."""


@pytest.mark.parametrize("command", [(), *((name,) for name in cli.commands), ("suite", "run"), ("suite", "report")])
def test_help_fits_the_terminal_and_breaks_no_word(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {}
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        assert run([*command, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= width
        words[width] = set(text.split())
    assert words[80] == words[120]
    assert max(map(len, text.splitlines())) > 80


def test_a_pipe_gets_plain_lines_whatever_the_environment_says(shown: Shown) -> None:
    for arguments, texts in shown(None, FORCE_COLOR="1", TTY_COMPATIBLE="1").items():
        for text in texts:
            assert not ANSI.search(text), arguments
            assert "━" not in text, arguments
            assert "\r" not in text, arguments
    out, _ = shown(None, FORCE_COLOR="1", TTY_COMPATIBLE="1")["ls",]
    head, *rows = (line.split("\t") for line in out.splitlines())
    assert head == ["key", "namespace", "tokens", "lowest p", "by chat", "adapter", "written"]
    assert {row[0] for row in rows} == {RENAMED, GATE, "a/b/c", "tür 7", "late"}
    assert {len(row) for row in rows} == {len(head)}


def test_no_color_means_none(shown: Shown) -> None:
    colour = re.compile(r"\x1b\[(?:[0-9]+;)*[349][0-7]")
    assert colour.search(shown(80)["explain", GATE][0])
    assert not any(colour.search(text) for texts in shown(80, NO_COLOR="1").values() for text in texts)


def test_what_is_longer_than_a_column_is_folded_and_nothing_is_lost() -> None:
    address = "https://example.com/" + "very/long/path/" * 6
    table = terminal.table(["key", "written"], [[address, "2026-01-01"], ["", "2026-01-02"]], 60)
    out = io.StringIO()
    Console(file=out, width=60).print(table)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert "".join(line[:-12].strip() for line in lines[1:]) == address


def test_what_would_move_the_cursor_is_shown_as_an_escape() -> None:
    assert printable("a\x1b[31mb\nc\td é☃") == r"a\x1b[31mb\nc\td é☃"


def test_columns_in_which_nothing_stands_are_left_out() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(terminal.table(["key", "namespace", "p"], [["a", "", "0.5"]], 60))
    assert out.getvalue().split() == ["key", "p", "a", "0.5"]


def test_a_path_longer_than_a_line_stays_whole() -> None:
    path = "/" + "folder/" * 12
    assert terminal.wrap(f"Error: {path} is no store", 40, 2).splitlines() == [f"Error: {path}", "  is no store"]
    assert terminal.wrap("   set in", 40) == "   set in"
