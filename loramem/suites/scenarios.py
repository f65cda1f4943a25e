"""Eight kinds of data that must be exact, recalled by their keys and by keys that are one character off.

A store routes by its index, so that a near miss is an unknown key. An adapter attached by hand answers whatever it is
asked: how often that is the original's value is the leak. The records lie in ``scenarios_data/``; names, codes, hosts
and secrets are invented.
"""

import hashlib
import json
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem.errors import InputError, KeyNotFound, RecordError, StubbornRecords
from loramem.records.input_files import read_records
from loramem.records.record import Record
from loramem.suites.figures import Axis, Plot, Series, point
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    from loramem import MemoryStore
    from loramem.index.rows import StoredRecord
    from loramem.planning.limits import GoalName
    from loramem.records.prompts import PromptTemplate

OPTIONS = ("records", "model")
DATA = Path(__file__).with_name("scenarios_data")
DOMAINS = ("credentials", "endpoints", "licences", "legal", "medical", "latex", "snippets", "configuration")
QUICK_RECORDS = 6


@dataclass(frozen=True)
class Cell:
    """One domain, written and asked."""

    domain: str
    records: int
    data: str
    """Twelve hex digits of the records' sha256: edited ones are another measurement."""
    goal: "GoalName"
    seed: int
    """Of the training and of the near misses."""
    model: str
    device: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{self.domain}, {self.records} records, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Every domain whole, or its first records; a quick run takes a few of the first."""
    for domain in DOMAINS[:1] if request.quick else DOMAINS:
        everything = domain_records(domain)
        for limit in request.records or (QUICK_RECORDS if request.quick else len(everything),):
            records = everything[:limit]
            data = hashlib.sha256(json.dumps([[r.key, r.value] for r in records]).encode()).hexdigest()[:12]
            for seed in range(request.seeds or 1):
                yield Cell(domain, len(records), data, "fast", seed, request.model, request.device)


def domain_records(domain: str) -> list[Record]:
    """The records of a domain, in the order of its file."""
    return read_records(DATA / f"{domain}.jsonl")


def run(cell: Cell) -> Result:
    """Write the domain into a store, open it afresh, and ask for every key and for one near each."""
    from loramem import MemoryStore
    from loramem.suites.timing import clock, conditions, warm_up

    records = domain_records(cell.domain)[: cell.records]
    with TemporaryDirectory() as scratch:
        place = Path(scratch) / "memory"
        with MemoryStore(place, cell.model, device=cell.device) as store:
            warm_up(store.base)
            started = clock(store.base.device)
            refused, failed = _write(store, records, cell)
            seconds = clock(store.base.device) - started
        with MemoryStore(place, device=cell.device, create=False) as store:
            stats = store.stats()
            return {
                "records": len(records),
                "refused": refused,
                "failed": failed,
                "written": stats.records,
                "answer_tokens": stats.answer_tokens,
                "ranks": stats.ranks,
                "adapters": stats.adapters,
                "parameters": stats.parameters,
                "min_prob": None if stats.min_prob is None else round(stats.min_prob, 4),
                "seconds": round(seconds, 3),
                **_ask(store, {record.key: record.value for record in records}, cell.seed),
                "base": conditions(store.base),
            }


def _write(store: "MemoryStore", records: Sequence[Record], cell: Cell) -> tuple[dict[str, str], list[str]]:
    """Write what the base model can express; returns what it cannot, with the reason, and what was not certified."""
    from loramem.training.settings import WriterSettings

    refused: dict[str, str] = {}
    while True:
        rest = [record for record in records if record.key not in refused]
        try:
            report = store.write(rest, goal=cell.goal, partial=True, settings=WriterSettings(seed=cell.seed))
        except RecordError as error:  # before anything changed, and for the first such record only
            assert error.key is not None
            refused[error.key] = type(error).__name__
        except StubbornRecords as error:  # none was certified
            return refused, list(error.keys)
        else:
            return refused, list(report.failed)


def _ask(store: "MemoryStore", values: Mapping[str, str], seed: int) -> Result:
    """What comes back for the stored keys and for near misses: routed, by the adapter alone, by the base alone."""
    from loramem.records.prompts import PromptTemplate
    from loramem.store.read import decode_batches

    template, stored = PromptTemplate(**store.manifest.prompt), list(store.records(None))
    tokenizer = store.base.tokenizer
    prompts = {tuple(template.stored_ids(tokenizer, record.key, record.prompt)) for record in stored}

    def unknown(key: str) -> bool:
        return key not in values and tuple(template.prompt_ids(tokenizer, key)) not in prompts

    rng = random.Random(seed)
    near = {record.key: near_miss(record.key, unknown, rng) for record in stored}
    batches = list(decode_batches(stored))
    base_alone: dict[str, str] = {}  # first, while no adapter is loaded
    for batch in batches:
        base_alone |= _decode(store, template, batch, near)
    recalled: dict[str, str] = {}
    unrouted: dict[str, str] = {}
    for batch in batches:
        store.load(batch[0].key)  # the adapter of the whole batch stays active
        recalled |= _decode(store, template, batch, {record.key: record.key for record in batch})
        unrouted |= _decode(store, template, batch, near)
    wrong = [
        {"key": key, "edit_distance": edit_distance(values[key], got), "first_wrong": first_wrong(values[key], got)}
        for key, got in recalled.items()
        if got != values[key]
    ]
    return {
        "exact": len(stored) - len(wrong),
        "wrong": wrong,
        "unknown": sum(_is_unknown(store, key) for key in near.values()),
        "unrouted": likeness(values, unrouted),
        "base_alone": likeness(values, base_alone),
    }


def _decode(
    store: "MemoryStore", template: "PromptTemplate", batch: Sequence["StoredRecord"], asked: Mapping[str, str]
) -> dict[str, str]:
    """What the model as it stands answers when asked for another key in place of each of a batch; unchecked."""
    from loramem.models.decoding import greedy_decode
    from loramem.records.prompts import decode_answer

    tokenizer = store.base.tokenizer
    prompts = [
        template.stored_ids(tokenizer, key, record.prompt if key == record.key else None)
        for key, record in ((asked[record.key], record) for record in batch)
    ]
    most = max(record.answer_tokens for record in batch) + 2  # the end token, and one beyond: it must have ended
    rows = greedy_decode(store.base.model, prompts, most, template.end_id)
    return {record.key: decode_answer(tokenizer, ids) for record, ids in zip(batch, rows, strict=True)}


def _is_unknown(store: "MemoryStore", key: str) -> bool:
    try:
        store.recall(key)
    except KeyNotFound:
        return True
    return False


def likeness(values: Mapping[str, str], answers: Mapping[str, str]) -> Result:
    """How near answers come to the values of their keys.

    Returns:
        ``leaked``: how many are the value; ``others``: how many are the value of another key; ``similarity``: the mean
        of 1 - edit distance / length of the longer text, None without answers.
    """
    everything = set(values.values())
    leaked = sum(answer == values[key] for key, answer in answers.items())
    return {
        "leaked": leaked,
        "others": sum(answer in everything for answer in answers.values()) - leaked,
        "similarity": round(mean(similarity(values[k], a) for k, a in answers.items()), 4) if answers else None,
    }


def near_miss(key: str, accept: Callable[[str], bool], rng: random.Random) -> str:
    """The key with one letter or digit replaced by another of its kind, at a random place.

    Args:
        accept: What else must hold; asked until it does.

    Raises:
        InputError: No such key is accepted.
    """
    places = [place for place, character in enumerate(key) if _kind(character)]
    for place in rng.sample(places, len(places)):
        others = [other for other in _kind(key[place]) if other != key[place]]
        for other in rng.sample(others, len(others)):
            if accept(near := key[:place] + other + key[place + 1 :]):
                return near
    raise InputError(f"No near miss of {key!r} is accepted.")


def _kind(character: str) -> str:
    """What may stand for a letter or digit; nothing for other characters."""
    if character in string.digits:
        return string.digits
    if character.isalpha():
        return string.ascii_uppercase if character.isupper() else string.ascii_lowercase
    return ""


def edit_distance(left: str, right: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions of a character from one text to the other."""
    above = list(range(len(right) + 1))
    for row, a in enumerate(left, start=1):
        here = [row]
        for column, b in enumerate(right):
            here.append(min(here[column] + 1, above[column + 1] + 1, above[column] + (a != b)))
        above = here
    return above[-1]


