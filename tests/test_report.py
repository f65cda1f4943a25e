"""The report of the suites: what it groups, what it leaves out, and a page that needs nothing but itself."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from loramem_cli.main import run

from loramem.errors import InputError, LoramemError
from loramem.suites import figures, large_base, recall_speed, reporter, runner, write_scaling, write_speed
from loramem.suites.figures import Axis, HeatMap, Plot, Point, Series, draw, figure, point
from loramem.suites.page import inline, numeric
from loramem.suites.report import Report, build, markdown, parse

from .conftest import ROOT

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")
RESULTS = ROOT / "docs" / "results"
NASTY = "<b>&|$x$ `_m_` \"'"
CONDITIONS = {"base_model": "loramem-tiny", "processor": "A", "cores": 2, "threads": 2, "loramem": "0.1.0"}


def scaling(
    records: int,
    seed: int = 0,
    conditions: Mapping[str, Any] | None = None,
    command: str = "loramem suite run write-scaling --threads 2",
    **result: Any,
) -> dict[str, Any]:
    """A made-up line of write-scaling: 25 ms a record, 400 MiB and one more for every ten records."""
    conditions = {**CONDITIONS, **(conditions or {})}
    cell = write_speed.Cell(write_speed.OURS, records, seed, conditions["base_model"], "auto", quick=False)
    measured = {
        **{"seconds": records / 40, "records": records, "steps": 10 * records, "visits_per_record": 5.0},
        **{"adapters": 1, "rank": 8, "parameters": 1000 * records, "exact": records, "min_prob": 0.75},
        **{"loaded_memory_mb": 400.0, "peak_memory_mb": 400 + records / 10},
        **{"base": {"device": "cpu", "dtype": "float32"}, **result},
    }
    identity = json.dumps([dict(cell.identity), conditions, measured["base"]])
    return {
        "id": f"{hash(identity):x}",
        "suite": "write-scaling",
        "cell": dict(cell.identity),
        "conditions": conditions,
        "command": command,
        "result": measured,
    }


def text_of(*lines: Any) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made_up(tmp_path / "results")


def made_up(folder: Path) -> Path:
    """Two sets of conditions, one of them with a name that must be escaped, and a line of another tool."""
    folder.mkdir()
    (folder / "a.jsonl").write_text(text_of(scaling(100), {"step": 1, "loss": 2.0}, scaling(1000)))
    (folder / "b.jsonl").write_text(text_of(scaling(100, conditions={"base_model": NASTY})))
    (folder / "notes.txt").write_text("no results")
    return folder


# --- lines


def test_lines_of_other_tools_are_counted_and_left_out() -> None:
    ours = scaling(100)
    foreign = [
        {"step": 100, "loss": 6.0},
        {**ours, "suite": "placement"},  # of a runner of its own
        {**ours, "cell": "text"},
        {name: value for name, value in ours.items() if name != "conditions"},
        ["a list"],
        7,
    ]
    assert parse(text_of(*foreign, ours) + "\n", "a file") == ([ours], len(foreign))


def test_what_an_interrupt_left_of_a_line_is_left_out() -> None:
    ours = scaling(100)
    assert parse(text_of(ours) + '{"id": "half a li', "a file") == ([ours], 1)


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text(text_of(scaling(100)) + "not json\n")
    with pytest.raises(InputError, match=r"broken\.jsonl, line 2, is not JSON"):
        reporter.read(tmp_path)
    (tmp_path / "broken.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"broken\.jsonl is not UTF-8"):
        reporter.read(tmp_path)


# --- groups


def test_lines_are_grouped_by_suite_and_by_all_they_were_measured_on() -> None:
    other_torch, one_thread = {"torch": "3"}, {"threads": 1}
    lines = [
        scaling(100, conditions={"torch": "2"}),
        scaling(100, conditions={"torch": "2"}, base={"device": "cuda", "dtype": "bfloat16"}),
        scaling(100, conditions=other_torch),
        scaling(100, conditions=one_thread),
        scaling(1000, conditions={"torch": "2"}),
    ]
    (section,) = build(lines).sections
    assert section.suite == "write-scaling"
    assert section.summary.startswith("Whether writing stays linear")
    assert [(part.anchor, part.title, [line["cell"]["records"] for line in part.lines]) for part in section.parts] == [
        # The one that was measured last stands first; the numbers are in the order in which they came up.
        ("write-scaling-1", "loramem-tiny on A, 2 threads, torch 2, device cpu, dtype float32", [100, 1000]),
        ("write-scaling-4", "loramem-tiny on A, 1 thread", [100]),
        ("write-scaling-3", "loramem-tiny on A, 2 threads, torch 3, device cpu, dtype float32", [100]),
        ("write-scaling-2", "loramem-tiny on A, 2 threads, torch 2, device cuda, dtype bfloat16", [100]),
    ]


def test_suites_stand_in_the_order_of_the_registry_and_lines_as_they_came() -> None:
    recall = {**scaling(5), "id": "r", "suite": "recall-speed", "result": READ}
    lines = [recall, scaling(1000), scaling(100, conditions={"threads": 1}), scaling(100)]
    report = build(lines, skipped=3)
    assert [section.suite for section in report.sections] == ["write-scaling", "recall-speed"]
    assert list(report.lines) == [lines[1], lines[3], lines[2], recall]
    assert report.skipped == 3


def test_of_lines_with_the_same_id_the_last_counts() -> None:
    (part,) = build([scaling(100, seconds=1.0), scaling(1000), scaling(100, seconds=2.0)]).parts
    assert [line["result"]["seconds"] for line in part.lines] == [2.0, 25.0]


def test_lines_that_make_no_table_are_named_with_what_to_do() -> None:
    line = scaling(100)
    del line["result"]["steps"]
    with pytest.raises(InputError, match=r"The 1 lines of write-scaling on loramem-tiny.*'steps'.*suite run"):
        build([line])


def test_what_a_table_was_measured_on_is_said() -> None:
    (part,) = build([scaling(100, seed) for seed in (0, 1)]).parts
    assert part.facts == {
        **{"base model": "loramem-tiny", "processor": "A", "cores": 2, "threads": 2, "loramem": "0.1.0"},
        **{"device": "cpu", "dtype": "float32", "seeds": "0, 1", "measurements": 2},
    }


# --- commands


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (runner.SuiteOptions(threads=2), "--threads 2"),
        (
            runner.SuiteOptions(records=(7, 9), seeds=2, device="cpu"),
            "--threads 1 --device cpu --records 7,9 --seeds 2",
        ),
        (runner.SuiteOptions(model="org/other", quick=True), "--threads 1 --model org/other --quick"),
        (
            runner.SuiteOptions(methods=("sft",), ranks=(1, 2), workers=2),
            "--threads 1 --workers 2 --ranks 1,2 --methods sft",
        ),
        (runner.SuiteOptions(data=Path("of/mine/book.jsonl"), paper=True), "--threads 1 --data book.jsonl --paper"),
        (runner.SuiteOptions(unit="down_proj", layer=4), "--threads 1 --unit down_proj --layer 4"),
        (runner.SuiteOptions(store=Path("my store"), every_record=True), "--threads 1 --store 'my store' --all"),
    ],
)
def test_a_request_knows_its_command(request_: runner.SuiteOptions, options: str) -> None:
    assert request_.command("phase") == f"loramem suite run phase {options}"


def test_a_report_names_every_command_that_its_lines_came_from_once() -> None:
    lines = [scaling(records, command=command) for records, command in ((1, "one"), (2, "two"), (3, "one"))]
    ((part,),) = (section.parts for section in build(lines).sections)
    assert part.commands == ("one", "two")


# --- Markdown


def test_the_markdown_of_a_small_report() -> None:
    lines = [scaling(100), scaling(1000)]
    lines[1]["conditions"] = lines[0]["conditions"] = {"base_model": "a|b", "processor": "<A>", "threads": 1}
    report = build(lines, skipped=2)
    text = markdown(report, report.remarks(drawn=True), {"write-scaling-1-time"})
    assert text == GOLDEN


GOLDEN = r"""# loramem: measurements

