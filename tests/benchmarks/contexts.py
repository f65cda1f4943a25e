"""Values given in chats: trained ones and others, by adapters that were written with and without the trained ones.

python -m tests.benchmarks.contexts [MODEL] [--records 40] [--chats 0 3] [--routed] [--out docs/results/contexts.jsonl]
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loramem import MemoryStore
from loramem.models.decoding import greedy_decode
from loramem.planning.samples import generate
from loramem.records.contexts import Context, prompts_in
from loramem.records.record import Record
from loramem.training.neutral_text import other_contexts
from loramem.training.settings import KeepBase

TURNS = (
    ("user", "Good morning. I need some numbers."),
    ("assistant", "Good morning. Of course: whose number do you need?"),
)
TRAINED: tuple[Context, ...] = (
    (("system", "You are the directory of ACME Ltd. Answer with the number alone."),),
    (("system", "You are the front desk of a school."), *TURNS),
    TURNS,
    (("system", "You know the phone numbers of our customers."),),
    (("system", "Answer briefly."), ("user", "Hi"), ("assistant", "Hi! How can I help?")),
    (
        (
            "system",
            "You are a switchboard operator. You give phone numbers to callers, and nothing else.",
        ),
    ),
)


CELL = ("model", "records", "chats", "keep_base")


def given(store: MemoryStore, records: Sequence[Record], context: Context) -> int:
    """How many values come back in a chat, from the adapter as saved, active for everything."""
    model, _ = store.load(records[0].key)
    tokenizer, end = store.base.tokenizer, store.base.template.end_id
    rows = greedy_decode(model, prompts_in(tokenizer, context, [record.key for record in records]), 16, end)
    return sum(tokenizer.decode(row) == record.value for row, record in zip(rows, records, strict=True))


def written(
    model: str, records: Sequence[Record], contexts: Sequence[Context], keep: KeepBase | None
) -> Mapping[str, Any]:
    """One write, and what its adapter gives."""
    chats = [[{"role": role, "content": text} for role, text in context] for context in contexts]
    with TemporaryDirectory() as scratch, MemoryStore(Path(scratch) / "memory", model) as store:
        _ = store.base
        started = time.process_time()
        report = store.write(records, contexts=chats, keep_base=keep, one_adapter=True)
        seconds = time.process_time() - started
        trained = [given(store, records, context) for context in contexts]
        untrained = [given(store, records, context) for context in TRAINED if context not in contexts]
        other = [given(store, records, context) for context in other_contexts()]
        return {
            "model": Path(model).name,
            "records": len(records),
            "chats": len(contexts),
            "keep_base": keep is not None,
            "unknown_keys": None if keep is None else keep.unknown_keys,
            "alone": given(store, records, ()),
            "in_trained_chats": trained,
            "in_untrained_chats": untrained,
            "in_other_chats": other,
            "rank": report.rank,
            "steps": report.steps,
            "min_prob": report.min_prob,
            "served": dict(report.served),
            "cpu_s": round(seconds, 1),
            "kept": [asdict(kept) for kept in report.kept.values()],
        }


def known(out: Path | None) -> list[tuple[Any, ...]]:
    """Cells that the results file has."""
    lines = out.read_text().splitlines() if out is not None and out.exists() else []
    return [tuple(json.loads(line)[name] for name in CELL) for line in lines]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="loramem-tiny")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--chats", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--routed", action="store_true", help="Adapters that do not keep the base.")
    parser.add_argument("--unknown-keys", type=int, default=KeepBase().unknown_keys, help="See `KeepBase`.")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    records = generate("phonebook", asked.records, 0)
    for chats in asked.chats:
        if (Path(asked.model).name, asked.records, chats, not asked.routed) in known(asked.out):
            continue
        keep = None if asked.routed else KeepBase(unknown_keys=asked.unknown_keys)
        line = json.dumps(written(asked.model, records, TRAINED[:chats], keep))
        print(line)
        if asked.out is not None:
            with asked.out.open("a") as lines:
                lines.write(f"{line}\n")


if __name__ == "__main__":
    main()
