"""loramem check: whether servers take the adapters, and what certificates are worth in a server's dtype."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loramem.models.dtypes import DTYPES, Dtype
from loramem.serving.targets import TARGETS, Target

from . import options
from .output import note, print_json, print_table

if TYPE_CHECKING:
    from loramem.results import AdapterCheck, Finding, ServingReport

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
    type=click.Choice(DTYPES),
    help="Also decode every record with base model and adapters cast to it, as servers do.",
)
@options.store_options
def command(
    folders: tuple[Path, ...],
    targets: tuple[Target, ...],
    max_rank: int | None,
    base_name: str | None,
    dtype: Dtype | None,
    store: options.StoreOptions,
    as_json: bool,
) -> None:
    """Say whether PEFT, vLLM and SGLang load the adapters of the store (./memory unless named) as they are.

    With FOLDER…, the PEFT LoRA adapters in these folders, whoever wrote them; with --model too, each tensor's path and
    shape is compared with the modules of that base model, whose weights are not loaded.

    Exit code 7 when one would be refused or served wrongly, 3 when a record does not come back in --dtype.
    """
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
    if any(finding.refused for finding in report.findings):
        click.get_current_context().exit(NOT_SERVABLE)
    if not report.ok:
        click.get_current_context().exit(RECALL_INCOMPLETE)


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