2 measurements, grouped by suite and by what they were measured on: base model, machine, threads and versions. The latest stand first. A local folder goes by its name, in the commands too.

Lines that are of no suite, and left out: 2.

## write-scaling

Whether writing stays linear in the number of records: seconds per record and peak memory from 100 to 4,000.

### a\|b on \<A>, 1 thread

- base model: a\|b
- processor: \<A>
- threads: 1
- device: cpu
- dtype: float32
- seeds: 0
- measurements: 2

```
loramem suite run write-scaling --threads 2
```

![Time per record](write-scaling-1-time.png)

Medians, and the range over seeds.

| records | seed | seconds | ms/record | steps | visits/record | adapters | rank | parameters | exact | lowest p | loaded MB | peak MB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 100 | 0 | 2.50 | 25.0 | 1,000 | 5.0 | 1 | 8 | 100,000 | 100/100 | 0.750 | 400 | 410 |
| 1000 | 0 | 25.00 | 25.0 | 10,000 | 5.0 | 1 | 8 | 1,000,000 | 1000/1000 | 0.750 | 400 | 500 |
"""  # noqa: E501


# --- the data of plots


def values(plot: Plot) -> dict[str, list[tuple[float, ...]]]:
    return {one.name: [(p.x, p.y, p.low, p.high) for p in one.points] for one in plot.series}


def test_a_point_is_the_median_between_the_lowest_and_the_highest() -> None:
    assert point(3, [5.0, 1.0, 2.0]) == Point(3, 2.0, 1.0, 5.0, at_least=False)


def speed(method: str, records: int, seconds: float, exact: int, **cell: Any) -> dict[str, Any]:
    fields = {"method": method, "records": records, "tuning": False, **cell}
    ours = {"training_s": seconds / 4} if method == write_speed.OURS else {}
    return {"cell": fields, "result": {"seconds": seconds, "exact": exact, "bfloat16": True, **ours}}


def test_write_speed_shows_seconds_by_method_and_what_was_stopped_as_a_bound() -> None:
    lines = [
        speed("paper recipe", 400, 80.0, 399),
        *(speed("loramem", 100, seconds, 100) for seconds in (2.0, 4.0, 3.0)),
        speed("loramem", 400, 9.0, 400),
        speed("Trainer, all-linear", 100, 1.0, 100, tuning=True),
        speed("Trainer, all-linear", 100, 7.0, 100),
    ]
    (plot,) = write_speed.plots(lines)
    assert (plot.kind, plot.y.log, plot.y.label) == ("bar", True, "seconds (log scale)")
    assert plot.names == ("loramem", "loramem, whole write", "Trainer, all-linear, bfloat16", "paper recipe")
    assert values(plot) == {
        "100 records": [(0, 0.75, 0.5, 1.0), (1, 3.0, 2.0, 4.0), (2, 7.0, 7.0, 7.0)],
        "400 records": [(3, 80.0, 80.0, 80.0), (0, 2.25, 2.25, 2.25), (1, 9.0, 9.0, 9.0)],
    }
    stopped = [[one.at_least for one in series.points] for series in plot.series]
    assert stopped == [[False, False, False], [True, False, False]]
    assert write_speed.plots([line for line in lines if line["cell"]["tuning"]]) == ()


def test_write_scaling_shows_time_per_record_and_memory_where_there_are_several_sizes() -> None:
    lines = [scaling(1000), scaling(100), scaling(100, 1, seconds=3.5)]
    time, memory = write_scaling.plots(lines)
    assert values(time) == {"whole write": [(100, 30.0, 25.0, 35.0), (1000, 25.0, 25.0, 25.0)]}
    assert values(memory) == {
        "at its peak": [(100, 410, 410, 410), (1000, 500, 500, 500)],
        "base model loaded, before the write": [(100, 400, 400, 400), (1000, 400, 400, 400)],
    }
    assert write_scaling.plots(lines[1:]) == ()


READ = {
    **{"records": 1000, "adapters": 5, "sample": 2, "verify_s": 2.0, "exact": 1000, "generate_s": 40.0},
    **{"generate_call_s": [0.04, 0.04], "generate_exact": 2, "recall_many_s": 4.0, "recall_many_exact": 1000},
    **{"cold_s": [0.5, 0.1, 0.2], "warm_s": [0.05]},
}


def test_recall_speed_shows_records_per_second_by_way_of_reading() -> None:
    (plot,) = recall_speed.plots([{"result": READ}, {"result": {**READ, "verify_s": 1.0, "warm_s": []}}])
    assert plot.names == tuple(row[1] for row in recall_speed.table([{"result": READ}]).rows)
    assert values(plot) == {
        "1,000 records, adapters: 5": [
            (0, 750, 500, 1000),
            (1, 250, 250, 250),
            (2, 25, 25, 25),
            (3, 20, 20, 20),
            (4, 5, 5, 5),
        ]
    }


def test_a_suite_may_have_no_plots() -> None:
    assert large_base.plots([]) == ()


# --- drawing

BARS = Plot(
    name="bars",
    title="A title",
    kind="bar",
    x=Axis("method"),
    y=Axis("seconds", log=True),
    series=(
        Series("one", (point(0, [1.0, 3.0, 2.0]), point(1, [200.0], at_least=True))),
        Series("two", (point(1, [50.0]),)),
    ),
    names=("ours $x$", "theirs"),
)
LINE = Plot(
    name="line",
    title="A line",
    kind="line",
    x=Axis("records", log=True),
    y=Axis("MiB"),
    series=(Series("a", (point(100, [5.0, 7.0]), point(4000, [9.0], at_least=True))),),
    diagonal="equal",
)


@needs_matplotlib
def test_bars_are_as_long_as_their_values_and_bounds_are_marked() -> None:
    drawn = figure(BARS, "a machine")
    (axes,) = drawn.axes
    bars = {round(patch.get_y() + patch.get_height() / 2, 3): patch for patch in axes.patches}
    assert {at: patch.get_width() for at, patch in bars.items()} == {-0.2: 2.0, 0.8: 200.0, 1.2: 50.0}
    assert [bool(bars[at].get_hatch()) for at in (-0.2, 0.8, 1.2)] == [False, True, False]
    assert [text.get_text() for text in axes.texts] == ["a machine", "2", "> 200", "50"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours $x$", "theirs"]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.yaxis_inverted()) == ("log", "seconds", True)
    (spread,) = axes.lines
    assert list(spread.get_xdata()) == [1.0, 3.0]
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "stopped: a lower bound"]


@needs_matplotlib
def test_lines_start_at_zero_and_name_the_measured_sizes() -> None:
    drawn = figure(LINE)
    drawn.draw_without_rendering()
    (axes,) = drawn.axes
    assert list(axes.lines[0].get_xydata().ravel()) == [100, 6.0, 4000, 9.0]
    assert axes.get_ylim() == (0, pytest.approx(9.9))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "4,000"]
    assert "equal" in axes.get_legend_handles_labels()[1]


@needs_matplotlib
def test_values_without_a_logarithm_are_drawn_on_a_linear_axis() -> None:
    nothing = Plot("n", "n", "bar", Axis("x"), Axis("y", log=True), (Series("s", (point(0, [0.0]),)),), ("only",))
    (axes,) = figure(nothing).axes
    assert (axes.get_xscale(), axes.get_xlim()) == ("linear", (0, 1))


def test_a_heat_map_labels_every_field_and_says_what_was_not_measured() -> None:
    grid = HeatMap(
        name="grid",
        title="Exact match",
        x=Axis("answer tokens"),
        y=Axis("rank"),
        value="exact match, %",
        columns=("1,000", "2,000"),
        rows=("1", "4"),
        values=((0.0, None), (12.5, 100.0)),
        high=100.0,
    )
    axes, scale = figure(grid, "a machine").axes
    assert {text.get_text() for text in axes.texts} == {"a machine", "0", "–", "12.5", "100"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1,000", "2,000"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
    assert (axes.get_xlabel(), axes.get_ylabel(), scale.get_ylabel()) == ("answer tokens", "rank", "exact match, %")
    assert axes.images[0].get_clim() == (0.0, 100.0)
    assert draw(grid, "", "png") == draw(grid, "", "png")


@needs_matplotlib
def test_the_same_plot_has_the_same_bytes_whatever_the_user_s_settings() -> None:
    import matplotlib

    for plot in (BARS, LINE):
        png, svg = draw(plot, NASTY, "png"), draw(plot, NASTY, "svg")
        assert png.startswith(b"\x89PNG")
        with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight"}):
            assert (draw(plot, NASTY, "png"), draw(plot, NASTY, "svg")) == (png, svg)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoramemError) as error:
        draw(BARS, "", "png")
    assert str(error.value) == "Figures need matplotlib, which is not installed: pip install 'loramem[plots]'"


@needs_matplotlib
def test_a_drawing_within_the_page_has_ids_of_its_own_and_no_addresses() -> None:
    text = inline(draw(BARS, NASTY, "svg"), "p-1")
    assert "://" not in text and "<style" not in text and "metadata" not in text
    root = ElementTree.fromstring(text)
    assert root.tag == "svg" and set(root.attrib) == {"viewBox", "role", "aria-labelledby"}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids and len(set(ids)) == len(ids) and all(id_.startswith("p-1-") for id_ in ids)
    used = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert used and set(used) <= set(ids)


# --- the page


def page_of(folder: Path) -> tuple[str, Report]:
    report = reporter.read(folder)
    return reporter.write(report, folder.parent / "report")[-1].read_text(encoding="utf-8"), report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report]:
    """The page of committed results of two suites, and of made up ones."""
    folder = made_up(tmp_path_factory.mktemp("whole") / "results")
    for name in ("recall-speed.jsonl", "phonebook.jsonl"):
        shutil.copy(RESULTS / name, folder)
    return page_of(folder)


@needs_matplotlib
def test_the_page_refers_to_nothing_outside(whole: tuple[str, Report]) -> None:
    text, _ = whole
    assert text.startswith("<!DOCTYPE html>\n")
    assert "://" not in text and "@import" not in text and "@font-face" not in text
    assert not re.search(r"<(script|link|iframe|object|embed|base|img)\b|<[^>]* on\w+=", text)
    targets = re.findall(r'<[^>]*?(?:src|href|srcset|data|action)="([^"]*)"', text)
    assert targets and all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


@needs_matplotlib
def test_ids_are_unique_and_every_link_in_the_page_has_its_place(whole: tuple[str, Report]) -> None:
    text, report = whole
    ids = re.findall(r'<[^>]*? id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'<a href="#([^"]+)"', text))
    assert links == {section.suite for section in report.sections} | {part.anchor for part in report.parts}
    used = {*links, *re.findall(r'<use [^>]*href="#([^"]+)"', text), *re.findall(r"url\(#([^)]*)\)", text)}
    assert used | set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)


@needs_matplotlib
def test_the_page_holds_every_table_and_every_plot(whole: tuple[str, Report]) -> None:
    text, report = whole
    plots = sum(len(part.plots) for part in report.parts)
    assert text.count("<table") == len(report.parts) > 0
    assert text.count("<figure") == text.count("<figcaption") == text.count("<svg") == plots > 0
    words = unescape(text)
    for part in report.parts:
        for told in (part.title, *part.commands, *map(str, part.facts.values()), *part.table.notes):
            assert told in words


@needs_matplotlib
def test_text_out_of_results_is_text(folder: Path) -> None:
    text, _ = page_of(folder)
    assert "<b>" not in text and NASTY in unescape(text)
    said = (folder.parent / "report" / "report.md").read_text(encoding="utf-8")
    assert "### \\<b>\\&\\|\\$x\\$ \\`\\_m\\_\\` \"' on A, 2 threads" in said


def test_numbers_stand_to_the_right() -> None:
    rows = (("1,000", "3.2 (2–4)", "> 5, exact 3/4", "loramem", "9/9"), ("-", "7", "> 9", "2 records", "-"))
    assert numeric(runner.Table(("",) * 5, rows)) == (True, True, True, False, True)
    assert len(numeric(runner.Table(("",) * 5, ()))) == 5


# --- files


@needs_matplotlib
def test_the_same_lines_make_the_same_files(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        files = reporter.write(reporter.read(folder), tmp_path / name)
    assert [path.name for path in files] == [
        "results.jsonl",
        *(f"write-scaling-1-{plot}.{suffix}" for plot in ("time", "memory") for suffix in ("png", "svg")),
        "report.md",
        "report.html",
    ]
    for path in files:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert sorted(tmp_path.joinpath("two").iterdir()) == sorted(files)
    lines = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    assert lines == list(reporter.read(folder).lines)


@needs_matplotlib
def test_nothing_is_written_where_a_plot_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(plot: Plot, subtitle: str, format_: str) -> bytes:
        raise LoramemError("no paper left")

    monkeypatch.setattr(figures, "draw", fails)
    with pytest.raises(LoramemError, match="no paper left"):
        reporter.write(reporter.read(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_report_has_no_plots_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["suite", "report", str(folder), "--out", str(tmp_path / "out")]) == 0
    told = "Without plots: they need matplotlib, which is not installed: pip install 'loramem[plots]'"
    assert told in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.jsonl", "report.md", "report.html"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<figure" not in page and told in unescape(page)
    assert "![" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


# --- the command


@needs_matplotlib
def test_the_command_says_what_it_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["suite", "report", str(folder), "--json"]) == 0
    said, out = json.loads(capsys.readouterr().out), folder / "report"
    assert {Path(path) for path in said["files"]} == set(out.iterdir())
    assert (said["lines"], said["skipped"]) == (3, 1)
    assert [part["lines"] for part in said["sections"]["write-scaling"]] == [1, 2]
    assert run(["suite", "report", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out / 'report.html'}\n"
    assert printed.err == "Lines that are of no suite, and left out: 1.\n"


def test_a_folder_that_is_missing_or_holds_no_results_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    for folder in (tmp_path / "missing", tmp_path / "other.jsonl", tmp_path):
        assert run(["suite", "report", str(folder)]) == 2
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


def test_the_report_does_not_go_among_the_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert run(["suite", "report", str(folder), "--out", str(folder / ".." / folder.name)]) == 2
    assert "a folder of its own" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_broken_results_exit_1_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.jsonl").write_text("{\n")
    assert run(["suite", "report", str(folder)]) == 1
    assert re.fullmatch(r"Error: .*c\.jsonl, line 1, is not JSON: .*\n", capsys.readouterr().err)
    assert not (folder / "report").exists()


def test_reporting_needs_neither_torch_nor_pyplot(folder: Path) -> None:
    code = (
        "import sys\nfrom loramem_cli.main import run\nassert run(['suite', 'report', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
