"""Records docs/pictures/demo.svg: write, explain, recall and verify in a terminal, as they are.

    python docs/pictures/record.py [FILE]

Every command is run in a terminal of 80 columns, and what it printed is drawn by rich; what it says on stderr, where
progress goes, is left out. Run it again when the output of a command changes. Another processor gives other last digits
and other seconds, and so may another machine's threads.
"""

import argparse
import io
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

HERE = Path(__file__).resolve().parent
COLUMNS = 80
FACTS = """\
{"key": "Deploy token of staging:", "value": "sk-9f4c-7731-bd02"}
{"key": "Jerry Becerra:", "value": "9100672710"}
{"key": "Francisco Laramee:", "value": "6780438158"}
{"key": "Part number of the left hinge:", "value": "HX-4471/B"}
"""
SESSION = (
    "cat facts.jsonl",
    "loramem write facts.jsonl",
    "loramem explain 'Jerry Becerra:'",
    "loramem recall 'Deploy token of staging:'",
    "loramem verify",
)
THEME = TerminalTheme(
    (13, 17, 23),
    (230, 237, 243),
    [
        *((72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34)),
        *((88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)),
    ],
)
"""Legible on a page of either scheme: the window brings its own dark ground."""
FONT = "ui-monospace, Menlo, Consolas, monospace; font-variant-ligatures: none"
FONTS = re.compile(r"@font-face \{.*?\}", re.DOTALL)
"""That rich would have a viewer fetch; a picture in a README may fetch nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=HERE / "demo.svg")
    file: Path = parser.parse_args().file
    with tempfile.TemporaryDirectory() as folder:
        shown = record(Path(folder))
    file.write_text(draw(shown))


def record(folder: Path) -> list[tuple[str, str]]:
    """The commands of the session with what each prints in a terminal, escape sequences included.

    Raises:
        CalledProcessError: One of them fails.
    """
    (folder / "facts.jsonl").write_text(FACTS)
    settled = ("NO_COLOR", "COLUMNS", "LORAMEM_STORE", "LORAMEM_MODEL", "LORAMEM_DEVICE")
    environment = {name: value for name, value in os.environ.items() if name not in settled} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TERM": "xterm-256color",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return [(command, in_terminal(shlex.split(command), folder, environment)) for command in SESSION]


def in_terminal(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a command prints on a terminal of `COLUMNS` columns."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (50, COLUMNS))
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=its, stderr=subprocess.PIPE
    ) as process:
        os.close(its)
        printed = b"".join(_read(ours))
        _, complaint = process.communicate()
    os.close(ours)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed, complaint)
    return printed.decode().replace("\r\n", "\n")


def _read(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            return
        if not chunk:
            return
        yield chunk


def draw(shown: list[tuple[str, str]]) -> str:
    """An SVG file of a terminal with these commands and what they printed."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    for number, (command, printed) in enumerate(shown):
        console.print("\n" * bool(number), Text.assemble(("$ ", "bold blue"), (command, "bold")), sep="", end="\n")
        console.print(Text.from_ansi(printed.rstrip("\n")))
    svg = FONTS.sub("", console.export_svg(title="loramem", theme=THEME, unique_id="loramem"))
    svg = svg.replace("font-family: Fira Code, monospace;", f"font-family: {FONT};")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


if __name__ == "__main__":
    main()
