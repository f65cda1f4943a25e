"""loramem capacity: what a write would take, before it."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .output import note, print_facts, print_json, print_markdown

if TYPE_CHECKING:
    from loramem.planning.calibration import Calibration
    from loramem.planning.limits import RankLimits
    from loramem.planning.plan import Plan, PlanInputs, ShardPlan
    from loramem.planning.rank_law import KindSamples, LawRank
    from loramem.store.manifest import Manifest

TOKENS_PER_RECORD = 10
MOST_TOKENS = 10_000_000  # thousands of adapters, planned in a second
LARGEST_SAMPLE = 4000  # answer tokens: what longer ones cost is proportional


@click.command("capacity")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True), required=False)
@click.option(
    "--length", type=click.IntRange(1, MOST_TOKENS), help="Answer tokens of all records together, in place of FILE."
)
@click.option("--records", type=click.IntRange(1), help="How many records share them; 10 tokens each unless given.")
@click.option(
    "--kind",
    help="Kind of data: phonebook (random digits, the default with --length), text, mixed (text with 40 % random "
    "tokens), random (tokens), or a file that was calibrated with. With FILE it says whose training seconds are told; "
    "the one nearest in cost unless given.",
)
@click.option("--ranks", "choices", type=options.Numbers(), help="The only ranks allowed, such as 8,16,32.")
@click.option(
    "--plot", type=options.OutputPath(path_type=Path), help="Draw the law for the first adapter: .png, .svg or .pdf."
)
@options.input_options
@options.namespace_option
@options.goal_options
@options.one_adapter_option
@options.planned_store_options
def command(
    file: Path | None,
    length: int | None,
    records: int | None,
    kind: str | None,
    choices: tuple[int, ...] | None,
    plot: Path | None,
    store: options.StoreOptions,
    as_json: bool,
    fields: options.InputOptions,
    namespace: str,
    ranks: options.RankOptions,
    one_adapter: bool,
) -> None:
    """Say how many adapters of which rank FILE takes, or --length answer tokens of a --kind. Nothing is written.

    Records that the store (./memory unless named) holds already are left out. Without a store, for a new one.
    """
    if (file is None) == (length is None):
        raise click.UsageError("Give a FILE (- for stdin), or --length.")
    limits = ranks.limits(choices or ())
    if file is None:
        assert length is not None
        count = records or max(1, round(length / TOKENS_PER_RECORD))
        if count > length:
            raise click.UsageError(f"--records {count} cannot share {length} answer tokens: each needs one.")
        plan, inputs, name, location = _plan_length(
            length, count, kind or "phonebook", store, ranks, limits, one_adapter
        )
    elif records:
        raise click.UsageError("--records goes with --length; a FILE says how many it holds.")
    else:
        found = fields.read(file, namespace)
        with tempfile.TemporaryDirectory() as scratch:
            path = store.path if (store.path / "store.json").exists() else Path(scratch) / "store"
            with replace(store, path=path).open(create=True) as opened:
                plan = opened.plan(
                    found, goal=ranks.goal, rank=ranks.rank, limits=limits, kind=kind, one_adapter=one_adapter
                )
                inputs, name, location = opened.plan_inputs(plan.kind), opened.manifest.base_model, opened.base.location
    if plot is not None:
        _draw(plan, inputs, plot)
    if as_json:
        totals = ("parameters", "size_bytes", "cost_bits", "length", "success", "training_s")
        print_json({"base_model": name, **asdict(plan), **{total: getattr(plan, total) for total in totals}})
        return
    _show(plan, name, location)


def _plan_length(
    length: int,
    records: int,
    kind: str,
    store: options.StoreOptions,
    ranks: options.RankOptions,
    limits: "RankLimits",
    one_adapter: bool,
) -> "tuple[Plan, PlanInputs, str, str]":
    """Plan, what it rests on, and the base model's name and what `load_base_model` finds it by.

    From what is known of the base model, without loading it where that says enough.
    """
    from loramem import embedded
    from loramem.planning import calibration, timings
    from loramem.planning.runs import KINDS

    model, name = store.model, store.model or embedded.NAME
    outcomes, place, weights, manifest = [], None, None, None
    if (store.path / "store.json").exists():
        with replace(store, model=None).open() as opened:
            manifest = opened.manifest
            if model in (None, manifest.base_model, manifest.location) or _is_base_of(manifest, model):
                outcomes, name = opened.outcomes(), model or manifest.location or manifest.base_model
                place = (tuple(manifest.placement["modules"]), tuple(manifest.placement["layers"]))
                weights = manifest.fingerprint["weights"][:12]
    if weights is None and name != embedded.NAME:
        from loramem.models.find_base import find_base_model
        from loramem.models.fingerprint import fingerprint

        weights = fingerprint(find_base_model(name)[0]).weights[:12]
    known = calibration.load(weights)
    samples = known.samples(kind) if known else None
    if known is None or samples is None:
        if samples is None and kind not in KINDS:
            raise click.UsageError(
                f"--kind {kind!r} is not one of {', '.join(KINDS)}, nor a file that was calibrated with."
            )
        if model is None and manifest is not None:
            name = manifest.place()
        known, samples = _measured(name, store, kind, length, known)
    if math.ceil(length / records) > known.context_tokens:
        raise click.UsageError(
            f"A value of {math.ceil(length / records)} tokens exceeds the context of {known.base_model}, "
            f"{known.context_tokens} tokens. Give more --records."
        )
    seconds = timings.seconds_per_visit(known.base_weights)
    above = known.above if place in (None, known.place) else ()
    inputs = calibration.plan_inputs(
        known, place or known.place, known.parameters_per_rank, kind, outcomes, seconds, above
    )
    plan = calibration.plan_length(
        samples, inputs, length, records, goal=ranks.goal, rank=ranks.rank, limits=limits, one_adapter=one_adapter
    )
    return plan, inputs, known.base_model, name


def _is_base_of(manifest: "Manifest", model: str) -> bool:
    """Whether a model is the one that a store was written with, whatever either calls it."""
    from loramem.models.find_base import find_base_model
    from loramem.models.fingerprint import fingerprint

    folder = find_base_model(model)[0]
    return not fingerprint(folder).differences(manifest.fingerprint, folder, same_dtype=False)


def _measured(
    name: str, store: options.StoreOptions, kind: str, length: int, known: "Calibration | None"
) -> "tuple[Calibration, KindSamples]":
    """What a calibration says, made now if it may be; of a kind of which it says nothing, one pass over a sample."""
    from loramem.models.adapters import AdaptedModel
    from loramem.models.base_model import load_base_model
    from loramem.planning.base_calibration import known_of
    from loramem.planning.calibrate import bare_calibration, price_sample

    base = load_base_model(name, device=store.device)
    known = known or known_of(AdaptedModel(base), calibrate=store.calibrate) or bare_calibration(base)
    samples = known.samples(kind)
    return known, samples or price_sample(base, kind, min(length, LARGEST_SAMPLE, base.max_tokens // 2))


def _draw(plan: "Plan", inputs: "PlanInputs", path: Path) -> None:
    from loramem.planning.plots import draw_plan

    shard = plan.shards[0] if plan.shards else None
    if inputs.law is None or shard is None:
        raise click.UsageError("--plot: no law of this base model and placement is known. See loramem calibrate.")
    ranks = {"optimistic": float(shard.optimistic_rank), "planned": float(shard.rank)}
    if shard.law_rank and shard.law_rank.rank:
        ranks["law"] = shard.law_rank.rank
    title = f"as {shard.vocabulary:,.0f} random tokens"
    draw_plan(inputs.law.law, inputs.law.base_loss, shard.vocabulary, ranks, title, path)


def _show(plan: "Plan", name: str, location: str) -> None:
    """Totals, then the adapters; what to keep in mind on stderr."""
    success, seconds = plan.success, plan.training_s
    print_facts(
        [
            ("base model", name if plan.calibrated else f"{name} (uncalibrated)"),
            ("records", f"{sum(shard.records for shard in plan.shards):,}"),
            ("answer tokens", f"{plan.length:,}"),
            ("cost of the values", f"{plan.cost_bits:,.0f} bits"),
            ("goal", plan.goal),
            ("adapters", len(plan.shards)),
            ("parameters", f"{plan.parameters:,}"),
            ("bits per parameter", f"{plan.cost_bits / plan.parameters:.3f}" if plan.parameters else "-"),
            ("size", f"{plan.size_bytes / 1e6:.2f} MB"),
            ("success at first try", "unknown" if success is None else f"{success:.0%}"),
            ("training", "not timed on this machine yet" if seconds is None else f"about {seconds:,.0f} s"),
        ]
    )
    click.echo()
    ranks = ("optimistic rank", "law (90%)", "rank")
    columns = ("adapter", "records", "tokens", "different", *ranks, "base loss", "success")
    print_markdown(columns, _rows(plan.shards))
    for warning in plan.warnings:
        note(warning)
    if not plan.calibrated:
        model = "" if location == "loramem-tiny" else f" --model {location}"
        note(f"To know instead of guessing: loramem calibrate{model}.")


def _rows(shards: "Sequence[ShardPlan]") -> Iterator[tuple[str, ...]]:
    """A row for every run of adapters that look alike: a large plan has thousands."""
    first = 1
    for row, alike in groupby(map(_row, shards)):
        last = first + len(list(alike)) - 1
        yield (str(first) if first == last else f"{first}–{last}", *row)
        first = last + 1


def _row(shard: "ShardPlan") -> tuple[str, ...]:
    return (
        f"{shard.records:,}",
        f"{shard.length:,}",
        f"{shard.vocabulary:,.0f}",
        str(shard.optimistic_rank),
        _law_rank(shard.law_rank) if shard.law_rank else "-",
        str(shard.rank),
        f"{shard.base_loss:.2f}",
        "-" if shard.success is None else f"{shard.success:.0%}",
    )


def _law_rank(found: "LawRank") -> str:
    low, high = (_rank(end) if end else "?" for end in (found.low, found.high))
    return f"{_rank(found.rank)} ({low}–{high})" + (", extrapolated" if found.extrapolated else "")


def _rank(rank: float) -> str:
    return f"{rank:,.0f}" if rank >= 10 else f"{rank:.2g}"
