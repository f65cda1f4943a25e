"""loramem push: the store on the Hub."""

from typing import TYPE_CHECKING

import click

from . import options
from .output import note, print_facts, print_json

if TYPE_CHECKING:
    from loramem.results import PushPlan


@click.command("push")
@click.argument("repo", metavar="REPO")
@options.store_options
@click.option("--include-keys", is_flag=True, help="Publish keys as text, not only salted digests of them.")
@click.option("--include-values", is_flag=True, help="Publish values and metadata as text too.")
@click.option("--public", is_flag=True, help="Allow a public repository: everyone can extract the records.")
@click.option("--replace", is_flag=True, help="End what the repository holds, whoever pushed it.")
@click.option("--license", default="other", show_default=True, help="Licence identifier for the model card.")
@click.option("--message", help="Of the commit.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(
    repo: str,
    store: options.StoreOptions,
    as_json: bool,
    include_keys: bool,
    include_values: bool,
    public: bool,
    replace: bool,
    license: str,
    message: str | None,
    yes: bool,
) -> None:
    """Publish the live records of the store (./memory unless named) in the Hub repository REPO, such as me/facts.

    The repository is made, private, if there is none. Only what it does not have is uploaded, in one commit. Whoever
    may read it can extract the values. The token is that of HF_TOKEN or hf auth login.
    """
    if include_values and not include_keys:
        raise click.UsageError("Values are published with their keys: give --include-keys too.")

    def confirm(plan: "PushPlan") -> None:
        readers = "those who may read it" if plan.private else "EVERYONE"
        text = " and ".join(["the keys"] * plan.keys + ["the values"] * plan.values)
        note(f"{plan.records:,} records become extractable by {readers}, at {repo}.")
        note(f"As text goes {text}." if text else "Neither keys nor values go as text.")
        note(f"{len(plan.uploaded)} of {plan.adapters} adapters are new there, {len(plan.removed)} go.")
        if not yes:
            click.confirm("Push?", abort=True, err=True)

    with store.open() as opened:
        report = opened.push(
            repo,
            include_keys=include_keys,
            include_values=include_values,
            public=public,
            replace=replace,
            license=license,
            message=message,
            confirm=confirm,
        )
    if as_json:
        print_json(report)
    elif report.changed:
        print_facts(
            [
                ("commit", report.commit),
                ("records", report.records),
                ("adapters uploaded", len(report.uploaded)),
                ("adapters removed", len(report.removed)),
                ("bytes", f"{report.size_bytes:,}"),
            ]
        )
    else:
        note(f"{repo} holds all of it already, at commit {report.commit[:12]}.")
