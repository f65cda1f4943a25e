"""One long text in one record: how many of its tokens come back, and where the first is lost.

As in the paper (arXiv 2605.30260): a share of the tokens, from none (r0) to all (r100), is random, at evenly spaced
positions. The text is that of the Python documentation topics, those first that loramem-tiny was not trained on;
another one with ``--data``, as it is where it is one of the paper's files. Published methods train for 2,000 steps and,
as published, no end token. The default lengths are two of the published grid, of a cost that a processor can bear.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from loramem.embedded.corpus import is_held_out
from loramem.errors import InputError
from loramem.models.dtypes import DtypeChoice
from loramem.records.input_files import read_records
from loramem.records.record import Record
from loramem.suites.figures import Axis, HeatMap, Plot, Point, Series
from loramem.suites.methods import OWN, labels, unit_of
from loramem.suites.runner import METHODS, Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    from loramem.models.base_model import BaseModel
    from loramem.records.prompts import EncodedRecord

OPTIONS = ("lengths", "ranks", "methods", "model", "paper", "data", "unit", "layer", "dtype")
LENGTHS, QUICK_LENGTHS = (50, 200), (20, 50)
PAPER_LENGTHS = (50, 100, 200, 500, *range(1000, 9000, 1000), 10_000)
RANKS, QUICK_RANKS = (1, 4, 16), (1, 8)
PAPER_RANKS = (1, 2, 4, 6, 8, 10, 12, 14, 16)
PAPER_RANDOM_RANKS = (*PAPER_RANKS, 24, 32, 48, 64, 128, 256, 512)
"""Of r100, where the paper goes further."""
NOISE, QUICK_NOISE, PAPER_NOISE = (0.0, 0.4, 1.0), (1.0,), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
QUICK_CUT = 10
TOPICS = "topics"
KEY = "the text"
PROMPT_TOKENS = 64  # more than a chat template puts around the key; the paper's prompts have 36 and 54
PAPER = {
    "Llama": {
        "sft": (27.4, 28.5, 43.6, 45.9, 54.9, 69.5, 78.2, 86.3, 94.7),
        "memft-ot": (27.3, 36.4, 45.6, 54.7, 63.6, 70.5, 85.4, 94.7, 100.0),
        "memft-sw": (32.5, 37.5, 46.0, 52.3, 56.0, 63.4, 69.1, 76.6, 81.1),
    },
    "Qwen": {
        "sft": (17.9, 24.2, 27.8, 31.7, 33.1, 39.8, 40.2, 40.0, 47.7),
        "memft-ot": (19.2, 23.6, 29.8, 38.5, 47.5, 56.1, 91.1, 100.0, 100.0),
        "memft-sw": (24.7, 29.3, 32.0, 39.4, 52.5, 74.6, 93.5, 94.4, 94.4),
    },
}
"""Published token accuracy of r100 in %, mean over lengths; free-running or teacher-forced is not said."""
PAPER_TABLE_RANKS = {"Llama": PAPER_RANKS, "Qwen": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
SHARES = {"token_accuracy": "free-running", "forced_accuracy": "teacher-forced"}


@dataclass(frozen=True)
class Cell:
    """One adapter with one text."""

    source: str
    """`TOPICS`, or the name of a file."""
    digest: str
    """Twelve hex digits of the sha256 of the whole source."""
    noise: float | None
    """Share of random tokens; None leaves the text as it is."""
    length: int
    """Answer tokens."""
    rank: int
    method: str
    unit: str
    """Of a published method; our own has as many parameters, within 10 %."""
    layer: int | None
    """Of that unit; None at two thirds of the layers."""
    seed: int
    """Of the noise, the topic that the text begins with, the initial matrices and the dropout."""
    cut: int
    """Published epochs, and our writer's patience, are divided by it; 1 but for quick runs."""
    model: str
    device: str
    path: Path | None
    """Of the file."""
    dtype: DtypeChoice = "auto"

    @property
    def identity(self) -> Mapping[str, Any]:
        fields = {name: value for name, value in asdict(self).items() if name != "path"}
        return {**fields, "model": public_name(self.model)}

    @property
    def title(self) -> str:
        text = text_name(self.source, self.noise)
        return f"{text}, {self.length:,} tokens, rank {self.rank}, {self.method}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Every noise, length, rank and method; of the published lengths those that fit the base model's context."""
    digest = hashlib.sha256(read_source(request.data)[1].encode()).hexdigest()[:12]
    ratios = QUICK_NOISE if request.quick else PAPER_NOISE if request.paper else NOISE
    for noise in (None,) if is_record_file(request.data) else ratios:
        for length in request.lengths or _lengths(request):
            for seed in range(request.seeds or 1):
                for rank in request.ranks or _ranks(request, noise):
                    for method in request.methods or METHODS:
                        unit, layer = unit_of(request, method)
                        yield Cell(
                            source=TOPICS if request.data is None else request.data.name,
                            digest=digest,
                            noise=noise,
                            length=length,
                            rank=rank,
                            method=method,
                            unit=unit,
                            layer=layer,
                            seed=seed,
                            cut=QUICK_CUT if request.quick else 1,
                            model=request.model,
                            device=request.device,
                            path=request.data,
                            dtype=request.dtype,
                        )


