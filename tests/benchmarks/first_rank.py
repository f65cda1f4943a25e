"""The first rank of a write: what rules choose, beside the least rank that certifies every token.

A job is a number of records of one kind, cut into shards as a write cuts them. At each rank of `LADDER`, from its
middle downwards until one fails (upwards where the first one does), every shard is trained as a first try trains it:
over features in float32 and bfloat16, at a rank that neither grows nor climbs. Certified is what that training ends
with, every token over the whole vocabulary in both dtypes; nothing is decoded here. A trial that takes more of the
processor's time than the cap has failed.

Rules are asked afterwards, so that all are judged by the same trials; what they choose is rounded up to the ladder.
Where a job has several shards, the highest rank counts for all.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loramem.planning.samples import KINDS, generate
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    from loramem.models.adapters import AdaptedModel
    from loramem.models.features import Features
    from loramem.models.placement import Placement

OPTIONS = ("records", "model")
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MIDDLE = 64
SIZES = (25, 100, 400)
CAP_S = 120.0
"""Of the processor's time, for one trial."""


@dataclass(frozen=True)
class Cell:
    """A job at all ranks."""

    kind: str
    records: int
    seed: int
    model: str
    device: str
    ladder: tuple[int, ...] = LADDER
    cap_s: float = CAP_S

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        return f"{public_name(self.model)}, {self.records} of {self.kind}, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """Every kind at every size. Seed 0 is that of calibration samples, and left out."""
    for size in request.records or ((2,) if request.quick else SIZES):
        for kind in ("phonebook",) if request.quick else KINDS:
            for seed in range(1, 1 + (request.seeds or 1)):
                ladder = (2, 8) if request.quick else LADDER
                yield Cell(kind, size, seed, request.model, request.device, ladder)


def run(cell: Cell) -> Result:
    """Train the job at one rank after the other."""
    from loramem.models.adapters import AdaptedModel
    from loramem.models.base_model import load_base_model
    from loramem.models.shard_sizes import cut
    from loramem.records.prompts import encode_records
    from loramem.suites.timing import conditions
    from loramem.training.shard_training import features_of

    plain = AdaptedModel(load_base_model(cell.model, device=cell.device, dtype="float32"))
    served = AdaptedModel(load_base_model(cell.model, device=cell.device, dtype="bfloat16"), adapter_dtype="bfloat16")
    base, placement = plain.base, plain.ladder[0]
    records = encode_records(
        generate(cell.kind, cell.records, cell.seed),
        *(base.tokenizer, base.template, base.max_tokens, base.unreachable, base.vocabulary),
    )
    size = placement.size(plain.model)
    parts = [records[first:last] for first, last in cut([len(one.answer_ids) for one in records], size.shard_tokens())]
    jobs: list[tuple[int, list[Features]]] = []
    shards = list[Result]()
    for part in parts:
        features = features_of([plain, served], part, placement)
        assert features is not None
        jobs.append((len(part), features))
        shards.append(_facts(plain, [one.answer_ids for one in part], features[0]))
    trials = list[Result]()
    for rank in [rank for rank in reversed(cell.ladder) if rank <= MIDDLE]:
        trials.append(_trial(plain, jobs, rank, placement, cell))
        if not trials[-1]["certified"]:
            break
    higher = [rank for rank in cell.ladder if rank > MIDDLE]
    while higher and not any(trial["certified"] for trial in trials):
        trials.append(_trial(plain, jobs, higher.pop(0), placement, cell))
    return {
        "shards": shards,
        "trials": trials,
        "modules": placement.modules,
        "layers": placement.layers,
        "parameters_per_rank": size.parameters_per_rank,
        "matrices": size.matrices,
        "base": conditions(base),
    }


class _Stopped(Exception):
    """The trial has used its seconds."""


def _facts(plain: "AdaptedModel", values: Sequence[Sequence[int]], features: "Features") -> Result:
    """What rules may know of a shard: its price, and how many different tokens are asked for, all and those that the
    base does not order."""
    import torch

    from loramem.models.ending import Ending
    from loramem.planning.cost import costs_bits
    from loramem.planning.variety import effective_vocabulary

    with plain.disabled():
        losses, _ = Ending(plain.model, features).scores()
    each = [part[:-1] for part in losses.split([len(value) for value in values])]
    costs = costs_bits([value[:-1] for value in values], [torch.exp(-part).tolist() for part in each])
    return {
        "length": sum(map(len, values)) - len(values),
        "tokens": sum(map(len, values)),
        "vocabulary": effective_vocabulary(features.targets.tolist()),
        "distinct": len(features.targets.unique()),
        "distinct_unordered": len(features.targets[losses > math.log(2)].unique()),
        "unordered": int((losses > math.log(2)).sum()),
        "cost_bits": round(sum(costs), 1),
        "base_loss": float(torch.cat(each).mean()),
    }


def _trial(
    plain: "AdaptedModel", jobs: "Sequence[tuple[int, list[Features]]]", rank: int, placement: "Placement", cell: Cell
) -> Result:
    """All shards at one rank, until one fails."""
    import torch

    from loramem.training.feature_writer import train_on_features
    from loramem.training.progress import WriteProgress
    from loramem.training.settings import WriterSettings
    from loramem.training.shards import CAUTION

    settings, begun, steps, certified = WriterSettings(seed=cell.seed, max_rank=rank), time.process_time(), 0, 0

    def watch(_: WriteProgress) -> None:
        if time.process_time() - begun > cell.cap_s:
            raise _Stopped

    stopped = False
    for records, features in jobs:
        try:
            training = train_on_features(
                *(plain, "trial", [each.to(plain.model.dtype) for each in features], records, rank, placement),
                *(settings, watch),
                adapter_dtypes=(torch.float32, torch.bfloat16),
                caution=CAUTION[0],
            )
        except _Stopped:
            stopped = True
            break
        finally:
            plain.remove("trial")
        steps += training.steps
        if training.stubborn:
            break
        certified += 1
    return {
        "rank": rank,
        "certified": certified == len(jobs),
        "shards_certified": certified,
        "stopped": stopped,
        "steps": steps,
        "cpu_s": round(time.process_time() - begun, 2),
    }


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per rule and base model; below, what each job takes."""
    from .first_rank_rules import choose, rules

    columns = ("rule", "base", "jobs", "certified at the first try", "times the least rank", "most", "CPU s a job")
    done = [line for line in lines if any(trial["certified"] for trial in line["result"]["trials"])]
    rows = list[tuple[str, ...]]()
    for name, rule in rules(done).items():
        for model in dict.fromkeys(line["cell"]["model"] for line in done):
            choices = [choose(line, rule) for line in done if line["cell"]["model"] == model]
            if known := [choice for choice in choices if choice is not None]:
                times = [choice.rank / choice.least for choice in known]
                certified = sum(choice.certified for choice in known)
                cpu_s = sum(choice.cpu_s for choice in known) / len(known)
                numbers = (f"{sum(times) / len(times):.2f}", f"{max(times):.1f}", f"{cpu_s:.1f}")
                rows.append((name, model, str(len(known)), f"{certified}/{len(known)}", *numbers))
    notes = (
        "Times the least rank: the chosen rank by the least that works, mean and most. CPU s: of training at the first "
        "rank; where that fails until it gives up.",
        *(_job(line) for line in done),
    )
    return Table(columns, tuple(rows), notes)


def _job(line: Mapping[str, Any]) -> str:
    cell, result = line["cell"], line["result"]
    trials = {trial["rank"]: trial for trial in result["trials"]}
    least = min(rank for rank, trial in trials.items() if trial["certified"])
    failed = [f"{rank}{' (stopped)' * trial['stopped']}" for rank, trial in trials.items() if rank < least]
    various = max(shard["vocabulary"] for shard in result["shards"])
    return (
        f"{cell['model']}, {cell['records']} of {cell['kind']}: {len(result['shards'])} shards, as various as "
        f"{various:.0f} tokens; least rank {least}, {trials[least]['cpu_s']:.1f} CPU s; failed: {', '.join(failed)}."
    )


def plots(_: Sequence[Mapping[str, Any]]) -> tuple[()]:
    """None: the table shows it better."""
    return ()


if __name__ == "__main__":
    from .command import command

    sys.exit(command("tests.benchmarks.first_rank", "first-rank.jsonl")())
