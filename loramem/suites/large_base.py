"""Writing on a base of Qwen3-8B's shape with random weights: records per second, memory and arithmetic of the engine.

Random weights know no language, but cost what trained ones cost. The head is scaled until p = 0.9 is within reach.
Meant for a CUDA device; ``--quick`` runs a base of two small layers anywhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem.generators import generate
from loramem.suites.figures import Plot
from loramem.suites.runner import Known, Request, Result, Table

if TYPE_CHECKING:
    from loramem.base_model import BaseModel

OPTIONS = ("records",)
SHAPE = {  # the published configuration of Qwen3-8B
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
}
SMALL_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}


RANK = 16


@dataclass(frozen=True)
class Cell:
    """One shard of phone-book records on a random base."""

    records: int
    seed: int
    device: str
    quick: bool

    @property
    def identity(self) -> Mapping[str, Any]:
        return asdict(self)

    @property
    def title(self) -> str:
        return f"{self.records} records, seed {self.seed}, {'small' if self.quick else 'Qwen3-8B'} shape"


def cells(request: Request, _: Known) -> Iterator[Cell]:
    """One write per number of records and seed."""
    for records in request.records or ((5,) if request.quick else (100, 200)):
        for seed in range(request.seeds or 1):
            yield Cell(records, seed, request.device, request.quick)


def run(cell: Cell) -> Result:
    """Train, save, reload and prove one shard; building the base apart."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from loramem.adapters import AdaptedModel
    from loramem.batches import token_losses
    from loramem.placement import Placement
    from loramem.prompts import encode_records
    from loramem.settings import WriterSettings
    from loramem.shards import ShardJob, write_shard
    from loramem.suites.timing import clock, conditions, warm_up
    from loramem.trunk import Trunk
    from loramem.writer import BATCH_RECORDS, autocast_dtype

    base = random_base(SMALL_SHAPE if cell.quick else SHAPE, cell.device)
    records = encode_records(
        generate("phonebook", cell.records, cell.seed), base.tokenizer, base.template, base.max_tokens
    )
    warm_up(base)
    placement, settings, adapted = Placement.default(base.model), WriterSettings(seed=cell.seed), AdaptedModel(base)
    with TemporaryDirectory() as scratch:
        job = ShardJob(
            location=base.location,
            base_id=base.id,
            revision=None,
            device=str(base.device),
            dtype=base.dtype,
            fingerprint=base.fingerprint,
            serve=(),
            records=tuple(records),
            rank=RANK,
            placement=placement,
            settings=settings,
            staging=Path(scratch),
        )
        started = clock(base.device)
        result = write_shard(job, adapted)
        seconds = clock(base.device) - started
        (shard,) = result.shards
        adapted.load(shard.adapter, job.folder / shard.adapter)

        # The arithmetic of one training step, counted, times the steps taken.
        adapted.create("counted", RANK, placement, 0)
        batch = list(range(min(BATCH_RECORDS, len(records))))
        trunk = Trunk(base.model, records, min(placement.layers))
        cast = autocast_dtype("auto", base.device)
        with FlopCounterMode(display=False) as counter:
            tensors = trunk.batch(batch)
            with torch.autocast(base.device.type, cast, enabled=cast is not None):
                logits = trunk.logits(batch, tensors)
            token_losses(logits, tensors).sum().backward()
        step_flops = counter.get_total_flops()
    return {
        "seconds": round(seconds, 3),
        "training_s": round(shard.training.elapsed_s, 3),
        "records": cell.records,
        "exact": len(shard.indices),
        "steps": shard.training.steps,
        "visits_per_record": round(shard.training.visits / cell.records, 2),
        "rank": shard.training.rank,
        "parameters": shard.training.parameters,
        "min_prob": round(shard.proof.min_prob, 4),
        "trunk_mb": round(trunk.bytes / 2**20, 1),
        "step_tflop": step_flops / 1e12,
        "training_tflop_per_s": round(step_flops * shard.training.steps / shard.training.elapsed_s / 1e12, 2),
        "base": conditions(base),
    }


def random_base(shape: Mapping[str, Any], device: str) -> "BaseModel":
    """A random Qwen3 with loramem-tiny's tokenizer and prompt, in bfloat16 on CUDA and float32 elsewhere."""
    from dataclasses import replace

    import torch
    from transformers import GenerationConfig, Qwen3Config
    from transformers.models.auto import AutoModelForCausalLM

    from loramem.base_model import load_base_model

    tiny = load_base_model(device=device)
    config = Qwen3Config(**shape, max_position_embeddings=2048, eos_token_id=tiny.template.end_id)
    torch.manual_seed(0)
    with torch.device(tiny.device):
        model = AutoModelForCausalLM.from_config(config, dtype=tiny.model.dtype)
    head = model.get_output_embeddings().weight
    torch.nn.init.normal_(head, std=(math.log(config.vocab_size) + 12) / config.hidden_size)
    model.eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    return replace(tiny, id="random-qwen3", model=model, unreachable=frozenset())


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A row per write."""
    columns = (
        *("records", "seed", "seconds", "training s", "records/s", "steps", "visits/record", "rank", "exact"),
        *("lowest p", "training TFLOP/s", "peak device MB", "peak MB"),
    )
    rows = []
    for line in lines:
        result = line["result"]
        rows.append(
            (
                str(result["records"]),
                str(line["cell"]["seed"]),
                f"{result['seconds']:.2f}",
                f"{result['training_s']:.2f}",
                f"{result['records'] / result['seconds']:.1f}",
                str(result["steps"]),
                f"{result['visits_per_record']:.1f}",
                str(result["rank"]),
                f"{result['exact']}/{result['records']}",
                f"{result['min_prob']:.3f}",
                f"{result['training_tflop_per_s']:.3g}",
                f"{result['peak_device_memory_mb']:,.0f}" if "peak_device_memory_mb" in result else "-",
                f"{result['peak_memory_mb']:,.0f}",
            )
        )
    return Table(columns, tuple(rows))


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """None: a few writes of one or two sizes are read off the table."""
    return ()
