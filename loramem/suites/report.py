"""What a report of the suites says: results lines, grouped by suite and by what they were measured on; as Markdown too.

Pure: lines in, text out. Files are read and written by `loramem.suites.reporter`.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramem.errors import InputError
from loramem.planning.plots import MISSING
from loramem.suites.figures import HeatMap, Plot
from loramem.suites.runner import SUITES, Result, Suite, Table, load_suite

TITLE = "loramem: measurements"
NAMED = ("base_model", "processor", "threads")
"""The conditions that a table is called by; the others stand below, or in its title where they tell two apart."""


@dataclass(frozen=True)
class Part:
    """The lines of one suite that were measured under the same conditions."""

    anchor: str
    """Its name in files and links, from the suite and the order in which the conditions first came up."""
    title: str
    facts: Mapping[str, Any]
    """Base model, machine, versions and seeds."""
    commands: tuple[str, ...]
    """What measured it."""
    lines: tuple[Result, ...]
    table: Table
    plots: tuple[Plot | HeatMap, ...]

    def stem(self, plot: Plot | HeatMap) -> str:
        """The name of a plot's files, without suffix."""
        return f"{self.anchor}-{plot.name}"


@dataclass(frozen=True)
class Section:
    """One suite, the latest conditions first."""

    suite: str
    summary: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    sections: tuple[Section, ...]
    skipped: int
    """Lines that are of no suite."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for section in self.sections for part in section.parts)

    @property
    def introduction(self) -> str:
        """How to read it."""
        return (
            f"{len(self.lines)} measurements, grouped by suite and by what they were measured on: base model, machine, "
            "threads and versions. The latest stand first. A local folder goes by its name, in the commands too."
        )

    @property
    def lines(self) -> tuple[Result, ...]:
        """By suite and conditions, the earliest first; otherwise as they came."""
        ordered = (part for section in self.sections for part in sorted(section.parts, key=_number))
        return tuple(line for part in ordered for line in part.lines)

    def remarks(self, drawn: bool) -> tuple[str, ...]:
        """What is not in the report, in sentences."""
        skipped = f"Lines that are of no suite, and left out: {self.skipped}."
        undrawn = f"Without plots: they need {MISSING}"
        return (skipped,) * bool(self.skipped) + (undrawn,) * (not drawn)


def parse(text: str, source: str) -> tuple[list[Result], int]:
    """The lines of a results file that the runner wrote, and the number of those that it did not.

    What an interrupt left of a last line counts among these.

    Raises:
        InputError: A line is not JSON.
    """
    *whole, torn = text.split("\n")
    lines: list[Result] = []
    skipped = int(bool(torn))
    for number, one in enumerate(whole, 1):
        try:
            line: Any = json.loads(one) if one.strip() else None
        except ValueError as error:
            raise InputError(f"{source}, line {number}, is not JSON: {error}.") from None
        match line:
            case {"id": str(), "suite": str(suite), "cell": dict(), "conditions": dict(), "result": dict()} if (
                suite in SUITES and "command" in line
            ):
                lines.append(line)
            case None:
                pass
            case _:
                skipped += 1
    return lines, skipped


def build(lines: Iterable[Result], skipped: int = 0) -> Report:
    """Group lines by suite and conditions, and have every group's table and plots made.

    Args:
        lines: The latest last; of those with the same id the latest counts.

    Raises:
        InputError: A suite cannot make its table of a group.
    """
    latest = {line["id"]: line for line in lines}
    age = {id_: place for place, id_ in enumerate(latest)}
    suites: dict[str, dict[str, list[Result]]] = {}
    for line in latest.values():
        same = json.dumps(_setting(line), sort_keys=True)
        suites.setdefault(line["suite"], {}).setdefault(same, []).append(line)
    sections = []
    for name in (name for name in SUITES if name in suites):
        suite, groups = load_suite(name), list(suites[name].values())
        settings = [_setting(group[0]) for group in groups]
        parts = [
            _part(name, suite, number, group, _title(settings[number - 1], settings))
            for number, group in enumerate(groups, 1)
        ]
        parts.sort(key=lambda part: -age[part.lines[-1]["id"]])
        summary = (suite.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "")
        sections.append(Section(name, summary, tuple(parts)))
    return Report(tuple(sections), skipped)


def markdown(report: Report, remarks: Sequence[str], drawn: Collection[str]) -> str:
    """The report as Markdown, with the plots that were drawn (by `Part.stem`) as PNG files beside it."""
    blocks = [f"# {TITLE}", report.introduction, *map(_escaped, remarks)]
    for section in report.sections:
        blocks += [f"## {section.suite}", _escaped(section.summary)]
        for part in section.parts:
            facts = "\n".join(f"- {_escaped(name)}: {_escaped(str(fact))}" for name, fact in part.facts.items())
            blocks += [f"### {_escaped(part.title)}", facts, "\n".join(("```", *part.commands, "```"))]
            stems = {part.stem(plot): plot for plot in part.plots if part.stem(plot) in drawn}
            for stem, plot in stems.items():
                blocks += [f"![{_escaped(plot.title)}]({stem}.png)", _escaped(plot.note)]
            blocks += [markdown_table(part.table), *map(_escaped, part.table.notes)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(table: Table) -> str:
    """A table of text as Markdown."""
    head, *rows = ([_escaped(cell) for cell in row] for row in (table.columns, *table.rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _part(name: str, suite: Suite, number: int, lines: Sequence[Result], title: str) -> Part:
    try:
        table, plots = suite.table(lines), suite.plots(lines)
    except KeyError as error:
        raise InputError(
            f"The {len(lines)} lines of {name} on {title} make no table, for want of {error}. Measure what is missing "
            f"({'; '.join(_commands(lines))}), or keep these lines in another folder."
        ) from None
    seeds = sorted({line["cell"]["seed"] for line in lines if "seed" in line["cell"]})
    facts = {field.replace("_", " "): fact for field, fact in _setting(lines[0]).items()}
    facts |= {"seeds": ", ".join(map(str, seeds)), "measurements": len(lines)}
    return Part(f"{name}-{number}", title, facts, _commands(lines), tuple(lines), table, plots)


def _commands(lines: Iterable[Result]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line["command"] for line in lines))


def _setting(line: Result) -> dict[str, Any]:
    """What a line was measured on: the conditions, and the device, which the runner leaves to the suites to say."""
    base = line["result"].get("base", {})
    return {**line["conditions"], **{field: base[field] for field in ("device", "dtype") if field in base}}


def _title(setting: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    model, processor, threads = (setting.get(name, "?") for name in NAMED)
    alike = [other for other in others if all(other.get(name) == setting.get(name) for name in NAMED)]
    apart = [name for name in setting if any(other.get(name) != setting[name] for other in alike)]
    told = "".join(f", {name.replace('_', ' ')} {setting[name]}" for name in apart)
    return f"{model} on {processor}, {threads} {'thread' if threads == 1 else 'threads'}{told}"


def _number(part: Part) -> int:
    return int(part.anchor.rpartition("-")[2])


def _escaped(text: str) -> str:
    """Text that stands in Markdown for itself, on one line."""
    return re.sub(r"[\\`*\[\]<&|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
