"""What is known of a base model: laws of its placements, success boundaries, and what kinds of data cost. No torch.

`summarise` makes it from calibration runs; a JSON file keeps it, so that planning fits nothing. The embedded base model
ships one; others come to lie in the user's cache when `loramem calibrate` ends.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from loramem import embedded
from loramem._util.cache import DAMAGED, JsonFile, cache_folder
from loramem.errors import BoundaryError, InputError, LawError
from loramem.models.shard_sizes import Size
from loramem.planning import law_fit, success, visits
from loramem.planning.law import MemoryLaw
from loramem.planning.limits import ANY_RANK, GoalName, RankLimits
from loramem.planning.plan import Plan, PlanInputs, Price, plan_write
from loramem.planning.runs import Run
from loramem.planning.success import SuccessBoundary
from loramem.planning.visits import Pace
from loramem.records.outcome import Outcome

FORMAT = 1
UNKNOWN = "unknown"
"""The kind of a store's own writes where no kind is calibrated to compare them with."""
SHIPPED = embedded.base_path().parent / "calibration.json"
Place = tuple[tuple[str, ...], tuple[int, ...]]  # modules, layers


@dataclass(frozen=True)
class Sample:
    """What ``length`` answer tokens of a kind are to the base model."""

    length: int
    base_loss: float
    """Nats per answer token."""
    cost_bits: float


@dataclass(frozen=True)
class KindSamples:
    """A kind of data at several lengths."""

    kind: str
    samples: tuple[Sample, ...]
    """By length, upwards."""

    def at(self, length: float) -> tuple[float, float]:
        """Base loss and cost in bits at a length, linear between the samples in ln ℓ (loss) and in ℓ (cost).

        Outside them the loss is that of the nearest, and the cost per token is that of the nearest too.
        """
        first, last = self.samples[0], self.samples[-1]
        if length <= first.length:
            return first.base_loss, first.cost_bits * length / first.length
        if length >= last.length:
            return last.base_loss, last.cost_bits * length / last.length
        low, high = next((a, b) for a, b in pairwise(self.samples) if a.length <= length <= b.length)
        share = math.log(length / low.length) / math.log(high.length / low.length)
        linear = (length - low.length) / (high.length - low.length)
        return (
            low.base_loss + share * (high.base_loss - low.base_loss),
            low.cost_bits + linear * (high.cost_bits - low.cost_bits),
        )


@dataclass(frozen=True)
class PlacedLaw:
    """The law of a kind of data at one placement."""

    kind: str
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    law: MemoryLaw

    @property
    def place(self) -> Place:
        return self.modules, self.layers


@dataclass(frozen=True)
class PlacedBoundary:
    """What writes at one placement came to."""

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    parameters_per_rank: int
    outcomes: tuple[Outcome, ...]
    boundary: SuccessBoundary | None
    """None while there are too few outcomes."""
    pace: Pace | None

    @property
    def place(self) -> Place:
        return self.modules, self.layers


@dataclass(frozen=True)
class Calibration:
    """All that is known of one base model."""

    base_model: str
    base_weights: str
    """First 12 hex digits of their hash."""
    context_tokens: int
    modules: tuple[str, ...]
    """Of the default placement, as `layers` and `parameters_per_rank`."""
    layers: tuple[int, ...]
    parameters_per_rank: int
    kinds: tuple[KindSamples, ...] = ()
    laws: tuple[PlacedLaw, ...] = ()
    boundaries: tuple[PlacedBoundary, ...] = ()
    above: tuple[Size, ...] = ()
    """Of the placements that hold more than the default one, upwards."""
    conditions: dict[str, Any] = field(default_factory=dict)
    """dtype, device, threads and torch of the runs, and how many there were."""

    @property
    def place(self) -> Place:
        """The default one."""
        return self.modules, self.layers

    def samples(self, kind: str) -> KindSamples | None:
        return next((entry for entry in self.kinds if entry.kind == kind), None)

    def law(self, kind: str, place: Place) -> MemoryLaw | None:
        return next((entry.law for entry in self.laws if (entry.kind, entry.place) == (kind, place)), None)

    def placed(self, place: Place) -> PlacedBoundary | None:
        return next((entry for entry in self.boundaries if entry.place == place), None)

    def save(self, path: Path) -> None:
        """Replace the file by it.

        Raises:
            OSError: It cannot be written.
        """
        JsonFile(path, dict).save({"format": FORMAT, **asdict(self)})


