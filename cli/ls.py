"""loramem ls: what the store holds, without decoding."""

from dataclasses import asdict
from datetime import datetime

import click

from . import options
from .output import moment, print_json, print_table

_CHAT = {True: "yes", False: "needs ids", None: "-"}
"""Whether a chat server may be asked for the key; not known of older records, nor without a chat template."""


@click.command("ls")
@click.option("--adapter", metavar="ID", help="Records of one adapter only; the first digits will do.")
@click.option("--namespace", help="Records of one namespace only.")
@click.option("--since", type=click.DateTime(), help="Written at this local time or later.")
@click.option("--until", type=click.DateTime(), help="Written before this local time.")
@click.option("--meta", multiple=True, metavar="NAME=VALUE", help="With this metadata; may be repeated.")
@options.store_options
def command(
    adapter: str | None,
    namespace: str | None,
    since: datetime | None,
    until: datetime | None,
    meta: tuple[str, ...],
    store: options.StoreOptions,
    as_json: bool,
) -> None:
    """List the records of the store (./memory unless named) with certificate and adapter.

    Values are not shown: recall decodes them. With --json, one object a line.
    """
    with store.open() as opened:
        wanted = options.named_values(meta)
        if adapter is not None:
            adapter = _whole(adapter, [stored.id for stored in opened.adapters()])
        records = list(opened.records(namespace, adapter, since=since, until=until, metadata=wanted))
    if as_json:
        for record in records:
            shown = {**asdict(record), "chat": record.chat}
            print_json({name: shown[name] for name in shown if name not in ("value", "salt", "digest", "prompt")})
        return
    print_table(
        ("key", "namespace", "tokens", "lowest p", "by chat", "adapter", "written"),
        [
            (
                r.key,
                r.namespace,
                r.answer_tokens,
                f"{r.min_prob:.3f}",
                _CHAT[r.chat],
                r.adapter[:12],
                moment(r.written_at),
            )
            for r in records
        ],
    )


def _whole(beginning: str, adapters: list[str]) -> str:
    """The one adapter whose id begins so."""
    found = [adapter for adapter in adapters if adapter.startswith(beginning)]
    if len(found) != 1:
        raise click.UsageError(f"--adapter {beginning}: {len(found) or 'no'} adapters have an id that begins so.")
    return found[0]
