"""Rules for the first rank that `tests.benchmarks.first_rank` compares, and what each comes to in a job's trials."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramem import embedded
from loramem.models.shard_sizes import Size
from loramem.planning import calibration
from loramem.planning.calibration import Calibration
from loramem.planning.filling import rank_that_carries
from loramem.planning.limits import GOALS, GoalName
from loramem.planning.runs import read_runs
from loramem.planning.success import crowded
from loramem.suites.runner import Result

Rule = Callable[[Result, Mapping[str, Any]], float | None]
"""The rank of a shard, given itself and the line of its job; None where the rule has no answer."""
RESULTS, CALIBRATIONS = Path(__file__).parents[2] / "docs" / "results", "calibration-of-*.jsonl"
"""Calibration runs of base models other than the embedded one."""
SURE = 0.95
"""Share of jobs that a constant density is chosen to certify, in hindsight."""
BEFORE = {"small": 0.1, "fast": 0.9}
"""The success boundary's probability, as ranks were chosen before there was this comparison."""


@dataclass(frozen=True)
class Choice:
    """What a rule came to at one job."""

    rank: int
    least: int
    """That works."""
    certified: bool
    cpu_s: float
    """Of the training that it begins, certified or not."""


def choose(line: Mapping[str, Any], rule: Rule) -> Choice | None:
    """The rule's rank, the highest over the job's shards and rounded up to the ladder, and the trial of it."""
    asked = [rule(shard, line) for shard in line["result"]["shards"]]
    wanted = [rank for rank in asked if rank is not None]
    if len(wanted) < len(asked):
        return None
    trials = {trial["rank"]: trial for trial in line["result"]["trials"]}
    rank = next((rank for rank in line["cell"]["ladder"] if rank >= max(wanted) - 1e-9), line["cell"]["ladder"][-1])
    least = min(each for each, trial in trials.items() if trial["certified"])
    # Below the one that failed none was tried, and above the highest there was no need to.
    trial = trials[min(max(rank, min(trials)), max(trials))]
    return Choice(rank, least, rank >= least and trial["certified"], trial["cpu_s"])


def rules(lines: Sequence[Mapping[str, Any]]) -> dict[str, Rule]:
    """By name. The constant density of each base is fitted to the lines themselves: it is judged in hindsight."""
    own = _calibrations()
    tiny = {line["cell"]["model"]: own[embedded.NAME] for line in lines}
    best = {model: _densest([line for line in lines if line["cell"]["model"] == model]) for model in tiny}
    found: dict[str, Rule] = {
        "constant density, in hindsight": lambda shard, line: _dense(best[line["cell"]["model"]])(shard, line)
    }
    for goal in GOALS:
        found[f"{goal}: before"] = _before(goal)
        found[f"{goal}: law"] = _by_law(own, goal)
        found[f"{goal}: law of {embedded.NAME}"] = _by_law(tiny, goal)
    return found


def _by_law(known: Mapping[str, Calibration], goal: GoalName) -> Rule:
    aim = GOALS[goal]

    def rule(shard: Result, line: Mapping[str, Any]) -> float | None:
        base = known.get(line["cell"]["model"])
        placed = base.placed(base.place) if base else None
        if placed is None or placed.law is None or placed.boundary is None:
            return None
        size = Size(line["result"]["parameters_per_rank"], line["result"]["matrices"])
        law_rank = crowded(placed.law.rank_alone(shard["vocabulary"]), shard["length"], size.parameters_per_rank)
        rank = aim.times * placed.boundary.rank_for(aim.probability, law_rank)
        return max(rank, rank_that_carries(shard["tokens"], shard["vocabulary"], size)) if goal == "small" else rank

    return rule


def _before(goal: GoalName) -> Rule:
    """By what the values cost: on loramem-tiny the boundary that shipped, elsewhere a guess; for speed at least rank
    16, and down to 0.08 bits per parameter."""

    def rule(shard: Result, line: Mapping[str, Any]) -> float:
        per_rank, cost, odds = line["result"]["parameters_per_rank"], shard["cost_bits"], BEFORE[goal]
        needed = cost / per_rank
        if line["cell"]["model"] == embedded.NAME:
            kind = min(SHIPPED_NEEDS, key=lambda kind: abs(math.log(SHIPPED_NEEDS[kind][0] / (cost / shard["length"]))))
            each = 4.163 * SHIPPED_NEEDS[kind][1]
            needed = max(1, math.ceil(each * (odds / (1 - odds)) ** (1 / 3.354) * cost / per_rank))
        if goal == "small":
            return max(1, needed)
        return max(16, needed, min(cost / (GOALS[goal].density * per_rank), per_rank / 4))

    return rule


SHIPPED_NEEDS = {"phonebook": (2.9, 0.628), "text": (4.2, 1.321), "mixed": (13.0, 1.086), "random": (17.2, 1.300)}
"""Of that boundary: bits per token, by which a kind was told, and κ."""


def _dense(density: float) -> Rule:
    return lambda shard, line: shard["cost_bits"] / (density * line["result"]["parameters_per_rank"])


def _densest(lines: Sequence[Mapping[str, Any]]) -> float:
    """The highest of some bits per parameter at which enough jobs are certified."""
    for density in (0.01 * 1.1**step for step in range(60, -1, -1)):
        found = [choice for line in lines if (choice := choose(line, _dense(density)))]
        if sum(choice.certified for choice in found) >= SURE * len(found):
            return density
    return 0.01


def _calibrations() -> dict[str, Calibration]:
    """By base model: what ships, and what the runs beside the results say."""
    shipped = calibration.load()
    assert shipped is not None
    found = {shipped.base_model: shipped}
    for path in sorted(RESULTS.glob(CALIBRATIONS)):
        runs = read_runs(path)
        first = runs[0]
        bare = Calibration(
            first.conditions["base_model"],
            first.conditions["base_weights"],
            max(run.length for run in runs),
            *(first.modules, first.layers, first.parameters // first.rank),
        )
        found[bare.base_model] = calibration.summarise(bare, runs)
    return found
