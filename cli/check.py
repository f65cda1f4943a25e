"""loramem check: whether servers take the adapters, what certificates are worth there, and what a server answers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loramem.models.dtypes import SERVED, Dtype
from loramem.serving.targets import TARGETS, Target

from . import options
from .output import note, print_json, print_table

if TYPE_CHECKING:
    from loramem.results import AdapterCheck, Finding, ServerCheck, ServerReport, ServingReport

RECALL_INCOMPLETE, NOT_SERVABLE = 3, 7


@click.command("check")
@click.argument("folders", nargs=-1, metavar="[FOLDER…]", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--target", "targets", type=click.Choice(TARGETS), multiple=True, help="One or several; all unless given."
)
@click.option("--max-rank", type=click.IntRange(1), help="The server's maximum, where it runs already.")
@click.option("--base-name", help="The model name or path that the server is started with.")
@click.option(
    "--dtype",
    type=click.Choice(SERVED),
    help="Also decode every record with base model and adapters cast to it, as servers do.",
)
@click.option("--server", metavar="URL", help="Ask a server for every key instead, and compare the answers.")
@click.option("--at-once", type=click.IntRange(1), default=8, show_default=True, help="Requests to --server together.")
@click.option("--timeout", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Seconds for one answer.")
@options.store_options
def command(
    folders: tuple[Path, ...],
    targets: tuple[Target, ...],
    max_rank: int | None,
    base_name: str | None,
    dtype: Dtype | None,
    server: str | None,
    at_once: int,
    timeout: float,
    store: options.StoreOptions,
    as_json: bool,
) -> None:
    """Say whether PEFT, vLLM and SGLang load the adapters of the store (./memory unless named) as they are.

    With FOLDER…, the PEFT LoRA adapters in these folders, whoever wrote them; with --model too, each tensor's path and
    shape is compared with the modules of that base model, whose weights are not loaded.

    With --server, the server that serves the store's adapters is asked for every record, by ids and greedily, and what
    it answers is compared; --target says what it is, unless it says so itself, and LORAMEM_API_KEY holds its token.

    Exit code 3 when a record does not come back in --dtype or from the server, 7 when an adapter would be refused or
    served wrongly.
    """
    if server is not None:
        if folders or dtype or len(targets) > 1 or base_name or max_rank:
            raise click.UsageError("--server asks one server for a store's records; it goes with --target alone.")
        with store.open() as opened:
            answers = opened.check_server(server, next(iter(targets), None), at_once=at_once, timeout_s=timeout)
        _report(answers, as_json)
        return
    targets = targets or TARGETS
    if folders:
        if dtype:
            raise click.UsageError("--dtype decodes the records of a store; what a FOLDER holds is not known.")
        from loramem.serving.check import check_folders

        report = check_folders(folders, targets, max_rank=max_rank, base_name=base_name, model=store.model)
    else:
        with store.open() as opened:
            report = opened.check(targets, max_rank=max_rank, base_name=base_name, dtype=dtype)
    if as_json:
        certificates = [{**asdict(one), "margin": one.margin} for one in report.certificates]
        print_json({**asdict(report), "certificates": certificates, "ok": report.ok})
    else:
        _show(report)
    if not all(one.ok for one in report.certificates):
        click.get_current_context().exit(RECALL_INCOMPLETE)
    if not report.ok:
        click.get_current_context().exit(NOT_SERVABLE)


def _report(answers: "ServerReport", as_json: bool) -> None:
    if as_json:
        print_json({**asdict(answers), "ok": answers.ok})
    else:
        rows = ([one.adapter, *_asked(one)] for one in answers.adapters)
        print_table(["adapter", "exact", "lowest p", "committed"], rows)
        for one in answers.adapters:
            for key, why in one.failed.items():
                note(f"{answers.target}: {key!r}: {why}")
    if not answers.ok:
        click.get_current_context().exit(RECALL_INCOMPLETE)


def _asked(one: "ServerCheck") -> list[str]:
    """Exact of all, lowest p there and as committed."""
    found = (one.min_prob, one.committed_min_prob)
    return [f"{one.exact}/{one.records}", *("-" if value is None else f"{value:.3f}" for value in found)]


def _show(report: "ServingReport") -> None:
    verdicts = (
        [adapter, rank, *("refused" if report.refused(target, adapter) else "ok" for target in report.targets)]
        for adapter, rank in report.adapters.items()
    )
    print_table(["adapter", "rank", *report.targets], verdicts)
    if report.certificates:
        dtype = report.certificates[0].dtypes["adapter"]
        click.echo(f"\nin {dtype}:")
        print_table(["adapter", "exact", "lowest p", "committed", "margin"], map(_proved, report.certificates))
    for finding, adapters in _alike(report.findings):
        more = f" and {len(adapters) - 1} more" if len(adapters) > 1 else ""
        where = f" {adapters[0]}{more}" if adapters[0] else ""
        note(f"{finding.target}{where}: {'' if finding.refused else 'note: '}{finding}")
    for one in report.certificates:
        for key in one.failed:
            note(f"not recalled in {one.dtypes['adapter']}: {key!r}")


def _alike(findings: "Sequence[Finding]") -> "Iterator[tuple[Finding, list[str | None]]]":
    """Findings that differ in their adapter alone, once, with these adapters."""
    groups: dict[Finding, list[str | None]] = {}
    for finding in findings:
        groups.setdefault(replace(finding, adapter=None), []).append(finding.adapter)
    yield from groups.items()


def _proved(one: "AdapterCheck") -> list[str]:
    """Its id, exact of all, lowest p now and as committed, and what is left of it above 0.5."""
    found = (one.min_prob, one.committed_min_prob)
    probs = ["-" if value is None else f"{value:.3f}" for value in found]
    return [one.adapter, f"{one.exact}/{one.records}", *probs, "-" if one.margin is None else f"{one.margin:+.3f}"]
