"""loramem deploy: a folder of adapters that a server takes as it is."""

from pathlib import Path

import click

from loramem.models.dtypes import DTYPES, Dtype
from loramem.serving.targets import BASE_TYPES, TARGETS, BaseType, Target

from . import options
from .output import note, print_facts, print_json


@click.command("deploy")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), required=True, help="Who loads them.")
@click.option("--base-name", help="The model name or path that the server is started with.")
@click.option("--pad-rank", type=click.IntRange(1), metavar="R", help="One rank for all adapters, padded with zeros.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Of the weights in the files.",
)
@click.option("--include-keys", is_flag=True, help="Also write which adapter answers which key. This names the keys.")
@click.option(
    "--hash-keys", is_flag=True, help="Also write which adapter answers which key, under salted digests of the keys."
)
@click.option(
    "--base-type",
    type=click.Choice(BASE_TYPES),
    help="Of loramem-tiny's weights, written beside its adapters for llama.cpp; by --dtype unless given.",
)
@options.store_options
def command(
    folder: Path,
    target: Target,
    base_name: str | None,
    pad_rank: int | None,
    dtype: Dtype,
    include_keys: bool,
    hash_keys: bool,
    base_type: BaseType | None,
    store: options.StoreOptions,
    as_json: bool,
) -> None:
    """Write the adapters of the store (./memory unless named) to the new folder DIR, as a server takes them.

    Its README.md says how the server is started and asked. Exit code 7 when the server would refuse the result.
    """
    with store.open() as opened:
        report = opened.deploy(
            target,
            folder,
            base_name=base_name,
            pad_rank=pad_rank,
            dtype=dtype,
            include_keys=include_keys,
            hash_keys=hash_keys,
            base_type=base_type,
        )
    if as_json:
        print_json(report)
        return
    print_facts(
        [
            ("adapters", len(report.adapters)),
            ("rank", report.rank),
            ("dtype", report.dtype),
            ("base name", report.base_name),
            ("disk", f"{report.size_bytes:,} bytes"),
            ("guide", folder / "README.md"),
        ]
    )
    for finding in report.findings:
        note(f"note: {finding}")