def similarity(left: str, right: str) -> float:
    """1 for equal texts, 0 for texts without a character in common."""
    return 1 - edit_distance(left, right) / max(len(left), len(right), 1)


def first_wrong(value: str, got: str) -> int | None:
    """Index of the first character that differs or is missing; None if nothing does."""
    return next((place for place, (a, b) in enumerate(zip_longest(value, got)) if a != b), None)


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per domain and seed; what was refused, not written or not exact is named below."""
    columns = (
        *("domain", "seed", "records", "refused", "written", "exact", "mean answer tokens", "rank", "adapters"),
        *("parameters", "lowest p", "seconds", "near misses unknown", "leak, unrouted", "similarity, unrouted"),
        *("leak, base alone", "similarity, base alone"),
    )
    rows = tuple(_row(line["cell"], line["result"]) for line in lines)
    notes = (
        _sums([line["result"] for line in lines]),
        "A near miss is a key with one letter or digit changed. Leak: the share of near misses that the adapter of the "
        "original key, attached by hand, answers with exactly the original's value. Similarity: the mean of 1 - edit "
        "distance / length of the longer text. Base alone: the same near misses without an adapter.",
        *(remark for line in lines for remark in _remarks(line["cell"], line["result"])),
    )
    return Table(columns, rows, notes)


def _row(cell: Mapping[str, Any], result: Result) -> tuple[str, ...]:
    written = result["written"]
    start = (cell["domain"], str(cell["seed"]), str(result["records"]), str(len(result["refused"])), str(written))
    if not written:
        return (*start, "0/0", *["-"] * 5, f"{result['seconds']:.1f}", *["-"] * 5)
    return (
        *start,
        f"{result['exact']}/{written}",
        f"{result['answer_tokens'] / written:.1f}",
        "–".join(str(rank) for rank in sorted({min(result["ranks"]), max(result["ranks"])})),
        str(result["adapters"]),
        f"{result['parameters']:,}",
        f"{result['min_prob']:.3f}",
        f"{result['seconds']:.1f}",
        f"{result['unknown']}/{written}",
        *(
            text
            for way in (result["unrouted"], result["base_alone"])
            for text in (f"{way['leaked'] / written:.0%}", f"{way['similarity']:.2f}")
        ),
    )


def _sums(results: Sequence[Result]) -> str:
    written, exact, unknown = (sum(result[name] for result in results) for name in ("written", "exact", "unknown"))
    leaked, others = (sum(result["unrouted"][name] for result in results) for name in ("leaked", "others"))
    return (
        f"{exact} of {written} written values exact; routed, {unknown} of {written} near misses are unknown keys; "
        f"unrouted, {leaked} give the original's value and {others} another record's."
    )


def _remarks(cell: Mapping[str, Any], result: Result) -> Iterator[str]:
    for key, reason in result["refused"].items():
        yield f"{cell['domain']}: {key!r} was refused ({reason})."
    for key in result["failed"]:
        yield f"{cell['domain']}: {key!r} could not be certified and was not written."
    for wrong in result["wrong"]:
        yield (
            f"{cell['domain']}: {wrong['key']!r} was not decoded exactly (edit distance {wrong['edit_distance']}, "
            f"first wrong character {wrong['first_wrong']})."
        )


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """The leak by domain, with the adapter attached by hand and without one."""
    written = [line for line in lines if line["result"]["written"]]
    names = tuple(dict.fromkeys(line["cell"]["domain"] for line in written))
    if not names:
        return ()

    def series(name: str, way: str) -> Series:
        shares = {domain: list[float]() for domain in names}
        for line in written:
            shares[line["cell"]["domain"]].append(100 * line["result"][way]["leaked"] / line["result"]["written"])
        return Series(name, tuple(point(names.index(domain), values) for domain, values in shares.items()))

    return (
        Plot(
            name="leak",
            title="Values given away by keys that are one character off",
            kind="bar",
            x=Axis("domain"),
            y=Axis("near misses answered with the original's value, %"),
            series=(series("adapter attached by hand", "unrouted"), series("base alone", "base_alone")),
            names=names,
            note="A store gives none of them: to its index they are unknown keys. Of several seeds: median and range.",
        ),
    )
