"""Reads results files and writes their report: lines, Markdown, plots and one HTML page."""

import json
from pathlib import Path

from loramem._util.files import outside_stores, write_synced
from loramem.errors import InputError
from loramem.suites import figures
from loramem.suites.page import page
from loramem.suites.report import Report, build, markdown, parse


def read(folder: Path) -> Report:
    """The report of all results files (``*.jsonl``) of a folder, which are taken in the order of their names.

    Raises:
        InputError: A file is not JSON lines in UTF-8, or lines of a suite do not make its table.
    """
    lines, skipped = [], 0
    for path in sorted(folder.glob("*.jsonl")):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8: {error}.") from None
        ours, others = parse(text, str(path))
        lines += ours
        skipped += others
    return build(lines, skipped)


def write(report: Report, out: Path) -> tuple[Path, ...]:
    """Write ``results.jsonl``, the plots, ``report.md`` and ``report.html`` into a folder.

    Everything is made before the first file is written, each replaces an older one whole, and the page comes last.
    Without matplotlib there are no plots, and the report says so.

    Args:
        out: Created if missing; other files in it stay.

    Returns:
        The files in the order written.

    Raises:
        StoreError: The folder lies in a store.
    """
    outside_stores(out)
    drawn = figures.installed()
    remarks = report.remarks(drawn)
    plots = [(part.stem(plot), plot, part.title) for part in report.parts for plot in part.plots if drawn]
    drawings = {stem: figures.draw(plot, title, "svg") for stem, plot, title in plots}
    files = {"results.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in report.lines).encode()}
    for stem, plot, title in plots:
        files |= {f"{stem}.png": figures.draw(plot, title, "png"), f"{stem}.svg": drawings[stem]}
    files["report.md"] = markdown(report, remarks, drawings).encode()
    files["report.html"] = page(report, remarks, drawings).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_synced(out / name, content, mode=0o644)
    return tuple(out / name for name in files)
