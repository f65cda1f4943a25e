"""Writing on a large base, phase by phase: seconds and device memory of features, training, proof and a whole shard.

On random weights of Qwen3-8B's shape unless ``--model`` names a base: they know no language, but cost what trained ones
cost, and their head is scaled until p = 0.9 is within reach. Meant for a CUDA device, where `tests/device.sh` runs it;
``--quick`` runs a base of two small layers anywhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loramem import embedded
from loramem.planning.samples import generate
from loramem.suites.figures import Plot
from loramem.suites.runner import Known, Result, SuiteOptions, Table, public_name

if TYPE_CHECKING:
    import torch

    from loramem.models.adapters import AdaptedModel
    from loramem.models.base_model import BaseModel
    from loramem.models.placement import Placement
    from loramem.records.prompts import EncodedRecord
    from loramem.training.progress import WriteProgress
    from loramem.training.settings import WriterSettings

OPTIONS = ("records", "model")
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
SIZES, QUICK_SIZES = (100, 400, 3200), (5, 12)
WRITTEN, QUICK_WRITTEN = 1000, 10
"""Most records that are written; with more, features are collected and `STEPS` steps are taken over them."""
STEPS = 20
RANK = 16
PHASES = ("features", "training", "proof", "shard")


@dataclass(frozen=True)
class Cell:
    """One shard of phone-book records."""

    records: int
    seed: int
    model: str
    """What `load_base_model` takes; "loramem-tiny" stands for the random base, which has its tokenizer."""
    device: str
    quick: bool
    written: bool
    """Or only stepped over."""

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**asdict(self), "model": public_name(self.model)}

    @property
    def title(self) -> str:
        shape = "small shape" if self.quick else "Qwen3-8B's shape"
        base = shape if self.model == embedded.NAME else public_name(self.model)
        return f"{base}, {self.records} records, seed {self.seed}"


def cells(request: SuiteOptions, _: Known) -> Iterator[Cell]:
    """One shard per number of records and seed."""
    most = QUICK_WRITTEN if request.quick else WRITTEN
    for records in request.records or (QUICK_SIZES if request.quick else SIZES):
        for seed in range(request.seeds or 1):
            yield Cell(records, seed, request.model, request.device, request.quick, written=records <= most)


def run(cell: Cell) -> Result:
    """Collect features, train and prove in phases of their own; then all of it as a write does; the base apart."""
    import torch

    from loramem._util.files import write_directory
    from loramem.models.adapters import AdaptedModel, serialize
    from loramem.models.base_model import load_base_model
    from loramem.models.certificate import examine
    from loramem.models.features import PASS_RECORDS, PASS_TOKENS, collect
    from loramem.models.placement import Placement
    from loramem.records.prompts import encode_records
    from loramem.suites.timing import conditions, warm_up
    from loramem.training.feature_writer import TRAIN_ROWS, train_on_features
    from loramem.training.settings import WriterSettings

    if cell.model == embedded.NAME:
        base = random_base(SMALL_SHAPE if cell.quick else SHAPE, cell.device)
    else:
        base = load_base_model(cell.model, device=cell.device)
    records = encode_records(
        generate("phonebook", cell.records, cell.seed), base.tokenizer, base.template, base.max_tokens, base.unreachable
    )
    warm_up(base)
    placement, settings = Placement.ladder(base.model)[0], WriterSettings(seed=cell.seed)
    adapted, measured, told = AdaptedModel(base), _Measured(base.device), list["WriteProgress"]()

    def watch(progress: "WriteProgress") -> None:
        told.append(progress)
        if not cell.written and progress.step >= STEPS:
            raise _Enough

    with measured.phase("features"):
        features = collect(base.model, records)
    with measured.phase("training"), suppress(_Enough):
        train_on_features(adapted, "measured", [features], len(records), RANK, placement, settings, watch)
    sizes = {"features": [PASS_RECORDS, PASS_TOKENS], "training": min(TRAIN_ROWS, len(features))}
    result: Result = {
        "records": cell.records,
        "positions": len(features),
        "features_mb": round(sum(tensor.nbytes for tensor in vars(features).values()) / 2**20, 1),
        "steps": told[-1].step,
        "step_ms": round(1000 * (told[-1].elapsed_s - told[0].elapsed_s) / max(1, told[-1].step - told[0].step), 2),
        "rank": told[-1].rank,
        "parameters": sum(tensor.numel() for tensor in adapted.weights("measured").values()),
        "batches": sizes,
        "base": conditions(base),
        "torch": torch.__version__,
    }
    if cell.written:
        del features  # which a write collects anew
        with TemporaryDirectory() as scratch:
            with measured.phase("proof"):
                folder = Path(scratch) / "adapter"
                write_directory(folder, serialize(adapted.weights("measured"), base, placement))
                adapted.load("saved", folder)
                found = examine(adapted.model, records)
            result["batches"] |= {"proof": found.batch_sizes}
            result |= {"exact": len(records) - len(found.wrong), "min_prob": round(min(found.min_probs), 4)}
            adapted.remove("measured")
            adapted.remove("saved")
            with measured.phase("shard"):
                result |= _write_shard(adapted, records, placement, settings, Path(scratch))
    return {**result, **measured.numbers}


class _Enough(Exception):
    """So many steps tell what one takes."""


class _Measured:
    """Seconds of phases, and the most memory that was allocated on a CUDA device in each."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.numbers: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        from torch import cuda

        from loramem.suites.timing import clock

        on_cuda = self.device.type == "cuda"
        if on_cuda:
            cuda.reset_peak_memory_stats(self.device)
        started = clock(self.device)
        yield
        self.numbers[f"{name}_s"] = round(clock(self.device) - started, 3)
        if on_cuda:
            peak_mb = round(cuda.max_memory_allocated(self.device) / 2**20, 1)
            self.numbers[f"{name}_peak_mb"] = peak_mb
            self.numbers["peak_device_memory_mb"] = max(peak_mb, self.numbers.get("peak_device_memory_mb", 0.0))


