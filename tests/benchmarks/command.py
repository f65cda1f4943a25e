"""The command line that the benchmarks share: base models, the results file, one Markdown table over all of them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from loramem_cli import options
from loramem_cli.output import note, print_markdown

from loramem import embedded
from loramem.suites.runner import Result, SuiteOptions, load_suite, measured, run_suite
from loramem.workers.processes import usable_cores

RESULTS = Path("docs/results")
RANDOM = "random-llama"
"""The base of width 64 with random weights and three layers that `tests.conftest` builds."""


def command(suite: str, default: str) -> click.Command:
    """The command of a benchmark.

    Args:
        suite: Name of its module.
        default: Name of its results file.
    """

    @click.command(help=load_suite(suite).__doc__)
    @click.option(
        "--model", "models", multiple=True, default=(embedded.NAME, RANDOM), show_default=True, metavar="DIR",
        help=f"Base model, as often as wanted: a folder, a Hub id, {embedded.NAME} or {RANDOM}.",
    )  # fmt: skip
    @click.option("--results", type=click.Path(path_type=Path), default=RESULTS / default, show_default=True)
    @click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
    @click.option("--threads", type=click.IntRange(1), default=usable_cores, show_default="all cores")
    @click.option("--device", default="auto", show_default=True)
    @click.option("--no-run", is_flag=True, help="Only print what the results file holds.")
    @click.option("--quick", is_flag=True, help="A few tiny cells, to see that it works.")
    def main(models: tuple[str, ...], results: Path, no_run: bool, **asked: object) -> None:
        lines = list[Result]()
        for model in models:
            with found(model) as place:
                request = SuiteOptions(model=place, **asked)
                lines += measured(suite, request, results) if no_run else run_suite(suite, request, results, note)
        table = load_suite(suite).table(lines)
        print_markdown(table.columns, table.rows)
        for remark in table.notes:
            click.echo(f"\n{remark}")

    for name in {"records", "ranks"}.intersection(load_suite(suite).OPTIONS):
        main = click.option(f"--{name}", type=options.Numbers(), help="In place of the benchmark's own.")(main)
    return main


@contextmanager
def found(model: str) -> Iterator[str]:
    """What a base model is loaded by; the random one is built, the same every time."""
    if model != RANDOM:
        yield model
        return
    from ..conftest import build_base

    with tempfile.TemporaryDirectory() as scratch:
        yield str(build_base(Path(scratch) / RANDOM, "llama"))
