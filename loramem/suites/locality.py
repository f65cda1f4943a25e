"""What an adapter does to everything else: how far it moves the base model on text that it holds nothing of.

A store routes by its index: for text that is none of its keys no adapter is active, and the base must answer bit for
bit as without a store. Unrouted, the adapter is attached by hand and stays active. Neutral text is documentation and
source code, or a file; and questions in the form that was trained whose keys were never written, scored at the first
token of their answers, since a model that learned records is changed most where the next one would begin.

Beside it the same records in the LoRA of a plain loop (`loramem.suites.baselines`), and of one whose loss has a term
for what the base said; and of each adapter what it leaves of the base's abilities: the next token on text that nothing
was trained on, and fifty questions with known answers (`loramem.suites.abilities`).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem.errors import KeyNotFound, StubbornRecords
from loramem.suites.figures import Axis, Plot, Series, point
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    from loramem import MemoryStore, Record
    from loramem.suites.divergence import Effect

OPTIONS = ("records", "ranks", "model", "data")
KIND = "phonebook"
RANKS, RECORDS, SEEDS = (1, 4, 16, 64), (100,), 2
QUICK_RANKS, QUICK_RECORDS = (2, 8), (8,)
KEPT_RANK = 128
"""Of the write that keeps the base."""
LOOPS = {"peft": "a PEFT loop", "peft-kl": "a PEFT loop with a KL term"}
LOOP_RANK, LOOP_CAP_S, QUICK_CAP_S = 16, 480.0, 5.0
"""Of the usual set-up, all linear modules; and seconds of training after which a loop is stopped as it is."""
LARGE, LOOP_RATE, LOOP_BATCH = 50_000_000, (3e-3, 1e-3), (16, 8)
"""Parameters of a base from which the second of each is taken: what `write-speed` found to be best."""
TOKENS, QUICK_TOKENS = 8192, 512
"""Of each neutral text."""
STRANGERS = 100  # keys that were never written


@dataclass(frozen=True)
class Cell:
    """One store, written at one rank, and what its adapters do to neutral text."""

    kind: str
    """Of records: see `loramem.planning.samples.generate`."""
    records: int
    rank: int
    tokens: int
    """Of each neutral text."""
    data: Path | None
    """A text file in place of documentation and source code."""
    digest: str
    """Twelve hex digits of that file's sha256: an edited one is another measurement."""
    seed: int
    """Of the records, the training, and the choice of neutral text."""
    model: str
    device: str
    keep: bool = False
    """Written with ``keep_base``."""
    loop: str = ""
    """One of `LOOPS` in place of a write."""
    cap_s: float = 0.0
    """Of a loop."""

    @property
    def identity(self) -> Mapping[str, Any]:
        data = None if self.data is None else self.data.name
        fields = {**asdict(self), "model": public_name(self.model), "data": data}
        return {name: fields[name] for name in fields if fields[name] or name not in ("keep", "loop", "cap_s")}

    @property
    def title(self) -> str:
        return f"{self.records} {self.kind} records at rank {self.rank}{_way(self.identity)}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Every rank for every number of records, one write that keeps the base, and the loops."""
    digest = "" if request.data is None else hashlib.sha256(request.data.read_bytes()).hexdigest()[:12]
    tokens = QUICK_TOKENS if request.quick else TOKENS
    for records in request.records or (QUICK_RECORDS if request.quick else RECORDS):
        for rank in request.ranks or (QUICK_RANKS if request.quick else RANKS):
            for seed in range(request.seeds or (1 if request.quick else SEEDS)):
                yield Cell(KIND, records, rank, tokens, request.data, digest, seed, request.model, request.device)
        if request.ranks:
            continue
        for seed in range(request.seeds or (1 if request.quick else SEEDS)):
            alike = (tokens, request.data, digest, seed, request.model, request.device)
            if not request.quick:
                yield Cell(KIND, records, KEPT_RANK, *alike, keep=True)
            for loop in LOOPS:
                cap_s = QUICK_CAP_S if request.quick else LOOP_CAP_S
                yield Cell(KIND, records, LOOP_RANK, *alike, loop=loop, cap_s=cap_s)