def summarise(bare: Calibration, runs: Iterable[Run]) -> Calibration:
    """What the runs of one base model say; a law or boundary that they do not determine is left out.

    Args:
        bare: The base model without kinds, laws and boundaries.
        runs: Of any base models.
    """
    runs = [run for run in runs if run.conditions["base_weights"] == bare.base_weights]
    kinds: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        kinds.setdefault(run.kind, {}).setdefault(run.length, []).append(run)
    laws = []
    for kind, place in sorted({(run.kind, (run.modules, run.layers)) for run in runs if run.for_law}):
        mine = [run.point for run in runs if run.for_law and (run.kind, run.modules, run.layers) == (kind, *place)]
        try:
            laws.append(PlacedLaw(kind, *place, law_fit.fit(mine)))
        except LawError:
            continue
    placed = []
    for place in sorted({(run.modules, run.layers) for run in runs}):
        here = [run for run in runs if (run.modules, run.layers) == place]
        placed.append(_placed(place, here[0].parameters // here[0].rank, [o for r in here for o in outcomes_of(r)]))
    fixed = {name: runs[-1].conditions[name] for name in ("dtype", "device", "threads", "torch")} if runs else {}
    return replace(
        bare,
        kinds=tuple(
            KindSamples(kind, tuple(_mean(length, members) for length, members in sorted(by_length.items())))
            for kind, by_length in sorted(kinds.items())
        ),
        laws=tuple(laws),
        boundaries=tuple(placed),
        conditions={**fixed, "runs": len(runs)},
    )


def _mean(length: int, runs: Sequence[Run]) -> Sample:
    return Sample(length, mean(run.base_loss for run in runs), mean(run.cost_bits for run in runs))


def plan_inputs(
    known: Calibration | None,
    place: Place,
    parameters_per_rank: int,
    kind: str | None = None,
    outcomes: Sequence[Outcome] = (),
    seconds_per_visit: float | None = None,
    above: Sequence[Size] = (),
) -> PlanInputs:
    """What a plan at a placement rests on.

    Args:
        kind: Whose law is asked, and whose writes say the pace, if there are any; all if None.
        outcomes: Of writes at this placement beside those that are known.
        above: Placements that hold more, upwards.
    """
    placed = known.placed(place) if known else None
    placed = placed or PlacedBoundary(*place, parameters_per_rank, (), None, None)
    if outcomes:
        placed = _placed(place, parameters_per_rank, [*placed.outcomes, *outcomes])
    modules, layers = place
    alike = visits.fit([outcome for outcome in placed.outcomes if outcome.kind == kind])
    return PlanInputs(
        parameters_per_rank,
        2 * len(modules) * len(layers),
        placed.boundary,
        known.law(kind, place) if known and kind else None,
        kind,
        alike or placed.pace,
        seconds_per_visit,
        tuple(above),
    )


def plan_length(
    samples: KindSamples,
    inputs: PlanInputs,
    length: int,
    records: int,
    *,
    goal: GoalName = "fast",
    rank: int | None = None,
    limits: RankLimits = ANY_RANK,
    one_adapter: bool = False,
) -> Plan:
    """The plan for so many records with so many answer tokens together, of a kind whose cost is known.

    Raises:
        ArgumentError: See `check_request`.
        DoesNotFit: See `plan_write`.
    """
    lengths = [length // records + (index < length % records) for index in range(records)]

    def price(first: int, last: int) -> Price:
        base_loss, cost_bits = samples.at(sum(lengths[first:last]))
        return Price(cost_bits, base_loss)

    return plan_write(lengths, price, inputs, goal=goal, rank=rank, limits=limits, one_adapter=one_adapter)


def nearest_kind(known: Calibration, cost_bits: float, length: int) -> str | None:
    """The kind whose tokens cost most nearly as much; None where no kind is known."""

    def distance(entry: KindSamples) -> float:
        return abs(math.log(max(entry.at(length)[1], 1.0) / max(cost_bits, 1.0)))

    nearest = min(known.kinds, key=distance, default=None)
    return nearest.kind if nearest else None


def outcomes_of(run: Run) -> list[Outcome]:
    """The outcome that a run is for the success boundary, if its outcome says what a write would have come to.

    A run of the law through the network that was not certified says nothing: 400 phone numbers at rank 2 of the last
    two layers stayed at the entropy of a random digit with plain cross-entropy at its rate, and a write certifies
    them. Over features such runs converge; whether a write certifies what they do not was not measured.
    """
    if run.for_law and not run.certified and not run.over_features:
        return []
    visits = None if run.for_law else run.visits / run.records
    return [Outcome(run.kind, run.rank, run.length, run.parameters, run.cost_bits, run.certified, visits)]


def _placed(place: Place, parameters_per_rank: int, outcomes: Sequence[Outcome]) -> PlacedBoundary:
    try:
        fitted = success.fit(outcomes)
    except BoundaryError:
        fitted = None
    return PlacedBoundary(*place, parameters_per_rank, tuple(outcomes), fitted, visits.fit(outcomes))


def cached(base_weights: str) -> Path:
    """Where `loramem calibrate` leaves what it learnt of a base model."""
    return cache_folder() / f"calibration-{base_weights}.json"


def load(base_weights: str | None = None) -> Calibration | None:
    """What is known of a base model: from the user's cache, else as shipped; None if nothing is.

    Args:
        base_weights: First 12 hex digits of the weights' hash; the embedded base model unless given.

    Raises:
        InputError: A file is there and damaged.
    """
    shipped = _read(SHIPPED) if SHIPPED.exists() else None
    wanted = base_weights or (shipped.base_weights if shipped else None)
    if wanted and (own := cached(wanted)).exists():
        return _read(own)
    return shipped if shipped and shipped.base_weights == wanted else None


def _read(path: Path) -> Calibration:
    try:
        fields = JsonFile(path, dict).load()
        if (found := fields.pop("format")) == FORMAT:
            return _calibration(fields)
    except DAMAGED as error:  # hours of runs: said, not passed over as a cache would be
        raise InputError(f"{path} is not a calibration ({error!r}). Delete it and run loramem calibrate.") from None
    raise InputError(f"{path} has format {found}, this version of loramem reads {FORMAT}. Calibrate again.")


def _calibration(fields: dict[str, Any]) -> Calibration:
    fields["kinds"] = tuple(
        KindSamples(entry["kind"], tuple(Sample(**sample) for sample in entry["samples"])) for entry in fields["kinds"]
    )
    fields["laws"] = tuple(
        PlacedLaw(entry["kind"], *_place(entry), MemoryLaw.from_json(json.dumps(entry["law"])))
        for entry in fields["laws"]
    )
    fields["boundaries"] = tuple(map(_boundary, fields["boundaries"]))
    fields["above"] = tuple(Size(**size) for size in fields.get("above", ()))  # older files have none
    fields["modules"], fields["layers"] = _place(fields)
    return Calibration(**fields)


def _place(entry: dict[str, Any]) -> Place:
    return tuple(entry["modules"]), tuple(entry["layers"])


def _boundary(entry: dict[str, Any]) -> PlacedBoundary:
    fitted, found = entry["boundary"], entry["pace"]
    return PlacedBoundary(
        *_place(entry),
        entry["parameters_per_rank"],
        tuple(Outcome(**outcome) for outcome in entry["outcomes"]),
        SuccessBoundary.from_json(json.dumps(fitted)) if fitted else None,
        Pace(**found) if found else None,
    )