def _ranks(request: SuiteOptions, noise: float | None) -> tuple[int, ...]:
    if not request.paper:
        return QUICK_RANKS if request.quick else RANKS
    return PAPER_RANDOM_RANKS if noise in (None, 1.0) else PAPER_RANKS


def _lengths(request: SuiteOptions) -> tuple[int, ...]:
    if not request.paper:
        return QUICK_LENGTHS if request.quick else LENGTHS
    from loramem.models.find_base import find_base_model
    from loramem.models.pretrained import context_tokens, read_config

    limit = context_tokens(read_config(find_base_model(request.model)[0], request.model)) - PROMPT_TOKENS
    return tuple(length for length in PAPER_LENGTHS if length <= limit)


def text_name(source: str, noise: float | None) -> str:
    """What the paper calls it ("r40"), with the name of the file if it is of one."""
    ratio = [] if noise is None else [f"r{100 * noise:.0f}"]
    return " ".join(ratio if source == TOPICS else [source, *ratio])


def texts(lines: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str]:
    """Names of the texts of cells, with all that makes them other measurements: the file's digest and the cut."""
    digests: dict[str, set[str]] = {}
    for line in lines:
        digests.setdefault(line["cell"]["source"], set()).add(line["cell"]["digest"])

    def label(cell: Mapping[str, Any]) -> str:
        source = f" ({cell['digest']})" if len(digests[cell["source"]]) > 1 else ""
        cut = "" if cell["cut"] == 1 else f", epochs / {cell['cut']}"
        return f"{text_name(cell['source'], cell['noise'])}{source}{cut}"

    return label


def is_record_file(path: Path | None) -> bool:
    """Whether a file holds a record with question and text, as the paper's do, in place of a text alone."""
    return path is not None and path.suffix in (".json", ".jsonl")


def read_source(path: Path | None, seed: int = 0) -> tuple[str, str]:
    """The key and the whole text that an answer is the beginning of.

    Args:
        path: One of the paper's files (fields "question" and "matching"), or any UTF-8 text; the topics if None.
        seed: Which of the topics comes first.

    Raises:
        InputError: The file is not UTF-8, or has not exactly one record.
    """
    if path is None:
        return KEY, documentation(seed)
    if is_record_file(path):
        records = read_records(path, key_field="question", value_field="matching")
        if len(records) != 1:
            raise InputError(f"{path.name} has {len(records)} records; a long text is one.")
        return records[0].key, records[0].value
    try:
        return KEY, path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read as UTF-8 text: {error}.") from None


def documentation(first: int = 0) -> str:
    """The Python documentation topics, from one of them on; those that loramem-tiny was not trained on are 0 to 2."""
    from pydoc_data.topics import topics

    names = sorted(topics, key=lambda name: (not is_held_out(f"topic:{name}"), name))
    start = first % len(names)
    return "\n\n".join(topics[name] for name in names[start:] + names[:start])


