"""One recall and a batch of 64 against one plain ``generate``, the adapter loaded already, in turns on one store.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.warm_recall [MODEL]

Plain is what a user of transformers calls: the prompt's ids as a batch of one, the adapter active, greedy, until the
end token. Times are of the processor (all threads together) and of the clock; medians of the turns.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from loramem import MemoryStore
from loramem.planning.samples import generate
from loramem.suites.timing import clock, warm_up

BATCH = 64


def compare(store: MemoryStore, turns: int) -> None:
    """Print what the store's records take in each way; every value is compared with what was written."""
    written = {record.key: record.value for record in generate("phonebook", BATCH, 0)}
    report = store.write(written, one_adapter=True)
    warm_up(store.base)
    keys, end = list(written), store.base.template.end_id
    taken: dict[str, list[tuple[float, float]]] = {}

    def timed(way: str, call: Callable[[], object]) -> None:
        cpu, started = time.process_time(), clock(store.base.device)
        call()
        taken.setdefault(way, []).append((time.process_time() - cpu, clock(store.base.device) - started))

    def plain(key: str) -> None:
        model, prompt = store.load(key)
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=store.base.device)
            timed(
                "plain generate",
                lambda: model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=32,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=end,
                ),
            )

    def one(key: str) -> None:
        assert store.recall(key) == written[key]

    def many() -> None:
        assert {recall.key: recall.value for recall in store.recall_many(keys)} == written

    for turn in range(turns + 1):
        if turn == 1:  # the first is a warm-up
            taken.clear()
        for key in keys[turn % 8 :: 8]:
            plain(key)
            timed("recall", lambda key=key: one(key))  # type: ignore[misc]
        timed(f"recall_many of {BATCH}", many)
    prompt = len(store.load(keys[0])[1])
    print(f"{store.base.id} {store.base.dtype}, rank {report.rank}, prompt {prompt} tokens, {turns} turns")
    cpu_plain, wall_plain = (median(column) for column in zip(*taken["plain generate"], strict=True))
    for way, times in taken.items():
        cpu, wall = (median(column) for column in zip(*times, strict=True))
        records = BATCH if "many" in way else 1
        print(
            f"{way}: {1000 * cpu / records:.1f} ms of the processor, {1000 * wall / records:.1f} ms a record; one "
            f"plain generate is {cpu_plain * records / cpu:.2f} and {wall_plain * records / wall:.2f} times that"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder, MemoryStore(Path(folder) / "memory", asked.model) as store:
        compare(store, asked.turns)


if __name__ == "__main__":
    main()
