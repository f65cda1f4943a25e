"""The documentation runs: Python blocks, and console sessions with what they print, numbers apart.

A page is run from top to bottom in one folder. `$ cat FILE` makes a file of what stands below it where there is none.
`<!-- skip: next "why" -->` before a block leaves it out.
"""

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest import SkipTest

import pytest
from loramem_cli.main import run
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from .conftest import ROOT
from .screen import Screen

PAGES = sorted(
    path
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md"), ROOT / "README.md")
    if "$ loramem" in path.read_text() or "```python" in path.read_text()
)
COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
EXACT = ("recall", "history")
"""Commands whose numbers are the point."""


def session(example: Example) -> str | None:
    """Run a console block; what differs, or None."""
    for command, expected in steps(example.parsed):
        name, *arguments = shlex.split(command, comments=True)
        if name == "cat" and not (file := Path(arguments[0])).exists():
            file.write_text(expected)
            continue
        assert name == "loramem", f"{command!r} is no command that documentation can be run with"
        code, printed, told = loramem(arguments)
        got = told if expected.startswith(TOLD) else printed
        assert bool(code) == expected.startswith("Error:"), f"{command}: exit code {code}\n{told}"
        plain = (lambda text: text) if arguments[0] in EXACT else without_numbers
        if not doctest.OutputChecker().check_output(plain(expected), plain(got), COMPARE):
            return f"{command} prints\n{got}\nnot\n{expected}"
    return None


TOLD = (
    "Error:",
    "Written;",
    "Updated;",
    "Renamed;",
    "Metadata",
    "Deleted",
    "Erased",
    "Removed",
    "Copied",
    "Exported",
    "Imported",
)
"""What standard error begins with; everything else that a page shows is standard output."""


def steps(block: str) -> Iterator[tuple[str, str]]:
    """Each command with the output that stands below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, expected = part.replace("\\\n", " ").partition("\n")
        yield command, expected


def loramem(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output as a terminal shows it, and standard error."""
    out, err = Screen(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    return code, out.text, err.getvalue()


def without_numbers(text: str) -> str:
    return re.sub(r"[0-9a-f]{32}|\d[\d.,]*", "0", text.replace("━", ""))  # bars are numbers too


PARSERS = (SkipParser(), PythonCodeBlockParser(), CodeBlockParser(language="console", evaluator=session))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    document = Document.parse(str(page), *PARSERS)
    for example in document.examples():
        with contextlib.suppress(SkipTest):  # of a block; the page goes on
            example.evaluate()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_outside_the_site_lead_somewhere(page: str) -> None:
    """The site's own are checked when it is built."""
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text) + re.findall(r"`(tests/[\w./]+)`", text)
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 6 * 1024