def run(cell: Cell) -> Result:
    """Have neutral text predicted by the bare base; write, recall every record; then again, routed and unrouted."""
    from loramem import MemoryStore
    from loramem.planning.samples import generate
    from loramem.suites.abilities import answers
    from loramem.suites.divergence import effect, identical, predictions
    from loramem.suites.passages import every_passage
    from loramem.suites.timing import clock, conditions, warm_up

    drawn = generate(cell.kind, cell.records + STRANGERS, cell.seed)
    records, strangers = drawn[: cell.records], drawn[cell.records :]
    if cell.loop:
        return _looped(cell, records, strangers)
    with TemporaryDirectory() as scratch, MemoryStore(Path(scratch) / "m", cell.model, device=cell.device) as store:
        warm_up(base := store.base)
        passages = every_passage(base, strangers, cell.data, cell.tokens, cell.seed)
        bare = {name: list(predictions(base.model, text)) for name, text in passages.items()}
        said, says = answers(base), list[list[str]]()
        started = clock(base.device)
        failed = _write(store, records, cell)
        seconds = clock(base.device) - started
        exact = store.verify().exact
        refused = sum(_is_refused(store, stranger.key) for stranger in strangers)
        routed = {name: list(predictions(base.model, text)) for name, text in passages.items()}
        effects: dict[str, list[Effect]] = {name: [] for name in passages}
        for key in {record.adapter: record.key for record in store.records(None)}.values():
            model, _ = store.load(key)
            says.append(answers(base))
            for name, text in passages.items():
                effects[name].append(effect(text, bare[name], list(predictions(model, text))))
        stats = store.stats()
        return {
            "records": cell.records,
            "failed": failed,
            "exact": exact,
            "adapters": stats.adapters,
            "parameters": stats.parameters,
            "seconds": round(seconds, 3),
            "strangers": STRANGERS,
            "refused": refused,
            "texts": {
                name: {
                    "tokens": sum(len(passage.ids) - passage.first for passage in text),
                    "routed": {
                        "identical": identical(bare[name], routed[name]),
                        **summary([effect(text, bare[name], routed[name])]),
                    },
                    "unrouted": summary(effects[name]) if effects[name] else None,
                }
                for name, text in passages.items()
            },
            "questions": _asked(said, says),
            "base": conditions(base),
        }


def _looped(cell: Cell, records: Sequence["Record"], strangers: Sequence["Record"]) -> Result:
    """The same of a loop that trains one LoRA, which nothing routes to."""
    from loramem.models.base_model import load_base_model
    from loramem.records.prompts import encode_records
    from loramem.suites.abilities import answers
    from loramem.suites.baselines import all_linear, trainer_loop
    from loramem.suites.divergence import effect, predictions
    from loramem.suites.passages import every_passage
    from loramem.suites.timing import conditions, warm_up
    from loramem.training.neutral import sequences
    from loramem.training.settings import KeepBase

    base = load_base_model(cell.model, device=cell.device)
    warm_up(base)
    passages = every_passage(base, strangers, cell.data, cell.tokens, cell.seed)
    bare = {name: list(predictions(base.model, text)) for name, text in passages.items()}
    said, says, effects = answers(base), list[list[str]](), dict[str, "Effect"]()
    keep = KeepBase(questions=20, text_tokens=2000) if cell.cap_s <= QUICK_CAP_S else KeepBase()

    def look() -> None:
        says.append(answers(base))
        for name, text in passages.items():
            effects[name] = effect(text, bare[name], list(predictions(base.model, text)))

    large = sum(parameter.numel() for parameter in base.model.parameters()) >= LARGE
    trained = trainer_loop(
        base,
        encode_records(records, base.tokenizer, base.template, base.max_tokens, base.unreachable),
        all_linear(),
        learning_rate=LOOP_RATE[large],
        batch_records=LOOP_BATCH[large],
        seed=cell.seed,
        cap_s=cell.cap_s,
        neutral=sequences(base, records, keep, cell.seed) if cell.loop == "peft-kl" else (),
        then=look,
    )
    tokens = {name: sum(len(passage.ids) - passage.first for passage in text) for name, text in passages.items()}
    return {
        "records": cell.records,
        "failed": [],
        "adapters": 1,
        **{name: trained[name] for name in ("exact", "parameters", "seconds", "epochs", "capped", "min_prob")},
        "texts": {
            name: {"tokens": tokens[name], "routed": None, "unrouted": summary([found])}
            for name, found in effects.items()
        },
        "questions": _asked(said, says),
        "base": conditions(base),
    }


