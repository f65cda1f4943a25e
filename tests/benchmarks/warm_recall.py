"""One recall and a batch of 64 against one plain ``generate``, the adapter loaded already, in turns on one store.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.warm_recall [MODEL] [--also bfloat16]

Plain is what a user of transformers calls: the prompt's ids as a batch of one, the adapter active, greedy, until the
end token. Times are of the processor (all threads together) and of the clock; medians of the turns. With --also, the
batch in another dtype that the records are proved in as well, against the same plain generate. What a batch could come
to at best, its floating-point operations in products with weights over the fastest that this processor multiplies
large matrices, stands beside.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from torch import nn

from loramem import MemoryStore
from loramem.models.base_model import DTYPES
from loramem.models.dtypes import DTYPES as LOADED
from loramem.models.layers import linear_paths
from loramem.planning.samples import generate
from loramem.suites.timing import clock, warm_up

BATCH = 64


def compare(store: MemoryStore, written: dict[str, str], also: Sequence[MemoryStore], turns: int) -> None:
    """Print what the store's records take in each way; every value is compared with what was written.

    Args:
        also: The same store in other dtypes.
    """
    (adapter,) = store.adapters()
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

    def many(of: MemoryStore) -> None:
        assert {recall.key: recall.value for recall in of.recall_many(keys)} == written

    for turn in range(turns + 1):
        if turn == 1:  # the first is a warm-up
            taken.clear()
        for key in keys[turn % 8 :: 8]:
            plain(key)
            timed("recall", lambda key=key: one(key))  # type: ignore[misc]
        for each in (store, *also):
            timed(f"recall_many of {BATCH} in {each.base.dtype}", lambda each=each: many(each))  # type: ignore[misc]
    prompt = len(store.load(keys[0])[1])
    print(f"{store.base.id} {store.base.dtype}, rank {adapter.rank}, prompt {prompt} tokens, {turns} turns")
    cpu_plain, wall_plain = (median(column) for column in zip(*taken["plain generate"], strict=True))
    for way, times in taken.items():
        cpu, wall = (median(column) for column in zip(*times, strict=True))
        records = BATCH if "many" in way else 1
        print(
            f"{way}: {1000 * cpu / records:.1f} ms of the processor, {1000 * wall / records:.1f} ms a record; one "
            f"plain generate is {cpu_plain * records / cpu:.2f} and {wall_plain * records / wall:.2f} times that"
        )
    for each in (store, *also):
        work = operations(each, lambda each=each: many(each)) / BATCH  # type: ignore[misc]
        fastest = rate(DTYPES[each.base.dtype])
        print(
            f"{each.base.dtype}: {work / 1e9:.2f} GFLOP a record, {fastest / 1e9:.0f} GFLOP/s at most: no less than "
            f"{1000 * work / fastest:.1f} ms a record, no more than {cpu_plain * fastest / work:.1f} times as fast"
        )


def operations(store: MemoryStore, call: Callable[[], object]) -> float:
    """Floating-point operations of a call in products with the weights of the base."""
    counted = 0.0

    def count(module: nn.Linear, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * args[0].numel() * module.out_features

    with ExitStack() as hooks:
        for _, module in linear_paths(store.base.model):
            hooks.callback(module.register_forward_hook(count).remove)
        call()
    return counted


def rate(dtype: torch.dtype) -> float:
    """Operations per second of the processor in a product of large matrices, the best of ten."""
    left, right = torch.rand(1024, 2048, dtype=dtype), torch.rand(2048, 2048, dtype=dtype)
    taken = list[float]()
    for _ in range(10):
        started = time.process_time()
        _ = left @ right.T
        taken.append(time.process_time() - started)
    return 2 * 1024 * 2048 * 2048 / min(taken)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--also", nargs="*", choices=LOADED, default=[])
    asked = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    written = {record.key: record.value for record in generate("phonebook", BATCH, 0)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stores:
        place = Path(folder) / "memory"
        store = stores.enter_context(MemoryStore(place, asked.model))
        store.write(written, one_adapter=True)
        also = [stores.enter_context(MemoryStore(place, asked.model, dtype=dtype)) for dtype in asked.also]
        compare(store, written, also, asked.turns)


if __name__ == "__main__":
    main()
