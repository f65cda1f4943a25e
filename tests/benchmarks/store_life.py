"""The life of a large store: growth in ten writes, updates, deletions, compaction, and what is left of erased values.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.store_life [MODEL] --records 10000

An erased value is asked for as a thief would who has the adapter that its neighbours were written anew into: among 99
fresh values of its form, ordered by how likely that adapter makes each for the erased key, its place must be any.
"""

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from scipy.stats import kstest

from loramem import MemoryStore, Record
from loramem._util.files import size_bytes
from loramem.models.decoding import answer_probabilities
from loramem.planning.samples import generate
from loramem.records.prompts import encode_record
from loramem.suites.runner import peak_memory_mb
from loramem.suites.timing import clock, warm_up

WRITES, ERASED, FRESH = 10, 100, 99


def live(store: MemoryStore, records: Sequence[Record], spare: Sequence[str], rng: random.Random) -> dict[str, str]:
    """Grow the store, update a tenth of its records, delete another and compact; returns the deleted ones."""

    def timed(what: str, started: float) -> None:
        disk_mb, memory_mb = size_bytes(store.path) / 2**20, peak_memory_mb()
        seconds = clock(store.base.device) - started
        print(f"{what}: {seconds:.2f} s, disk {disk_mb:.1f} MB, memory at the peak {memory_mb:,.0f} MB", flush=True)

    step = max(1, len(records) // WRITES)
    for first in range(0, len(records), step):
        started = clock(store.base.device)
        report = store.write(records[first : first + step])
        timed(f"{report.written:,} records written, {report.visits / report.written:.1f} visits each", started)
    held = {record.key: record.value for record in records}
    chosen = rng.sample(sorted(held), 2 * len(spare))
    fresh, deleted = dict(zip(chosen[: len(spare)], spare, strict=True)), chosen[len(spare) :]
    started = clock(store.base.device)
    store.write([Record(key, value) for key, value in fresh.items()], on_conflict="replace")
    timed(f"{len(fresh):,} updated", started)
    started = clock(store.base.device)
    store.delete(deleted)
    timed(f"{len(deleted):,} deleted", started)
    started = clock(store.base.device)
    store.compact(which="all")
    store.gc(grace_s=0)
    timed("all compacted", started)
    lost = {key: held.pop(key) for key in deleted}
    held |= fresh
    recalled = {recall.key: recall.value for recall in store.recall_many()}
    assert recalled == held and not any(key in store for key in deleted) and store.verify().ok
    print(f"{len(held):,} live records exact, none of the deleted ones known")
    return lost


def places(store: MemoryStore, records: Sequence[Record], erased: Mapping[str, str], fresh: Sequence[str]) -> list[int]:
    """The place, counted from 1, of each erased value among `FRESH` others in the adapter of its nearest neighbour."""
    keys, held, template = [record.key for record in records], set(store.keys()), store.manifest.template()
    found = []
    for number, (key, value) in enumerate(erased.items()):
        at = keys.index(key)
        neighbour = next(other for other in [*keys[at + 1 :], *reversed(keys[:at])] if other in held)
        model, _ = store.load(neighbour)
        values = value, *fresh[number * FRESH : (number + 1) * FRESH]
        encoded = [encode_record(Record(key, each), store.base.tokenizer, template) for each in values]
        scores = {index: float(probs.log().sum()) for index, probs in answer_probabilities(model, encoded)}
        found.append(1 + sum(scores[index] > scores[0] for index in range(1, len(encoded))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--records", type=int, default=10_000)
    asked, rng = parser.parse_args(), random.Random(0)
    drawn = generate("phonebook", asked.records + asked.records // 10, 0)
    records, spare = drawn[: asked.records], [record.value for record in drawn[asked.records :]]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    with tempfile.TemporaryDirectory() as folder, MemoryStore(Path(folder) / "memory", asked.model) as store:
        warm_up(store.base)
        lost = live(store, records, spare, rng)
        erased = rng.sample(sorted(lost), min(ERASED, len(lost)))
        others = [record.value for record in generate("phonebook", FRESH * len(erased), 1)]
        found = places(store, records, {key: lost[key] for key in erased}, others)
    # Places are whole numbers: a draw within each makes them continuous, as the test wants them.
    uniform = kstest([(place - rng.random()) / (FRESH + 1) for place in found], "uniform")
    middle, expected = sum(found) / len(found), (FRESH + 2) / 2
    print(f"places of {len(found)} erased values among {FRESH} fresh ones: mean {middle:.1f}, uniform {expected:.1f}")
    print(f"Kolmogorov-Smirnov against uniform: D = {uniform.statistic:.3f}, p = {uniform.pvalue:.2f}")


if __name__ == "__main__":
    main()