def _asked(said: Sequence[str], says: Sequence[Sequence[str]]) -> Result:
    """Of the questions with known answers: how many are right, and said as before, with each adapter."""
    from loramem.suites.abilities import right

    return {
        "asked": len(said),
        "right_off": right(said),
        "right_on": [right(each) for each in says],
        "same": [sum(map(str.__eq__, said, each)) for each in says],
    }


def _way(cell: Mapping[str, Any]) -> str:
    """How records came into the adapter, where it was no plain write."""
    return ", base kept" if cell.get("keep") else f", {LOOPS[cell['loop']]}" if cell.get("loop") else ""


def _write(store: "MemoryStore", records: Sequence["Record"], cell: Cell) -> list[str]:
    """Write at the cell's rank and no higher; returns the keys that could not be certified."""
    from loramem.training.settings import WriterSettings

    settings = WriterSettings(seed=cell.seed, max_rank=cell.rank)
    try:
        report = store.write(records, rank=cell.rank, partial=True, settings=settings, keep_base=cell.keep)
        return list(report.failed)
    except StubbornRecords as error:  # none was certified
        return list(error.keys)


def _is_refused(store: "MemoryStore", key: str) -> bool:
    try:
        store.recall(key)
    except KeyNotFound:
        return True
    return False


def summary(effects: Sequence["Effect"]) -> Result:
    """Means over all tokens and adapters, the largest divergence, and the share of tokens with another argmax."""
    import torch

    before, after, divergence, changed, hit_before, hit_after = (
        torch.cat([getattr(one, name) for one in effects]).double()
        for name in ("before", "after", "divergence", "changed", "hit_before", "hit_after")
    )
    return {
        "hits_off": float(hit_before.mean()),
        "hits_on": float(hit_after.mean()),
        "loss_off": float(before.mean()),
        "loss_on": float(after.mean()),
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "changed": float(changed.mean()),
    }


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per rank and neutral text; of several seeds the median and the range."""
    columns = (
        *("records", "rank", "parameters", "exact", "neutral text", "tokens", "KL mean", "KL max", "loss off"),
        *("loss on", "change", "other argmax", "next token right: off", "on", "KL max, routed"),
    )
    rows = []
    for (records, rank, name), found in _groups(lines).items():
        texts, results = [text for text, _ in found], [result for _, result in found]
        written = [text["unrouted"] for text in texts if text["unrouted"]]
        start = (
            str(records),
            str(rank),
            _spread([result["parameters"] for result in results], ",.0f"),
            f"{sum(result['exact'] for result in results)}/{records * len(results)}",
            name,
            f"{sum(text['tokens'] for text in texts):,}",
        )
        through = [text["routed"]["kl_max"] for text in texts if text["routed"]]
        routed = f"{max(through):.3g}" if through else "-"
        if not written:
            rows.append((*start, *["-"] * 8, routed))
            continue
        hits = [[one[field] for one in written if field in one] for field in ("hits_off", "hits_on")]
        rows.append(
            (
                *start,
                *(_spread([one[field] for one in written], ".3g") for field in ("kl_mean", "kl_max")),
                *(_spread([one[field] for one in written], ".3f") for field in ("loss_off", "loss_on")),
                _spread([one["loss_on"] - one["loss_off"] for one in written], "+.3f"),
                _spread([one["changed"] for one in written], ".1%"),
                *(_spread(some, ".1%") if some else "-" for some in hits),
                routed,
            )
        )
    return Table(columns, tuple(rows), tuple(_notes(lines)))


def _notes(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    every = [line["result"] for line in lines]
    results = [line["result"] for line in lines if not line["cell"].get("loop")]
    routed = [text["routed"] for result in results for text in result["texts"].values()]
    same, refused = sum(one["identical"] for one in routed), sum(result["refused"] for result in results)
    yield (
        f"Routed: after every record was recalled, {same} of {len(routed)} texts have logits that are bit for bit "
        f"the bare base's; {refused} of {sum(result['strangers'] for result in results)} unknown keys are refused."
    )
    yield (
        "All else is unrouted, the adapter attached by hand. KL(base ‖ adapted) and losses in nats per token; unknown "
        "keys are scored at the first token of the answer, losses against the value that such a key could have had."
    )
    for line in lines:
        if asked := line["result"].get("questions"):
            cell, on, same = line["cell"], *(", ".join(map(str, asked[name])) for name in ("right_on", "same"))
            yield (
                f"{asked['asked']} questions with known answers, {cell['records']} records at rank {cell['rank']}"
                f"{_way(cell)}, seed {cell['seed']}: {asked['right_off']} right without the adapter, {on} with it; the "
                f"answer is the same, word for word, to {same}."
            )
    if stopped := sum(result.get("capped", False) for result in every):
        yield f"{stopped} loops were stopped before every record was exact."
    if failed := sum(len(result["failed"]) for result in results):
        yield f"{failed} records could not be certified at their rank and were not written."
    if any(result["adapters"] > 1 for result in results):
        yield "Where records needed several adapters, the figures are means over these, each attached alone."


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Divergence, and change of the loss, over the rank; a colour per neutral text."""
    groups = {
        group: [text["unrouted"] for text, _ in found if text["unrouted"]] for group, found in _groups(lines).items()
    }
    measured = {group: written for group, written in groups.items() if written}
    if not measured:
        return ()
    sizes = {records for records, _, _ in measured}

    def over_rank(values: Mapping[tuple[int, int, str], Sequence[float]]) -> tuple[Series, ...]:
        series: dict[str, list[Any]] = {}
        for (records, rank, name), found in values.items():
            label = name if len(sizes) == 1 else f"{name}, {records:,} records"
            series.setdefault(label, []).append(point(rank, found))
        return tuple(Series(label, tuple(points)) for label, points in series.items())

    note = (
        "KL(base ‖ adapted) of the next token's prediction, and the loss with the adapter less that without it. It is "
        "attached by hand; routed, both are exactly 0. Of several seeds: median and range."
    )
    rank = Axis("rank (log scale)", log=True)
    return (
        Plot(
            name="divergence",
            title="How far an adapter moves the base on text it holds nothing of",
            kind="line",
            x=rank,
            y=Axis("mean KL, nats per token (log scale)", log=True),
            series=over_rank({group: [one["kl_mean"] for one in written] for group, written in measured.items()}),
            note=note,
        ),
        Plot(
            name="loss",
            title="What an adapter costs on text it holds nothing of",
            kind="line",
            x=rank,
            y=Axis("change of the loss, nats per token"),
            series=over_rank(
                {group: [one["loss_on"] - one["loss_off"] for one in written] for group, written in measured.items()}
            ),
            note=note,
        ),
    )


