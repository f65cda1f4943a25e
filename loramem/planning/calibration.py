"""What is known of a base model: laws of its placements, success boundaries, and what kinds of data cost. No torch.

`summarise` makes it from calibration runs; a JSON file keeps it, so that planning fits nothing. The embedded base model
ships one; others come to lie in the user's cache when `loramem calibrate` ends.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from loramem import embedded
from loramem._util.cache import DAMAGED, JsonFile, cache_folder
from loramem.errors import BoundaryError, InputError, LawError
from loramem.models.shard_sizes import Size
from loramem.planning import law_fit, success, visits
from loramem.planning.law import MemoryLaw, Point
from loramem.planning.limits import ANY_RANK, GoalName, RankLimits
from loramem.planning.plan import Plan, PlanInputs, Price, plan_write
from loramem.planning.rank_law import KindSamples, RankLaw, Sample
from loramem.planning.runs import RANK_KIND, Run
from loramem.planning.success import SuccessBoundary, Trial, crowded
from loramem.planning.visits import Pace
from loramem.records.outcome import Outcome

FORMAT = 3
UNKNOWN = "unknown"
"""The kind of a store's own writes where no kind is calibrated to compare them with."""
SHIPPED = embedded.base_path().parent / "calibration.json"
Place = tuple[tuple[str, ...], tuple[int, ...]]  # modules, layers


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
    law: RankLaw | None
    """What ranks are chosen by; None where the runs give no law of random tokens."""
    boundary: SuccessBoundary | None
    """None without a law, or while there are too few outcomes."""
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
    complete: bool = True
    """False where time ended before all points of a first calibration were made."""

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
        if run.vocabulary is not None:
            kinds.setdefault(run.kind, {}).setdefault(run.length, []).append(run)
    laws = []
    for kind, place in sorted({(run.kind, (run.modules, run.layers)) for run in runs if run.for_law}):
        mine = [run.point for run in runs if run.for_law and (run.kind, run.modules, run.layers) == (kind, *place)]
        try:
            laws.append(PlacedLaw(kind, *place, law_fit.fit(mine)))
        except LawError:
            continue
    fixed = {name: runs[-1].conditions[name] for name in ("dtype", "device", "threads", "torch")} if runs else {}
    known = replace(
        bare,
        kinds=tuple(
            KindSamples(kind, tuple(_mean(length, members) for length, members in sorted(by_length.items())))
            for kind, by_length in sorted(kinds.items())
        ),
        laws=tuple(laws),
        conditions={**fixed, "runs": len(runs)},
    )
    placed = []
    for place in sorted({(run.modules, run.layers) for run in runs}):
        here = [run for run in runs if (run.modules, run.layers) == place]
        learnt = [outcome for run in here for outcome in outcomes_of(run)]
        placed.append(_placed(place, here[0].parameters // here[0].rank, learnt, rank_law_of(here)))
    return replace(known, boundaries=tuple(placed))


def rank_law_of(runs: Sequence[Run]) -> RankLaw | None:
    """What ranks at the one placement of these runs are chosen by; None if they give no law of random tokens."""
    random = [run for run in runs if run.kind == RANK_KIND and run.for_law]
    base_loss = max(((run.length, run.base_loss) for run in random), default=(0, 0.0))[1]
    try:
        law = law_fit.fit([Point(run.rank, run.length, base_loss, run.final_loss) for run in random])
    except LawError:
        return None
    return RankLaw(law, base_loss)


def _mean(length: int, runs: Sequence[Run]) -> Sample:
    return Sample(
        length,
        mean(run.base_loss for run in runs),
        mean(run.cost_bits for run in runs),
        mean([run.vocabulary for run in runs if run.vocabulary is not None] or [1.0]),
    )


@cache
def guess() -> tuple[RankLaw, SuccessBoundary] | None:
    """The embedded base model's law and boundary where its writes begin: a guess of what others take."""
    shipped = _read(SHIPPED) if SHIPPED.exists() else None
    placed = shipped.placed(shipped.place) if shipped else None
    return (placed.law, placed.boundary) if placed and placed.law and placed.boundary else None


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

    Without a law of the base model's own that is the embedded one's, where one module alone is adapted.

    Args:
        kind: Whose writes say the pace, if there are any; all if None.
        outcomes: Of writes at this placement beside those that are known.
        above: Placements that hold more, upwards.
    """
    modules, layers = place
    matrices = 2 * len(modules) * len(layers)
    placed = known.placed(place) if known else None
    placed = placed or PlacedBoundary(*place, parameters_per_rank, (), None, None, None)
    calibrated = placed.law is not None
    guessed = guess() if not calibrated and matrices == 2 else None
    if outcomes or guessed:
        law = guessed[0] if guessed else placed.law
        placed = _placed(place, parameters_per_rank, [*placed.outcomes, *outcomes], law)
    alike = visits.fit([outcome for outcome in placed.outcomes if outcome.kind == kind])
    return PlanInputs(
        parameters_per_rank,
        matrices,
        placed.law,
        placed.boundary or (guessed[1] if guessed else None),
        calibrated,
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
        sample = samples.at(sum(lengths[first:last]))
        return Price(sample.cost_bits, sample.base_loss, sample.vocabulary)

    return plan_write(lengths, price, inputs, goal=goal, rank=rank, limits=limits, one_adapter=one_adapter)


def nearest_kind(known: Calibration, cost_bits: float, length: int) -> str | None:
    """The kind whose tokens cost most nearly as much; None where no kind is known."""

    def distance(entry: KindSamples) -> float:
        return abs(math.log(max(entry.at(length).cost_bits, 1.0) / max(cost_bits, 1.0)))

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
    return [
        Outcome(run.kind, run.rank, run.length, run.parameters, run.cost_bits, run.certified, visits, run.vocabulary)
    ]


def trials_of(outcomes: Iterable[Outcome], law: RankLaw) -> list[Trial]:
    """Outcomes as the success boundary sees them; those of which no vocabulary was noted say nothing."""
    return [
        Trial.of(
            one.rank, crowded(law.rank_alone(one.vocabulary), one.length, one.parameters / one.rank), one.certified
        )
        for one in outcomes
        if one.vocabulary is not None
    ]


def _placed(place: Place, parameters_per_rank: int, outcomes: Sequence[Outcome], law: RankLaw | None) -> PlacedBoundary:
    try:
        fitted = success.fit(trials_of(outcomes, law)) if law else None
    except BoundaryError:
        fitted = None
    return PlacedBoundary(*place, parameters_per_rank, tuple(outcomes), law, fitted, visits.fit(outcomes))


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
    if wanted and (own := cached(wanted)).exists() and (known := _read(own)) is not None:
        return known
    return shipped if shipped and shipped.base_weights == wanted else None


def _read(path: Path) -> Calibration | None:
    """None of an older format: what its runs say is summarised anew by the next calibration."""
    try:
        fields = JsonFile(path, dict).load()
        if (found := fields.pop("format")) == FORMAT:
            return _calibration(fields)
        if found < FORMAT:
            return None
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
    law, fitted, found = entry["law"], entry["boundary"], entry["pace"]
    return PlacedBoundary(
        *_place(entry),
        entry["parameters_per_rank"],
        tuple(Outcome(**outcome) for outcome in entry["outcomes"]),
        RankLaw(MemoryLaw.from_json(json.dumps(law["law"])), law["base_loss"]) if law else None,
        SuccessBoundary.from_json(json.dumps(fitted)) if fitted else None,
        Pace(**found) if found else None,
    )