def run(cell: Cell) -> Result:
    """Train one adapter on the text, and ask for it."""
    from loramem.models.base_model import load_base_model
    from loramem.suites.methods import trained_adapter
    from loramem.suites.paper_schedule import Schedule
    from loramem.suites.positions import finite, free_running, scores, teacher_forced
    from loramem.suites.timing import conditions, warm_up

    base = load_base_model(cell.model, device=cell.device, dtype=cell.dtype)
    record = encoded(cell, base)
    warm_up(base)
    before = teacher_forced(base, record)
    with trained_adapter(
        base,
        [record if cell.method == OWN else without_end(record)],
        cell.method,
        cell.rank,
        Schedule.long_context().shortened(cell.cut),
        seed=cell.seed,
        unit=cell.unit,
        layer=cell.layer,
        cut=cell.cut,
    ) as taken:
        after, decoded = teacher_forced(base, record), free_running(base, record)
    return {
        "seconds": round(taken.seconds, 3),
        "steps": taken.steps,
        "parameters": taken.parameters,
        "placement": taken.where,
        "length": record.length,
        "base_loss": finite(before.answer_loss),
        "base_accuracy": float(before.correct[:-1].double().mean()),
        **scores(record, decoded, after),
        "base": conditions(base),
    }


def encoded(cell: Cell, base: "BaseModel") -> "EncodedRecord":
    """The text of a cell as one record, of a few tokens less than asked for where a cut would not be clean.

    Raises:
        InputError: The text is shorter.
        RecordError: The base model cannot express it, or it does not fit the context.
    """
    from loramem.planning.long_text import text_ids, with_noise
    from loramem.records.prompts import encode_records, special_ids

    key, text = read_source(cell.path, cell.seed)
    ids = text_ids(base.tokenizer, text, cell.length)
    value = with_noise(
        base.tokenizer, ids, cell.noise or 0.0, cell.seed, base.unreachable | special_ids(base.tokenizer)
    )
    (record,) = encode_records(
        [Record(key, value)], base.tokenizer, base.template, base.max_tokens, base.unreachable, base.vocabulary
    )
    return record


