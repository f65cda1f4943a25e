"""loramem suite: the measurements, run again on this machine."""

import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
from click.core import ParameterSource

from loramem.models.dtypes import DtypeChoice

from . import options
from .groups import Commands
from .output import note, print_facts, print_json, print_markdown, print_text
from .workers import WorkerOptions, cluster_options


@click.group("suite", cls=Commands)
def command() -> None:
    """Measure loramem on this machine, beside what else does the same."""


@command.command("list")
def list_() -> None:
    """Show what can be measured."""
    from loramem.suites.runner import SUITES, load_suite

    summaries = {name: (load_suite(name).__doc__ or "").partition("\n\n")[0] for name in SUITES}
    print_facts((name, summary.replace("\n", " ").replace("``", "")) for name, summary in summaries.items())


@command.command("run")
@click.argument("name")
@click.option(
    "--out", type=options.OutputPath(path_type=Path, dir_okay=False), help="Results file; docs/results/NAME.jsonl."
)
@click.option("--methods", metavar="M,M…", help="Of sft, memft-ot, memft-sw and loramem; all unless given.")
@click.option("--ranks", type=options.Numbers(), help="In place of the suite's own.")
@click.option("--lengths", type=options.Numbers(), help="Answer tokens, in place of the suite's own.")
@click.option("--records", type=options.Numbers(), help="Sizes, in place of the suite's own.")
@click.option("--seeds", type=click.IntRange(1), help="How many, in place of the suite's own number.")
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="In place of generated data."
)
@click.option("--unit", type=click.Choice(["branch", "down_proj"]), help="Where published methods put their matrices.")
@click.option("--layer", type=click.IntRange(0), help="Decoder layer of that unit; at two thirds of them unless given.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the base model; published methods have bfloat16."
)
@click.option("--paper", is_flag=True, help="The published grid, for a GPU.")
@click.option("--threads", type=click.IntRange(1), show_default="all cores, shared out", help="Of each worker.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Cells measured side by side.")
@click.option("--no-run", is_flag=True, help="Only print what the results file holds.")
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that it works; kept in no file unless --out names one.")
@click.option(
    "--store", type=click.Path(path_type=Path), help="recall-speed: this store, in place of one built for it."
)
@click.option("--all", "every_record", is_flag=True, help="recall-speed: generate for all records, not for a sample.")
@options.model_options
@cluster_options
def run(
    name: str,
    out: Path | None,
    methods: str | None,
    ranks: tuple[int, ...] | None,
    lengths: tuple[int, ...] | None,
    records: tuple[int, ...] | None,
    seeds: int | None,
    data: Path | None,
    unit: str | None,
    layer: int | None,
    dtype: DtypeChoice | None,
    paper: bool,
    threads: int | None,
    workers: int,
    no_run: bool,
    quick: bool,
    store: Path | None,
    every_record: bool,
    model: str | None,
    device: str,
    as_json: bool,
    cluster: WorkerOptions,
) -> None:
    """Run the cells of suite NAME that are not in the results file yet, and print the table.

    Every cell runs in a process of its own, with --dask or --ray on the workers of a cluster, as many side by side as
    these are; an interrupt loses those that are running. Options that do not concern the suite are refused.
    """
    from loramem import embedded
    from loramem.suites.runner import METHODS, SUITES, SuiteOptions, load_suite, measured, run_suite
    from loramem.workers.processes import usable_cores

    if name not in SUITES:
        raise click.UsageError(f"There is no suite {name!r}. There are {', '.join(SUITES)}.")
    _refuse_idle_options(name)
    wanted = tuple(methods.split(",")) if methods else None
    if unknown := set(wanted or ()).difference(METHODS):
        raise click.UsageError(f"There is no method {min(unknown)!r}. There are {', '.join(METHODS)}.")
    if cluster.elsewhere and workers > 1:
        raise click.UsageError("--workers are of this machine; a cluster measures as many cells at a time as it can.")
    if quick and paper:
        raise click.UsageError("--quick and --paper are opposites.")
    request = SuiteOptions(
        records=records,
        lengths=lengths,
        ranks=ranks,
        methods=wanted,
        seeds=seeds,
        model=model or embedded.NAME,
        device=device,
        dtype=dtype or "auto",
        threads=threads or (1 if cluster.elsewhere else max(1, usable_cores() // workers)),
        workers=workers,
        quick=quick,
        paper=paper,
        data=data,
        unit=unit,
        layer=layer,
        store=store,
        every_record=every_record,
    )
    with _results_file(name, out, quick) as path, cluster.executor() as executor:
        lines = measured(name, request, path, executor) if no_run else run_suite(name, request, path, note, executor)
    if not lines:
        raise click.UsageError("The results file holds nothing of this suite, measured on this machine.")
    table = load_suite(name).table(lines)
    if as_json:
        print_json(
            {"suite": name, "command": shlex.join(["loramem", *sys.argv[1:]]), "table": asdict(table), "lines": lines}
        )
        return
    print_markdown(table.columns, table.rows)
    for remark in table.notes:
        print_text(f"\n{remark}")


def _refuse_idle_options(name: str) -> None:
    """Options of the command line that the suite would not look at: the results would name them all the same."""
    from loramem.suites.runner import COMMON, SuiteOptions, load_suite

    context, known = click.get_current_context(), {*COMMON, *load_suite(name).OPTIONS}
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in SuiteOptions.__dataclass_fields__ and option.name not in known:
            raise click.UsageError(f"{option.opts[0]} does not concern {name}.")


@command.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out", type=options.OutputPath(path_type=Path, file_okay=False), help="Folder; DIR/report unless given."
)
@options.json_option
def report_(folder: Path, out: Path | None, as_json: bool) -> None:
    """Write a report of the results files (*.jsonl) in DIR: lines, Markdown, plots and one HTML page."""
    from loramem.suites import figures, reporter

    out = out or folder / "report"
    if out.resolve() == folder.resolve():
        raise click.UsageError("The report goes into a folder of its own: its results.jsonl would be read as results.")
    report = reporter.read(folder)
    if not report.parts:
        raise click.UsageError(f"{folder} holds no results of a suite ({report.skipped} other lines in *.jsonl).")
    files = reporter.write(report, out)
    for remark in report.remarks(drawn=figures.installed()):
        note(remark)
    if as_json:
        print_json(
            {
                "files": [str(path) for path in files],
                "lines": len(report.lines),
                "skipped": report.skipped,
                "sections": {
                    section.suite: [{"title": part.title, "lines": len(part.lines)} for part in section.parts]
                    for section in report.sections
                },
            }
        )
        return
    click.echo(files[-1])


@contextmanager
def _results_file(name: str, out: Path | None, quick: bool) -> Iterator[Path]:
    if out is None and quick:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / "quick.jsonl"
    else:
        yield out or Path("docs/results") / f"{name}.jsonl"
