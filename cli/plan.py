"""loramem plan: what a write would do."""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from . import options
from .output import print_json, print_table


@click.command("plan")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@options.store_options
@options.input_options
@options.namespace_option
@options.goal_options
def command(
    file: Path,
    store: Path,
    model: str | None,
    device: str,
    as_json: bool,
    format_: str | None,
    key_field: str,
    value_field: str,
    namespace: str,
    goal: str,
    rank: int | None,
) -> None:
    """Show how FILE would be cut into adapters, and the rank each would start with.

    Nothing is trained or changed. Records that the store (./memory unless named) holds already are left out.
    """
    from loramem import read_records

    source = sys.stdin.buffer if str(file) == "-" else file
    records = read_records(source, format=format_, key_field=key_field, value_field=value_field, namespace=namespace)
    with tempfile.TemporaryDirectory() as scratch:
        place = store if (store / "store.json").exists() else Path(scratch) / "store"
        with options.open_store(place, model, device, create=True) as opened:
            plan = opened.plan(records, goal=goal, rank=rank)
    if as_json:
        print_json({**asdict(plan), "parameters": plan.parameters, "cost_bits": plan.cost_bits})
        return
    print_table(
        ("shard", "records", "answer tokens", "cost in bits", "rank", "parameters"),
        [
            (number, s.records, s.length, f"{s.cost_bits:.0f}", s.rank, f"{s.parameters:,}")
            for number, s in enumerate(plan.shards, start=1)
        ],
    )
