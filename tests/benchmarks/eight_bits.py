"""How far llama.cpp's eight bits move features, and what that does to records, with and without training for it.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.eight_bits MODEL [--records 100] [--rank 16]

Features of a Q8_0 file of the base are simulated (`loramem.models.rounded_inputs`). An adapter is trained over float32
and bfloat16, another over three outcomes of rounding as well, and each is asked at outcomes that neither has seen, the
end of the model rounded like the rest.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from loramem.models.adapters import AdaptedModel
from loramem.models.base_model import load_base_model
from loramem.models.ending import Ending
from loramem.models.features import Features, collect
from loramem.models.rounded_inputs import in_eight_bits
from loramem.planning.samples import generate
from loramem.records.prompts import encode_records
from loramem.records.record import as_records
from loramem.training.feature_writer import train_on_features
from loramem.training.settings import WriterSettings
from loramem.training.shard_training import OUTCOMES, outcomes_of
from loramem.training.shards import CAUTION

UNSEEN = 3


def moved(name: str, by: Tensor, size: Tensor) -> None:
    print(f"{name}: moved by {(by.norm(dim=1) / size).mean():.3f} of the distance from the mean")


def asked(adapted: AdaptedModel, features: Features) -> str:
    """Records wrong at these features, and the lowest probability of any token."""
    with in_eight_bits(adapted.model, weights=True):
        losses, right = Ending(adapted.model, features, adapted.lora_layers("new")).scores()
    wrong = len(features.owners[~right].unique())
    return f"{wrong} wrong, lowest p {float(torch.exp(-losses.max())):.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args(arguments)
    exact = load_base_model(given.model, dtype="float32")
    values = as_records(generate("phonebook", given.records, 0))
    records = encode_records(values, exact.tokenizer, exact.template, exact.max_tokens)
    plain = collect(exact.model, records)
    half = collect(load_base_model(given.model, dtype="bfloat16").model, records).to(torch.float32)
    outcomes = outcomes_of(AdaptedModel(load_base_model(given.model, dtype="q8_0")), records, OUTCOMES + UNSEEN)
    size = (plain.entering - plain.entering.mean(0)).norm(dim=1)
    moved("bfloat16", half.entering - plain.entering, size)
    moved("eight bits", outcomes[0].entering - plain.entering, size)
    moved("one outcome from another", outcomes[0].entering - outcomes[1].entering, size)
    one, other = (each.entering - plain.entering for each in outcomes[:2])
    print(f"two outcomes: cosine {cosine_similarity(one, other, dim=1).mean():.2f}")
    for seen in (0, OUTCOMES):
        adapted, began = AdaptedModel(exact), time.process_time()
        trained = train_on_features(
            adapted,
            "new",
            [plain, half],
            len(records),
            given.rank,
            adapted.ladder[0],
            WriterSettings(),
            adapter_dtypes=[torch.float32, torch.bfloat16],
            caution=CAUTION[0],
            outcomes=outcomes[:seen],
        )
        print(
            f"trained over {seen} outcomes: rank {trained.rank}, {trained.steps} steps, "
            f"{time.process_time() - began:.1f} s of the processor; unseen outcomes: "
            f"{'; '.join(asked(adapted, each) for each in outcomes[OUTCOMES:])}"
        )
        adapted.remove("new")


if __name__ == "__main__":
    main()
