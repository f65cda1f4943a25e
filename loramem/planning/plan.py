"""Planning a write: how many adapters, the rank of each, and what that takes. No torch.

Three ranks stand side by side for every adapter:

1. optimistic: the values' cost at 2 bits per parameter, what language models reach with very many exposures
   (arXiv 2404.05405);
2. law: where as many different random tokens end at a mean loss of 0.69 nats, the lowest that the memory law is about,
   with an interval (`loramem.planning.rank_law`);
3. what is used: for the goal "small" the least rank at which the success boundary expects every token to be certified
   at odds of three to seven, and that carries as many tokens (`loramem.planning.filling`); for "fast" more, since a
   write with rank to spare takes fewer steps (docs/law.md). Where no law is known the values' cost at a constant
   density.

A wrong rank costs time, not correctness: the writer raises it when progress stops. What no rank allowed can hold at
3.6 bits per parameter (arXiv 2505.24832) is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loramem.errors import DoesNotFit
from loramem.models.shard_sizes import Size, cut
from loramem.planning.filling import SCATTER, fullest, rank_that_carries
from loramem.planning.limits import ANY_RANK, GOALS, GoalName, RankLimits, check_request, whole_rank
from loramem.planning.rank_law import LawRank, RankLaw
from loramem.planning.success import SuccessBoundary, crowded
from loramem.planning.visits import Pace

OPTIMISTIC_BITS, MOST_BITS = 2.0, 3.6  # of cost per parameter
ADAPTER_BYTES, MATRIX_BYTES = 1400, 150  # of an adapter's files beside its weights: config, card; header per matrix


@dataclass(frozen=True)
class PlanInputs:
    """What a plan rests on: the placement's size and, as far as they are known, its law, boundary and pace."""

    parameters_per_rank: int
    matrices: int
    """A and B of every adapted module."""
    law: RankLaw | None = None
    boundary: SuccessBoundary | None = None
    calibrated: bool = False
    """Whether the law is the base model's own."""
    kind: str | None = None
    """Of the data, as far as it is known."""
    pace: Pace | None = None
    seconds_per_visit: float | None = None
    """Of training, per answer token, measured on this machine."""

    above: tuple[Size, ...] = ()
    """Placements that hold more, upwards: where what one adapter must hold alone may begin."""
    room: float = 1.0
    """Factor on first ranks, of what is to be served where rounding moves features more than a dtype does."""

    @property
    def size(self) -> Size:
        return Size(self.parameters_per_rank, self.matrices)

    def success(self, rank: int, law_rank: LawRank, tokens: int) -> float | None:
        """Probability that a write of so many answer tokens certifies every one at this rank; None where that is
        another base model's."""
        if not self.calibrated or self.boundary is None:
            return None
        return self.boundary.probability(rank, crowded(law_rank.rank, tokens, self.parameters_per_rank))


@dataclass(frozen=True)
class Price:
    """What records cost together."""

    cost_bits: float
    """See `loramem.planning.cost`."""
    base_loss: float
    """Nats per answer token."""
    vocabulary: float
    """Effective, of answer and end tokens: see `loramem.planning.variety`."""


@dataclass(frozen=True)
class ShardPlan:
    """One adapter to be."""

    first: int
    """Index of its first record among those planned."""
    records: int
    length: int
    """Answer tokens of all its records, end tokens not counted."""
    cost_bits: float
    rank: int
    parameters: int
    size_bytes: int
    """Of its files, about."""
    base_loss: float
    """Nats per answer token."""
    vocabulary: float
    """Effective, of answer and end tokens."""
    success: float | None
    """Probability that every token is certified without raising the rank; None without a calibration."""
    training_s: float | None
    """None where no write was timed on this machine."""
    optimistic_rank: int
    law_rank: LawRank | None
    rung: int = 0
    """Where it begins: so many placements above the store's (`loramem.models.placement.Placement.ladder`)."""