def without_end(record: "EncodedRecord") -> "EncodedRecord":
    """What published methods are trained on here: the published code cuts long texts before an end token."""
    return replace(record, answer_ids=record.answer_ids[:-1])


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per adapter; below, the means over lengths beside the published ones."""
    columns = (
        *("text", "tokens", "rank", "method", "placement", "parameters", "seed", "token accuracy, %"),
        *("teacher-forced, %", "base, teacher-forced, %", "exact", "ended", "first failure", "earliest stubborn"),
        *("base loss", "final loss", "steps", "seconds"),
    )
    text = texts(lines)
    rows = tuple(_row(text(line["cell"]), line["cell"], line["result"]) for line in lines)
    notes = (
        "Token accuracy: answer tokens that are right at their place in greedy decoding; teacher-forced: whose argmax "
        "is right after the true ones. Exact: all answer tokens; ended: the end token came right after them, which the "
        "published methods do not train here. First failure: of greedy decoding; earliest stubborn: the first with "
        "p <= 0.5 teacher-forced; both from 0. Losses in nats per answer token.",
        *_means_in_words(lines),
    )
    return Table(columns, rows, notes)


def _row(text: str, cell: Mapping[str, Any], result: Result) -> tuple[str, ...]:
    return (
        text,
        f"{result['length']:,}",
        str(cell["rank"]),
        cell["method"],
        result["placement"],
        f"{result['parameters']:,}",
        str(cell["seed"]),
        *(f"{100 * result[name]:.1f}" for name in (*SHARES, "base_accuracy")),
        *("yes" if result[name] else "no" for name in ("exact", "ended")),
        *("-" if result[name] is None else str(result[name]) for name in ("first_failure", "earliest_stubborn")),
        *("-" if result[name] is None else f"{result[name]:.3f}" for name in ("base_loss", "final_loss")),
        f"{result['steps']:,}",
        f"{result['seconds']:.1f}",
    )


Grid = dict[tuple[int, int], dict[int, float]]
"""In %, by seed, by length and rank."""


def grids(lines: Sequence[Mapping[str, Any]], share: str) -> dict[str, dict[str, Grid]]:
    """One of `SHARES` by text and method; of lines that differ in their device alone the last."""
    label, text = labels([line["cell"] for line in lines]), texts(lines)
    found: dict[str, dict[str, Grid]] = {}
    for line in lines:
        cell = line["cell"]
        methods = found.setdefault(text(cell), {})
        grid = methods.setdefault(label(cell), {})
        grid.setdefault((cell["length"], cell["rank"]), {})[cell["seed"]] = 100 * line["result"][share]
    return found


def means(methods: Mapping[str, Grid]) -> dict[str, dict[int, float]]:
    """The mean over lengths of every method by rank, where all lengths of the text were measured."""
    lengths = {length for grid in methods.values() for length, _ in grid}

    def mean_of(grid: Grid, rank: int) -> float:
        return mean(mean(grid[length, rank].values()) for length in lengths)

    return {
        method: {
            rank: mean_of(grid, rank)
            for rank in sorted({rank for _, rank in grid})
            if all((length, rank) in grid for length in lengths)
        }
        for method, grid in methods.items()
    }


def _means_in_words(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for text, methods in grids(lines, "token_accuracy").items():
        lengths = sorted({length for grid in methods.values() for length, _ in grid})
        for method, ranks in means(methods).items():
            told = ", ".join(f"rank {rank} {value:.1f}" for rank, value in ranks.items())
            over = ", ".join(f"{length:,}" for length in lengths)
            yield f"{text}, {method}: token accuracy, mean over {over} tokens, %: {told or 'lengths are missing'}."
    for method in dict.fromkeys(line["cell"]["method"] for line in lines):
        for model, rows in PAPER.items():
            if method in rows:
                published = zip(PAPER_TABLE_RANKS[model], rows[method], strict=True)
                told = ", ".join(f"rank {rank} {value}" for rank, value in published)
                yield f"Paper, r100, {method}, {model}, mean over its lengths: {told} %."


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot | HeatMap, ...]:
    """Token accuracy over rank, a plot per text; over rank and length for every method on the noisiest text."""
    found = grids(lines, "token_accuracy")
    noisiest = max((line["cell"] for line in lines), key=lambda cell: cell["noise"] or 0.0)
    hardest = texts(lines)(noisiest)
    maps = (_heat_map(hardest, method, grid) for method, grid in found[hardest].items())
    curves = (_curves(text, methods) for text, methods in found.items())
    return (
        *(one for one in curves if one.series),  # a text of which lengths are missing has no mean
        *(one for one in maps if len(one.rows) > 1 and len(one.columns) > 1),
    )


def _curves(text: str, methods: Mapping[str, Grid]) -> Plot:
    return Plot(
        name=f"accuracy-{_word(text)}",
        title=f"Tokens right in greedy decoding: {text}",
        kind="line",
        x=Axis("rank (log scale)", log=True),
        y=Axis("token accuracy, mean over lengths, %"),
        series=tuple(
            Series(method, tuple(Point(rank, value, value, value) for rank, value in ranks.items()))
            for method, ranks in means(methods).items()
            if ranks
        ),
        note="loramem has as many parameters as the published unit of that rank, within 10 %.",
    )


def _heat_map(text: str, method: str, grid: Grid) -> HeatMap:
    lengths, ranks = (sorted({where[at] for where in grid}) for at in (0, 1))
    fields = {where: mean(values.values()) for where, values in grid.items()}
    return HeatMap(
        name=f"grid-{_word(method)}",
        title=f"Tokens right in greedy decoding: {text}, {method}",
        x=Axis("rank"),
        y=Axis("answer tokens"),
        value="token accuracy, %",
        columns=tuple(map(str, ranks)),
        rows=tuple(f"{length:,}" for length in lengths),
        values=tuple(tuple(fields.get((length, rank)) for rank in ranks) for length in lengths),
        high=100.0,
    )


def _word(text: str) -> str:
    """What may stand in the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
