"""What a record costs by how many share its adapter: the measurement behind `loramem.models.shard_sizes.FILL`.

    OMP_NUM_THREADS=1 python tests/benchmarks/shard_size.py [MODEL] --records 400 --fill 1.5,3,4.6 [--one-adapter]

Every line is a whole write of phone numbers into a new store, from planning to commit, in CPU seconds of one thread;
the base model was loaded and warmed up by a small write before.
"""

import argparse
import tempfile
import time

import torch

from loramem import MemoryStore
from loramem.models import shard_sizes
from loramem.planning.samples import generate

COLUMNS = (
    *("records", "seed", "fill", "adapters", "rank", "modules", "parameters", "steps"),
    *("CPU ms/record", "lowest p"),
)


def measure(model: str | None, records: int, seed: int, fill: float, goal: str, one_adapter: bool) -> tuple[str, ...]:
    """One write, with its certificate in every dtype of a new store."""
    shard_sizes.FILL = fill
    with tempfile.TemporaryDirectory() as folder, MemoryStore(f"{folder}/store", model) as store:
        store.write([(f"warm {i}", str(i)) for i in range(2)], namespace="warm")
        started = time.process_time()
        report = store.write(generate("phonebook", records, seed), goal=goal, one_adapter=one_adapter)
        seconds = time.process_time() - started
        held = [adapter for adapter in store.adapters() if adapter.namespace == ""]
        modules = sorted({" ".join(adapter.placement["modules"]) for adapter in held})
    return (
        *(str(records), str(seed), "all in one" if one_adapter else f"{fill:g}", str(len(held)), str(report.rank)),
        *(", ".join(modules), f"{report.parameters:,}", str(report.steps)),
        *(f"{1000 * seconds / records:.1f}", f"{report.min_prob:.3f}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--records", default="100,400")
    parser.add_argument("--fill", default=f"{shard_sizes.FILL:g}")
    parser.add_argument("--goal", choices=["fast", "small"], default="fast")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--one-adapter", action="store_true")
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for records in map(int, asked.records.split(",")):
        for fill in map(float, asked.fill.split(",")):
            for seed in range(asked.seeds):
                cells = measure(asked.model, records, seed, fill, asked.goal, asked.one_adapter)
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