@dataclass(frozen=True)
class Plan:
    """What a write would do."""

    goal: GoalName
    shards: tuple[ShardPlan, ...]
    calibrated: bool
    """Whether ranks rest on a law of this base model and placement."""
    kind: str | None
    """Of the data, as far as it is known."""
    warnings: tuple[str, ...] = ()
    one_adapter: bool = False
    """Whether each namespace has one adapter, whatever it takes."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Plan":
        """The plan that `dataclasses.asdict` took apart, also after JSON."""
        shards = tuple(
            ShardPlan(**{**shard, "law_rank": shard["law_rank"] and LawRank(**shard["law_rank"])})
            for shard in fields["shards"]
        )
        return cls(**{**fields, "shards": shards, "warnings": tuple(fields["warnings"])})

    @property
    def parameters(self) -> int:
        return sum(shard.parameters for shard in self.shards)

    @property
    def cost_bits(self) -> float:
        return sum(shard.cost_bits for shard in self.shards)

    @property
    def length(self) -> int:
        return sum(shard.length for shard in self.shards)

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def success(self) -> float | None:
        """Probability that no shard needs a higher rank than planned."""
        each = [shard.success for shard in self.shards if shard.success is not None]
        return math.prod(each) if len(each) == len(self.shards) else None

    @property
    def training_s(self) -> float | None:
        each = [shard.training_s for shard in self.shards if shard.training_s is not None]
        return sum(each) if len(each) == len(self.shards) else None


def plan_write(
    lengths: Sequence[int],
    price: Callable[[int, int], Price],
    inputs: PlanInputs,
    *,
    goal: GoalName = "fast",
    rank: int | None = None,
    limits: RankLimits = ANY_RANK,
    one_adapter: bool = False,
) -> Plan:
    """Cut records into shards of nearly equal size, in order, and choose each one's first rank.

    For "small" a shard has as many records as its rank carries, at the rank with which all take the fewest parameters.
    Where a shard would need a higher rank than is allowed there are more and smaller ones, as long as they need less.

    Args:
        lengths: Answer tokens of each record.
        price: Of the records ``first`` to ``last`` (exclusive) in one adapter.
        goal: "fast" (seconds) or "small" (parameters).
        rank: Use this rank for every shard.
        one_adapter: All records in one shard, which begins at a placement that holds them.

    Raises:
        ArgumentError: See `check_request`.
        DoesNotFit: A record alone, or all with ``one_adapter``, exceed 3.6 bits per parameter at the highest rank
            allowed.
    """
    check_request(goal, rank, limits)
    if one_adapter:
        return _one_adapter(lengths, price, inputs, goal, rank, limits)
    least, tokens, best = 1, [length + 1 for length in lengths], math.inf
    holds, most = MOST_BITS * inputs.parameters_per_rank * limits.most, inputs.size.shard_tokens()
    if goal == "small" and rank is None and inputs.law is not None and inputs.matrices == 2:
        alike = [price(first, last) for first, last in cut(tokens, most)]
        answers = sum(lengths) / max(sum(tokens), 1)
        most = fullest(tokens, partial(_first_of, alike, answers, inputs), most, limits)
    while True:
        cuts = cut(tokens, most, least)
        parts = [price(first, last) for first, last in cuts]
        needs = [
            max(
                _needed(part, sum(lengths[first:last]), inputs, goal, rank),
                _carrying(part, sum(tokens[first:last]), inputs, goal, rank),
            )
            for part, (first, last) in zip(parts, cuts, strict=True)
        ]
        several = [(need, part) for need, part, (a, b) in zip(needs, parts, cuts, strict=True) if b - a > 1]
        wide = max((need for need, _ in several if need > limits.most), default=0)
        # A part is always less crowded; what has to fall is what its variety asks for.
        varied = max((_needed(part, inputs.parameters_per_rank, inputs, goal, rank) for _, part in several), default=0)
        settled = inputs.law is not None and all(part.cost_bits <= holds for part in parts)
        if not settled or varied < best:
            ranges, prices, needed = cuts, parts, needs
            best = varied if settled else best
        elif len(cuts) >= 2 * len(ranges):  # fewer records ask for as many different tokens: they may stay together
            break
        if not wide:
            break
        least = max(least, len(cuts))  # short records before a long one may stay together for some rounds
        least = max(least + 1, math.ceil(least * min(wide / limits.most, 4)))
    shards = [
        _shard(first, last - first, sum(lengths[first:last]), part, need, inputs, goal, rank, limits)
        for (first, last), part, need in zip(ranges, prices, needed, strict=True)
    ]
    return Plan(goal, tuple(shards), inputs.calibrated, inputs.kind, _warnings(shards, inputs))


def plan_groups(
    sizes: Sequence[int],
    lengths: Sequence[int],
    price: Callable[[int, int], Price],
    inputs: PlanInputs,
    *,
    goal: GoalName = "fast",
    rank: int | None = None,
    limits: RankLimits = ANY_RANK,
    one_adapter: bool = False,
) -> Plan:
    """`plan_write` for consecutive groups of so many records, no two of them in one shard."""
    plan_part = partial(plan_write, inputs=inputs, goal=goal, rank=rank, limits=limits, one_adapter=one_adapter)
    plan, start = plan_part((), price), 0
    for size in sizes:
        part = plan_part(lengths[start : start + size], partial(_shifted, price, start))
        shards = (*plan.shards, *(replace(shard, first=shard.first + start) for shard in part.shards))
        warnings = tuple(dict.fromkeys((*plan.warnings, *part.warnings)))
        plan = replace(plan, shards=shards, calibrated=plan.calibrated and part.calibrated, warnings=warnings)
        start += size
    return plan


def _shifted(price: Callable[[int, int], Price], by: int, first: int, last: int) -> Price:
    return price(first + by, last + by)


def _one_adapter(
    lengths: Sequence[int],
    price: Callable[[int, int], Price],
    inputs: PlanInputs,
    goal: GoalName,
    rank: int | None,
    limits: RankLimits,
) -> Plan:
    """All records in one shard, at the first placement whose features and ranks hold them, or else the last."""
    plan = Plan(goal, (), inputs.calibrated, inputs.kind, _warnings((), inputs), one_adapter=True)
    if not lengths:
        return plan
    whole, length = price(0, len(lengths)), sum(lengths)
    tokens = length + len(lengths)
    # What is known of writes is known of the first placement alone.
    placements = [
        inputs,
        *(PlanInputs(size.parameters_per_rank, size.matrices, kind=inputs.kind) for size in inputs.above),
    ]
    tried = [
        (
            rung,
            there,
            max(_needed(whole, length, there, goal, rank), _carrying(whole, tokens, there, goal, rank)),
        )
        for rung, there in enumerate(placements)
    ]
    fitting = [each for each in tried if each[1].size.carries(tokens) and each[2] <= limits.most]
    rung, there, needed = [*fitting, tried[-1]][0]
    shard = replace(_shard(0, len(lengths), length, whole, needed, there, goal, rank, limits), rung=rung)
    return replace(plan, shards=(shard,), calibrated=there.calibrated, warnings=_warnings([shard], there))


def _needed(price: Price, tokens: int, inputs: PlanInputs, goal: GoalName, rank: int | None) -> float:
    """The least rank worth trying for so many answer tokens, not yet rounded up.

    If the rank is given, the least that can hold them at all.
    """
    least = price.cost_bits / (MOST_BITS * inputs.parameters_per_rank)
    if rank is not None:
        return least
    if inputs.law is not None and inputs.boundary is not None:
        law_rank = crowded(inputs.law.rank_alone(price.vocabulary), tokens, inputs.parameters_per_rank)
        return max(least, inputs.boundary.rank_for(GOALS[goal].probability, law_rank))
    return price.cost_bits / (GOALS["small"].density * inputs.parameters_per_rank)


def _carrying(price: Price, tokens: int, inputs: PlanInputs, goal: GoalName, rank: int | None) -> float:
    """The least rank that carries so many answer and end tokens, where few parameters are asked for and it is known."""
    if goal != "small" or rank is not None or inputs.law is None:
        return 0.0
    return rank_that_carries(tokens, price.vocabulary, inputs.size)


def _first_of(alike: Sequence[Price], answers: float, inputs: PlanInputs, tokens: int) -> float:
    """For few parameters, the rank of a shard of so many answer and end tokens that are as various as these.

    Args:
        answers: Share of answer tokens.
    """
    part = max(alike, key=lambda part: part.vocabulary)
    carrying = SCATTER * _carrying(part, tokens, inputs, "small", None)
    return inputs.room * max(_needed(part, max(1, round(answers * tokens)), inputs, "small", None), carrying)


def _first_rank(price: Price, needed: float, inputs: PlanInputs, goal: GoalName) -> int:
    """The needed one and what a goal spares beside it.

    Rounded up once, after all factors: shards that need hardly less would otherwise begin two ranks lower.
    """
    aim = GOALS[goal]
    if inputs.law is not None and inputs.boundary is not None:
        wanted = inputs.room * aim.times * needed
    else:
        wanted = inputs.room * price.cost_bits / (aim.density * inputs.parameters_per_rank)
    return max(whole_rank(needed), min(whole_rank(wanted), int(inputs.size.width / 2)), 1)


def _shard(
    first: int,
    records: int,
    length: int,
    price: Price,
    needed: float,
    inputs: PlanInputs,
    goal: GoalName,
    rank: int | None,
    limits: RankLimits,
) -> ShardPlan:
    per_rank, cost = inputs.parameters_per_rank, price.cost_bits
    if cost > MOST_BITS * per_rank * limits.most:
        raise DoesNotFit(
            f"Values that cost {cost:,.0f} bits do not fit into one adapter of rank {limits.most}, which holds at most "
            f"{MOST_BITS * per_rank * limits.most:,.0f} ({MOST_BITS} per parameter). Allow a rank of "
            f"{math.ceil(cost / (MOST_BITS * per_rank))} or more (max_rank, --max-rank), or write shorter values.",
            cost_bits=cost,
            rank=limits.most,
        )
    chosen = rank or limits.at_least(_first_rank(price, needed, inputs, goal))
    parameters = chosen * per_rank
    law_rank = inputs.law.rank(price.vocabulary) if inputs.law else None
    visits = inputs.pace.visits(parameters, cost) if inputs.pace else None
    return ShardPlan(
        first=first,
        records=records,
        length=length,
        cost_bits=cost,
        rank=chosen,
        parameters=parameters,
        size_bytes=4 * parameters + MATRIX_BYTES * inputs.matrices + ADAPTER_BYTES,
        base_loss=price.base_loss,
        vocabulary=price.vocabulary,
        success=inputs.success(chosen, law_rank, length) if law_rank else None,
        training_s=visits * length * inputs.seconds_per_visit if visits and inputs.seconds_per_visit else None,
        optimistic_rank=max(1, math.ceil(cost / (OPTIMISTIC_BITS * per_rank))),
        law_rank=law_rank,
    )


def _warnings(shards: Sequence[ShardPlan], inputs: PlanInputs) -> tuple[str, ...]:
    said = []
    if inputs.law is None:
        said.append("No law of this placement is known: ranks are a cautious guess from the values' cost.")
    elif not inputs.calibrated:
        said.append("This base model is uncalibrated at this placement: ranks are those that loramem-tiny would take.")
    if any(shard.law_rank.extrapolated for shard in shards if shard.law_rank):
        said.append("The law's ranks lie outside the ranks or vocabularies that were measured.")
    return tuple(said)