def _write_shard(
    adapted: "AdaptedModel",
    records: "Sequence[EncodedRecord]",
    placement: "Placement",
    settings: "WriterSettings",
    folder: Path,
) -> Result:
    """How many records a write puts into adapters, and what it says where it gives up."""
    from loramem.errors import RecallError, StubbornRecords
    from loramem.training.jobs import JobBase, ShardJob
    from loramem.training.shards import write_shard

    job = ShardJob(
        base=JobBase.of(adapted.base),
        serve=(),
        records=tuple(records),
        rank=RANK,
        placement=placement,
        settings=settings,
    )
    try:
        shards = write_shard(job, folder, adapted).shards
    except (RecallError, StubbornRecords) as error:
        return {"written": 0, "refused": str(error)}
    where = [asdict(shard.placement) for shard in shards]  # further up the ladder, or through the network
    return {"written": sum(len(shard.indices) for shard in shards), "shard_placements": where}


def random_base(shape: Mapping[str, Any], device: str) -> "BaseModel":
    """A random Qwen3 with loramem-tiny's tokenizer and prompt, in bfloat16 on CUDA and float32 elsewhere.

    Its weights are drawn on the device, in the dtype that they stay in.
    """
    from dataclasses import replace

    import torch
    from transformers import GenerationConfig, Qwen3Config
    from transformers.models.auto import AutoModelForCausalLM

    from loramem.models.base_model import load_base_model

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
    """A row per shard."""
    rows = []
    for line in lines:
        result = line["result"]
        rows.append(
            (
                result["base"]["base_model"],
                f"{result['records']:,}",
                f"{result['positions']:,}",
                *(f"{result[f'{phase}_s']:.2f}" if f"{phase}_s" in result else "-" for phase in PHASES),
                str(result["steps"]),
                f"{result['step_ms']:.1f}",
                f"{result['parameters']:,}",
                f"{result['exact']}/{result['records']}" if "exact" in result else "-",
                f"{result['min_prob']:.3f}" if "min_prob" in result else "-",
                f"{result['written']}/{result['records']}" if "written" in result else "-",
                " / ".join(f"{result[f'{phase}_peak_mb']:,.0f}" for phase in PHASES if f"{phase}_peak_mb" in result)
                or "-",
                f"{result['peak_memory_mb']:,.0f}",
            )
        )
    columns = (
        *("base", "records", "positions", "features s", "training s", "proof s", "whole shard s", "steps", "ms/step"),
        *("parameters", "exact", "lowest p", "written", "device MB at the peak of each phase", "host MB"),
    )
    where = {(line["result"]["base"]["device"], line["result"]["base"]["dtype"]) for line in lines}
    notes = [f"Measured on {device}, in {dtype}." for device, dtype in sorted(where)]
    notes += [f"Not written, {line['result']['refused']}" for line in lines if "refused" in line["result"]]
    return Table(columns, tuple(rows), tuple(notes))


def plots(lines: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """None: a few writes of one or two sizes are read off the table."""
    return ()
