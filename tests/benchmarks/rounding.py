"""How far bfloat16 moves features in three ways of decoding, of keys that differ in digits, and a write of them.

python -m tests.benchmarks.rounding DIR
"""

import argparse
import random
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from loramem import MemoryStore
from loramem.models.base_model import load_base_model
from loramem.models.certificate import free_running
from loramem.models.features import Features, collect, collect_decoding
from loramem.records.prompts import encode_records
from loramem.records.record import as_records


def near_keys(count: int, seed: int = 0) -> dict[str, str]:
    """Numbers of ten digits under names whose digits alone differ."""
    rng = random.Random(seed)
    return {f"Name{i} Sur{rng.randrange(10**6)}": "".join(rng.choices("0123456789", k=10)) for i in range(count)}


def attended(features: Features) -> Tensor:
    """(N, d) in float32: what the last MLP is added to."""
    return (features.entering + features.attended).float()


def rounding(model: str, values: dict[str, str]) -> None:
    """Print how far each way is from float32, by the distance of that from its mean, and how they agree."""
    exact, half = load_base_model(model, dtype="float32"), load_base_model(model, dtype="bfloat16")
    records = encode_records(as_records(values), exact.tokenizer, exact.template, exact.max_tokens)
    whole, one_pass = collect(exact.model, records), collect(half.model, records)
    plain = attended(whole)
    alone = [[index] for index in range(len(records))]
    ways = {
        "one pass": one_pass,
        "decoded in a batch": collect_decoding(half.model, records, one_pass, free_running(records)),
        "decoded alone": collect_decoding(half.model, records, one_pass, alone),
    }
    moved = {way: attended(features) - plain for way, features in ways.items()}
    size = (plain - plain.mean(0)).norm(dim=1)
    for way, by in moved.items():
        print(f"{way}: moved by {(by.norm(dim=1) / size).mean():.3f} of the distance from the mean")
    for (first, one), (second, other) in combinations(moved.items(), 2):
        print(f"{first}, {second}: cosine {cosine_similarity(one, other, dim=1).mean():.2f}")
    apart = torch.cdist(plain, plain).masked_fill(whole.targets[:, None] == whole.targets, torch.inf).amin(1)
    print(f"nearest with another target: at least {(apart / moved['one pass'].norm(dim=1)).min():.2f} times as far")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--records", type=int, default=100)
    asked = parser.parse_args()
    values = near_keys(asked.records)
    rounding(asked.model, values)
    with TemporaryDirectory() as scratch, MemoryStore(Path(scratch) / "memory", asked.model) as store:
        report = store.write(values)
    print(
        f"{report.written} written in {report.elapsed_s:.0f} s, rank {report.rank}, {report.steps} steps, lowest p "
        f"{report.min_prob:.3f}, {report.served}"
    )


if __name__ == "__main__":
    main()
