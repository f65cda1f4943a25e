"""loramem write: records of a file into adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from loramem.errors import InputError
from loramem.training.settings import KeepBase

from . import options
from .output import kept_facts, note, note_needs_ids, print_facts, print_json, written_facts
from .progress import BatchBar, batches_bar, write_bar
from .workers import WorkerOptions, workers_options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loramem import OnConflict, WriteReport
    from loramem.models.dtypes import Dtype
    from loramem.records.contexts import Messages
    from loramem.training.settings import OnMiss


@click.command("write")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True), required=False)
@options.planned_change_options
@options.input_options
@options.namespace_option
@options.goal_options
@options.one_adapter_option
@options.ask_option
@click.option(
    "--context",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Chats in which the records are to be known as well, such as a system message of yours: a JSON list of "
    "messages in each line, after which the key is the user's next one. Every record is trained and proved in each.",
)
@click.option(
    "--keep-base",
    is_flag=True,
    help="Leave the base as it is elsewhere, for an adapter that is active for everything, and measure how far that "
    "went. Takes minutes.",
)
@click.option(
    "--on-miss",
    type=click.Choice(["report", "fail", "grow"]),
    default="report",
    show_default=True,
    help="With --keep-base, if less of the base is left than is wanted: commit and report it, fail, or grow the rank.",
)
@click.option(
    "--neutral",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="With --keep-base: a UTF-8 text on which the base is to stay what it is, such as what it is used for.",
)
@click.option(
    "--unknown",
    default="",
    metavar="TEXT",
    help="With --keep-base: what keys like those of the records are answered that none of them has, such as \"I don't "
    "know.\"; the base's own answer unless given.",
)
@click.option(
    "--on-conflict",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    show_default=True,
    help="What becomes of a record whose key is there with another value.",
)
@click.option("--no-values", is_flag=True, help="A new store keeps salted digests only, not the values.")
@click.option(
    "--serve",
    metavar="DTYPES",
    help="Dtypes that a new store's adapters will be served in, such as bfloat16,float16, beside the base model's own, "
    "and q8_0 for llama.cpp on quantised files; each write is proved in all.  [default: bfloat16]",
)
@click.option("--seed", default=0, show_default=True, help="Same seed and input, same bytes on one machine.")
@workers_options
@click.option(
    "--batch",
    type=click.IntRange(1),
    metavar="RECORDS",
    help="Read FILE as it goes and commit so many records at a time, whatever its length; --json: a line for each. "
    "Without it, one commit of all.",
)
@click.option("--partial", is_flag=True, help="Commit the certified records even if others could not be.")
@click.option("--resume", is_flag=True, help="Run an interrupted write again; takes no FILE.")
@click.option("--discard", is_flag=True, help="Forget an interrupted write; takes no FILE.")
def command(
    file: Path | None,
    store: options.StoreOptions,
    as_json: bool,
    fields: options.InputOptions,
    namespace: str,
    ranks: options.RankOptions,
    one_adapter: bool,
    ask: tuple[str, ...],
    context: Path | None,
    keep_base: bool,
    on_miss: "OnMiss",
    neutral: Path | None,
    unknown: str,
    on_conflict: "OnConflict",
    no_values: bool,
    serve: str | None,
    seed: int,
    workers: WorkerOptions,
    batch: int | None,
    partial: bool,
    resume: bool,
    discard: bool,
) -> None:
    """Write the records of FILE (JSONL, JSON, CSV or TSV; - for stdin) and prove that each is recalled.

    A row has a key, a value, and perhaps questions (other texts that give the value), a namespace and metadata; as
    trainers take them, messages of one user and one assistant, or prompt and completion, will do. The store is
    ./memory unless named, and is created if there is none.
    """
    if (file is not None) + resume + discard != 1:
        raise click.UsageError("Give a FILE (- for stdin), or --resume, or --discard.")
    if neutral is not None and not keep_base:
        raise click.UsageError("--neutral says what --keep-base is to keep; give both.")
    if unknown and not keep_base:
        raise click.UsageError("--unknown takes --keep-base; give both.")
    settings = ranks.settings(seed)
    contexts = None if context is None else _contexts(context)
    if discard:
        with store.open() as opened:
            count = opened.discard()
        print_json({"discarded": count}) if as_json else note(f"Discarded an interrupted write of {count} records.")
        return

    if file is None:
        with (
            store.load() as opened,
            workers.executor(store.wait_s) as executor,
            write_bar() as progress,
        ):
            report = opened.resume(progress, executor)
        _tell(report, on_conflict, as_json)
        return
    records = fields.read(file, namespace) if batch is None else fields.stream(file, namespace)
    with (
        store.load(
            create=True,
            keep_values=False if no_values else None,  # unless said, as the store does
            serve=None if serve is None else cast("list[Dtype]", serve.split(",")),
        ) as opened,
        workers.executor(store.wait_s) as executor,
        batches_bar() as bar,
    ):
        how: dict[str, Any] = {
            "ask": ask,
            "contexts": contexts,
            "on_conflict": on_conflict,
            "goal": ranks.goal,
            "rank": ranks.rank,
            "one_adapter": one_adapter,
            "keep_base": _keep_base(on_miss, neutral, unknown) if keep_base else None,
            "partial": partial,
            "settings": settings,
            "progress": None if bar is None else bar.see,
            "executor": executor,
        }
        if batch is not None:
            _tell_batches(opened.write_batches(records, batch=batch, **how), bar, as_json)
            return
        report = opened.write(records, **how)
    _tell(report, on_conflict, as_json)


def _tell_batches(reports: "Iterable[WriteReport]", bar: BatchBar | None, as_json: bool) -> None:
    """Each as it is committed; none is kept."""
    written = questions = skipped = failed = adapters = 0
    least = 1.0
    for number, report in enumerate(reports, start=1):
        if as_json:
            print_json(report)
        written, skipped = written + report.written, skipped + report.skipped
        questions, failed = questions + report.questions, failed + len(report.failed)
        adapters += len(report.adapters)
        least = min(least, report.min_prob or 1.0)
        facts = written_facts(report.written, report.questions)
        if bar is not None:
            bar.begin()
        note(f"Batch {number}: {facts} written in {report.elapsed_s:.1f} s; {written} so far.")
    if not as_json:
        facts = written_facts(written, questions)
        print_facts(
            [
                ("written", f"{facts}, every one decoded exactly from the adapter as saved"),
                ("skipped", skipped),
                ("lowest p", f"{least:.3f}" if written or questions else "-"),
                ("adapters", adapters),
            ]
        )
    if failed:
        note(f"{failed} records could not be certified.")
        click.get_current_context().exit(5)


def _tell(report: "WriteReport", on_conflict: "OnConflict", as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    if report.skipped:
        kept = " or keep another value there" if on_conflict == "skip" else ""
        note(f"{report.skipped} records were in the store already{kept} and were skipped.")
    if report.min_prob is None:
        print_facts([("written", "0 records")])
        return
    facts = written_facts(report.written, report.questions)
    served = [f"{least:.3f} in {dtype}" for dtype, least in report.served.items()]
    print_facts(
        [
            ("written", f"{facts}, every one decoded exactly from the adapter as saved"),
            *([("in chats", f"{report.contexts}, every record in each as well")] if report.contexts else []),
            ("lowest p", ", ".join([f"{report.min_prob:.3f}", *served])),
            ("adapters", len(report.adapters)),
            ("rank", report.rank),
            ("parameters", f"{report.parameters:,} ({report.bits_per_parameter:.3f} bits of value each)"),
            ("steps", report.steps),
            ("seconds", f"{report.elapsed_s:.1f} (training {report.training_s:.1f})"),
        ]
    )
    for adapter, left in report.kept.items():
        print_facts([("adapter", adapter), *kept_facts(left)])
    if report.beside:
        note(f"The namespace has {report.beside} adapters from before as well; loramem compact makes one of all.")
    note_needs_ids(report.needs_ids)
    if report.failed:
        note(f"{len(report.failed)} records could not be certified: {', '.join(map(repr, report.failed))}")
        click.get_current_context().exit(5)


def _contexts(file: Path) -> "list[Messages]":
    """
    Raises:
        InputError: See `read_contexts`.
    """
    from loramem.records.contexts import read_contexts

    return [[{"role": role, "content": text} for role, text in context] for context in read_contexts(file)]


def _keep_base(on_miss: "OnMiss", neutral: Path | None, unknown: str) -> KeepBase:
    """
    Raises:
        InputError: The file is not UTF-8, or its text cannot be kept.
    """
    from loramem.training.neutral_text import remember_text

    if neutral is None:
        return KeepBase(on_miss=on_miss, unknown=unknown)
    try:
        text = neutral.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{neutral} is not UTF-8: {error}.") from None
    return KeepBase(on_miss=on_miss, unknown=unknown, text_sha256=remember_text(text))
