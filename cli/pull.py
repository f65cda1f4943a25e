"""loramem pull: a published store, checked and made a store here."""

import click

from . import options
from .output import note, print_json
from .progress import count_bar


@click.command("pull")
@click.argument("repo", metavar="REPO")
@options.store_options
@click.option("--revision", help="Branch, tag or commit; the main branch unless given.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Decode every record whose key is published."
)
@click.option("--max-bytes", type=click.IntRange(min=1), help="Refuse larger adapters, taken together.  [16 GiB]")
def command(
    repo: str,
    store: options.StoreOptions,
    as_json: bool,
    revision: str | None,
    verify: bool,
    max_bytes: int | None,
) -> None:
    """Make a new store (./memory unless named) of what loramem push published in the Hub repository REPO.

    Every file is checked before it counts, and a repository that breaks a rule leaves nothing behind.
    """
    from loramem import MemoryStore

    with (
        count_bar("verifying") as progress,
        MemoryStore.pull(
            repo,
            store.path,
            store.model,
            revision=revision,
            device=store.device,
            verify=verify,
            max_bytes=max_bytes,
            progress=progress,
        ) as opened,
    ):
        stats, keys = opened.stats(), opened.manifest.key_salt is None
    if as_json:
        print_json({"records": stats.records, "adapters": stats.adapters, "keys": keys, "verified": verify and keys})
        return
    checked = "each decoded here" if verify and keys else "not decoded"
    note(f"Pulled {stats.records:,} records in {stats.adapters:,} adapters to {store.path}, {checked}.")
    if not keys:
        note("Keys were not published: recall works by key given, and the store can only be read.")
