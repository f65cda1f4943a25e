"""loramem ls: what the store holds, without decoding."""

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from . import options
from .output import moment, print_json, print_table

if TYPE_CHECKING:
    from loramem.index.rows import StoredRecord

COLUMNS = ("key", "namespace", "tokens", "lowest p", "by chat", "adapter", "written")
_NOT_SHOWN = ("value", "salt", "digest", "prompt", "question_of")
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

    Values are not shown: recall decodes them. With --json, one object a line, with the record's questions.
    """
    with store.open() as opened:
        wanted = options.named_values(meta)
        if adapter is not None:
            adapter = _whole(adapter, [stored.id for stored in opened.adapters()])
        # Read as they are printed: a pipe that takes the first few waits for no others.
        if as_json:
            for record, questions in opened.iter_asked(namespace, adapter, since=since, until=until, metadata=wanted):
                shown = {**asdict(record), "chat": record.chat}
                print_json(
                    {name: shown[name] for name in shown if name not in _NOT_SHOWN}
                    | ({"questions": questions} if questions else {})
                )
        else:
            records = opened.iter_records(namespace, adapter, since=since, until=until, metadata=wanted)
            print_table(COLUMNS, map(_row, records))


def _row(record: "StoredRecord") -> tuple[object, ...]:
    chat, adapter = _CHAT[record.chat], record.adapter[:12]
    tokens, least = record.answer_tokens, f"{record.min_prob:.3f}"
    return record.key, record.namespace, tokens, least, chat, adapter, moment(record.written_at)


def _whole(beginning: str, adapters: list[str]) -> str:
    """The one adapter whose id begins so."""
    found = [adapter for adapter in adapters if adapter.startswith(beginning)]
    if len(found) != 1:
        raise click.UsageError(f"--adapter {beginning}: {len(found) or 'no'} adapters have an id that begins so.")
    return found[0]