def _groups(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int, str], list[tuple[Result, Result]]]:
    """Texts with their results, one per seed, by records, rank and neutral text, in this order.

    A text is named with its setting where there are several. Of lines that differ in their device alone the last
    counts.
    """
    several = len({_setting(line["cell"]) for line in lines}) > 1
    groups: dict[tuple[int, int, str], dict[int, tuple[Result, Result]]] = {}
    names: dict[str, None] = {}
    for line in lines:
        cell, result = line["cell"], line["result"]
        for name, text in result["texts"].items():
            label = f"{name} ({_setting(cell)})" if several else name
            label += _way(cell)
            names.setdefault(label)
            groups.setdefault((cell["records"], cell["rank"], label), {})[cell["seed"]] = text, result
    order = list(names)
    return {
        group: list(groups[group].values())
        for group in sorted(groups, key=lambda group: (*group[:2], order.index(group[2])))
    }


def _setting(cell: Mapping[str, Any]) -> str:
    """What neutral text was read: other text, or more of it, is another measurement and no other seed."""
    return f"{cell['tokens']:,} tokens" + ("" if cell["data"] is None else f" of file {cell['digest']}")


def _spread(values: Sequence[float], format_: str) -> str:
    """The median, and the range where there are several."""
    found = point(0, values)
    middle = f"{found.y:{format_}}"
    return middle if found.low == found.high else f"{middle} ({found.low:{format_}} to {found.high:{format_}})"
