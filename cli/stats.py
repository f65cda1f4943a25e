"""loramem stats: counts and sizes."""

import click

from . import options
from .output import note, print_facts, print_json


@click.command("stats")
@options.store_options
def command(store: options.StoreOptions, as_json: bool) -> None:
    """Show what the store (./memory unless named) holds and what it costs."""
    with store.open() as opened:
        stats = opened.stats()
    if as_json:
        print_json(stats)
        return
    print_facts(
        [
            ("base model", stats.base_model),
            ("memory law", stats.law or "not calibrated"),
            ("namespaces", stats.namespaces),
            ("records", stats.records),
            *([("questions", stats.questions)] if stats.questions else []),
            ("tombstones", stats.tombstones),
            ("answer tokens", stats.answer_tokens),
            ("adapters", stats.adapters),
            ("ranks", ", ".join(map(str, stats.ranks)) or "-"),
            ("parameters", f"{stats.parameters:,}"),
            ("bits per parameter", f"{stats.bits_per_parameter:.3f}"),
            ("lowest p", "-" if stats.min_prob is None else f"{stats.min_prob:.3f}"),
            ("disk", f"{stats.size_bytes:,} bytes"),
            ("retired", f"{stats.retired_adapters} adapters, {stats.retired_bytes:,} bytes"),
        ]
    )
    if stats.advice:
        note(f"{stats.advice} (loramem compact)")
    if stats.unfinished_records:
        note(
            f"A write of {stats.unfinished_records} records is unfinished: loramem write --resume, or --discard. "
            "(Or it is running now.)"
        )
