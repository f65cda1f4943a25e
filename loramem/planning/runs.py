"""Calibration runs as lines of a file: what was trained, and what came of it. No torch.

A file holds the runs of any base models, placements and kinds; the same run is never made twice.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramem import embedded
from loramem._util.cache import cache_folder
from loramem.errors import InputError
from loramem.planning.law import Point
from loramem.planning.law_fit import SATURATED
from loramem.training.settings import ObjectiveName

LAW_OBJECTIVE: ObjectiveName = "sft"
KINDS = ("phonebook", "text", "r20", "mixed", "r60", "r80", "random")
"""Of generated data; runs with data of one's own name the file."""
RANK_KIND = "random"
"""Whose law ranks are chosen by: see `loramem.planning.rank_law`."""
MIXTURES = KINDS[1:]
"""Long texts with more and more random tokens: the paper's r0 to r100."""


@dataclass(frozen=True)
class Run:
    """One converged run: a line of a calibration file."""

    kind: str
    rank: int
    length: int
    """Answer tokens of all records."""
    seed: int
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    records: int
    parameters: int
    bits: float
    """Σ max(0, −log2 p_base − 1) over the answer tokens, each record on its own."""
    cost_bits: float
    """Cost of the values, what they share paid once: see `loramem.planning.cost`."""
    base_loss: float
    """Nats per answer token, end tokens not counted; as every number here through all layers in the base's dtype."""
    final_loss: float
    ordered: float
    """Share of the answer tokens with p > 0.5."""
    certified: bool
    """Whether every answer and end token has p >= 0.6."""
    steps: int
    visits: int
    """Times a record was in a training batch, over all records."""
    training_s: float
    elapsed_s: float
    """Training and both looks at all probabilities."""
    conditions: dict[str, Any]
    """Base model, its weights' hash, dtype, device, threads, torch and how it was trained."""
    vocabulary: float | None = None
    """Effective, of answer and end tokens (`loramem.planning.variety`); None in runs of older versions."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Run":
        """The run that `dataclasses.asdict` and JSON made these fields of.

        Raises:
            TypeError, KeyError: They are not those of a run.
        """
        return cls(**{**fields, "modules": tuple(fields["modules"]), "layers": tuple(fields["layers"])})

    @property
    def identity(self) -> str:
        """What it was a run of; the same for one that would only repeat it."""
        return identity(self.kind, self.rank, self.length, self.seed, self.modules, self.layers, self.conditions)

    @property
    def point(self) -> Point:
        """What the law is fitted to."""
        return Point(self.rank, self.length, self.base_loss, self.final_loss)

    @property
    def saturated(self) -> bool:
        return self.final_loss < SATURATED

    @property
    def over_features(self) -> bool:
        """Whether it was trained behind the last attention alone."""
        return "feature_rate" in self.conditions

    @property
    def for_law(self) -> bool:
        """Whether it was trained as the law is about."""
        return bool(self.conditions["objective"] == LAW_OBJECTIVE)


def identity(*parts: object) -> str:
    """Kind, rank, length, seed, modules, layers and conditions of a run as one string."""
    return json.dumps(parts, sort_keys=True)


def default_file() -> Path:
    """Where calibration runs of any base model are kept: the user's cache."""
    return cache_folder() / "calibrations.jsonl"


def shipped_file() -> Path:
    """The runs that the calibration of the embedded base model rests on."""
    return embedded.base_path().parent / "calibration.jsonl"


def read_runs(path: Path) -> list[Run]:
    """The runs of a calibration file; none if there is no file. What an interrupt left of a line is left out.

    Raises:
        InputError: A whole line is not a run.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [_run(line, number, path) for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1)]


def append_run(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if whole and not whole.endswith("\n"):  # what an interrupt left
        path.write_text(whole[: whole.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(run)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _run(line: str, number: int, path: Path) -> Run:
    try:
        return Run.of(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Line {number} of {path} is not a calibration run ({error}).") from None


def place_name(run: Run) -> str:
    """Placement and base model of a run, for people."""
    return f"{', '.join(run.modules)} of layers {', '.join(map(str, run.layers))}, {run.conditions['base_model']}"


def by_kind(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    """The law's runs of each base model, placement and kind, under a name that says which."""
    groups: dict[str, list[Run]] = {}
    for run in (run for run in runs if run.for_law):
        groups.setdefault(f"{run.kind}, {place_name(run)}", []).append(run)
    yield from sorted(groups.items())
