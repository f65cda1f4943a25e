"""A plan puts every record into one shard, in order and within the limits, and gives each shard a rank."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramem.errors import DoesNotFit
from loramem.models.shard_sizes import FILL, Size, cut
from loramem.planning.filling import rank_that_carries
from loramem.planning.limits import GOALS, RankLimits
from loramem.planning.plan import Plan, PlanInputs, Price, plan_groups, plan_write
from loramem.planning.visits import Pace
from loramem.training.settings import MAX_RANK

from .planning_samples import BOUNDARY, RANK_LAW, vocabulary_for

PARAMETERS = 1000  # per rank
BASIS = PlanInputs(PARAMETERS, matrices=8)
SHARD_TOKENS = BASIS.size.shard_tokens() - 1  # of one record, beside its end token
SHARD_RECORDS = BASIS.size.shard_tokens() // 2  # of one token and the end token


KNOWN = dataclasses.replace(BASIS, law=RANK_LAW, boundary=BOUNDARY, calibrated=True)


def priced(costs: Sequence[float], vocabulary: float = 11.0) -> Callable[[int, int], Price]:
    """Records that share nothing but their tokens."""
    until = [0.0, *accumulate(costs)]
    return lambda first, last: Price(until[last] - until[first], 6.0, vocabulary)


def varied(costs: Sequence[float], law_ranks: Sequence[float]) -> Callable[[int, int], Price]:
    """Records that share nothing, with the law's rank of each alone."""
    return lambda first, last: Price(sum(costs[first:last]), 6.0, vocabulary_for(sum(law_ranks[first:last])))


def plan(
    lengths: Sequence[int],
    bits_each: float = 1.0,
    inputs: PlanInputs = BASIS,
    vocabulary: float = 11.0,
    **options: object,
) -> Plan:
    return plan_write(lengths, priced([bits_each] * len(lengths), vocabulary), inputs, **options)


def ranges(plan: Plan) -> list[tuple[int, int]]:
    return [(shard.first, shard.first + shard.records) for shard in plan.shards]


def held(plan: Plan) -> list[int]:
    return [index for first, last in ranges(plan) for index in range(first, last)]


# --- shards


def test_nothing_to_write_needs_no_shard() -> None:
    empty = plan([])
    assert (empty.shards, empty.parameters, empty.size_bytes, empty.cost_bits, empty.length) == ((), 0, 0, 0, 0)


def test_a_few_records_share_one_shard() -> None:
    [shard] = plan_write([3, 4, 5], priced([10.0, 20.0, 30.5]), BASIS, rank=2).shards
    assert (shard.first, shard.records, shard.length, shard.cost_bits, shard.base_loss) == (0, 3, 12, 60.5, 6.0)
    assert (shard.rank, shard.parameters) == (2, 2 * PARAMETERS)


def test_what_the_records_of_a_shard_cost_together_counts() -> None:
    asked: list[tuple[int, int]] = []

    def shared(first: int, last: int) -> Price:
        """A format of 100 bits that every adapter pays once, and 5 bits a record."""
        asked.append((first, last))
        return Price(100 + 5 * (last - first), 6.0, 11.0)

    result = plan_write([1] * (SHARD_RECORDS + 2), shared, BASIS)
    assert ranges(result) == asked
    assert [shard.cost_bits for shard in result.shards] == [100 + 5 * shard.records for shard in result.shards]
    assert result.cost_bits == 2 * 100 + 5 * (SHARD_RECORDS + 2)


def test_as_many_records_as_a_shard_holds_share_one_and_one_more_needs_two() -> None:
    assert ranges(plan([1] * SHARD_RECORDS)) == [(0, SHARD_RECORDS)]
    assert len(plan([1] * (SHARD_RECORDS + 1)).shards) == 2


def test_as_many_tokens_as_a_shard_holds_share_one_and_one_more_needs_two() -> None:
    half = SHARD_TOKENS // 2
    rest = SHARD_TOKENS - half - 1  # each of the two has an end token
    assert ranges(plan([half, rest])) == [(0, 2)]
    assert ranges(plan([half + 1, rest])) == [(0, 1), (1, 2)]


def test_a_shard_holds_as_much_as_the_adapted_modules_are_wide() -> None:
    lengths = [10] * 200
    narrow, wide = PlanInputs(960, 2), PlanInputs(2112, 2)
    assert narrow.size.width == 480
    assert [len(plan(lengths, inputs=inputs).shards) for inputs in (narrow, wide)] == [
        math.ceil(200 * 11 / inputs.size.shard_tokens()) for inputs in (narrow, wide)
    ]
    assert wide.size.shard_tokens() == round(FILL * 1056)


def test_shards_are_of_nearly_equal_size() -> None:
    sizes = [shard.records for shard in plan([1] * (2 * SHARD_RECORDS + 10)).shards]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 2


def test_a_record_longer_than_a_shard_gets_one_of_its_own() -> None:
    giant = SHARD_TOKENS + 1
    assert ranges(plan([1, 1, giant, 1])) == [(0, 2), (2, 3), (3, 4)]
    assert ranges(plan([giant, giant])) == [(0, 1), (1, 2)]
    assert ranges(plan([giant, 1, 1])) == [(0, 1), (1, 3)]


def test_at_least_so_many_shards_as_there_are_records_for() -> None:
    assert cut([2] * 12, 100, 3) == [(0, 4), (4, 8), (8, 12)]
    assert cut([2] * 3, 100, 100) == [(0, 1), (1, 2), (2, 3)]


LENGTHS = st.one_of(st.integers(1, 30), st.integers(1, SHARD_TOKENS), st.integers(SHARD_TOKENS, 3 * SHARD_TOKENS))


@given(lengths=st.lists(LENGTHS, max_size=40), copies=st.integers(1, max(1, SHARD_RECORDS // 10)))
def test_every_record_is_in_one_shard_in_order_within_the_limits(lengths: list[int], copies: int) -> None:
    lengths = lengths * copies
    costs = [float(index) for index in range(len(lengths))]
    result = plan_write(lengths, priced(costs), BASIS)
    assert held(result) == list(range(len(lengths)))
    for shard in result.shards:
        own = slice(shard.first, shard.first + shard.records)
        assert 1 <= shard.records <= SHARD_RECORDS
        assert shard.records == 1 or shard.length + shard.records <= SHARD_TOKENS + 1
        assert shard.length == sum(lengths[own])
        assert shard.cost_bits == sum(costs[own])
        assert shard.parameters == shard.rank * PARAMETERS


# --- ranks without a law: a guess from the cost


@pytest.mark.parametrize("goal", GOALS)
def test_without_a_law_the_rank_is_guessed_from_the_cost_of_the_values(goal: str) -> None:
    bits = GOALS[goal].density * PARAMETERS * 6.5
    assert plan([5], bits, goal=goal).shards[0].rank == 7
    # the cost of a shard is that of all its records
    assert plan([5] * 4, bits / 4, goal=goal).shards[0].rank == 7


@pytest.mark.parametrize("goal", GOALS)
def test_a_guess_keeps_to_the_smallest_and_the_largest_rank(goal: str) -> None:
    assert plan([5], 0.0, goal=goal).shards[0].rank == 1
    largest = RankLimits(3)
    assert plan([5], 3.5 * PARAMETERS * largest.highest, goal=goal, limits=largest).shards[0].rank == largest.highest


def test_fast_takes_no_rank_above_half_the_modules_width_unless_it_is_needed() -> None:
    half = PARAMETERS // (2 * BASIS.matrices)
    above = GOALS["fast"].density * PARAMETERS * (half + 20)
    assert plan([5], above).shards[0].rank == half
    assert plan([5], GOALS["fast"].density * PARAMETERS * (half - 20)).shards[0].rank == half - 20
    needed = GOALS["small"].density * PARAMETERS * (half + 5)  # more than half the width holds
    assert plan([5], needed).shards[0].rank == plan([5], needed, goal="small").shards[0].rank == half + 5
    assert plan([5], above, rank=half + 1).shards[0].rank == half + 1
    needed = vocabulary_for((half + 5) / 4.18)
    assert plan([PARAMETERS], inputs=KNOWN, vocabulary=needed).shards[0].rank == half + 5


def test_each_shard_has_a_rank_of_its_own() -> None:
    giant = BASIS.size.shard_tokens()
    bits = GOALS["small"].density * PARAMETERS
    shards = plan_write([giant, giant], priced([3 * bits, 9 * bits]), BASIS, goal="small").shards
    assert [shard.rank for shard in shards] == [3, 9]


def test_a_plan_without_a_law_says_that_it_guesses() -> None:
    result = plan([5], 100.0)
    assert not result.calibrated
    assert (result.success, result.training_s, result.shards[0].law_rank) == (None,) * 3
    (warning,) = result.warnings
    assert "No law of this placement is known" in warning


# --- ranks by the law


def test_the_goal_small_begins_at_odds_of_3_to_7_and_fast_above_twice_the_rank_of_19_to_1() -> None:
    for law_rank, small, fast in ((0.9, 2, 8), (1.4, 3, 13), (2.4, 4, 22), (0.2, 1, 2)):
        # Even odds at twice the law's rank; 3 to 7 at 2 · (3/7)^(1/4) = 1.62 times, 19 to 1 at 2 · 19^(1/4) = 4.18.
        vocabulary = vocabulary_for(law_rank)
        assert (small, fast) == (math.ceil(2 * (3 / 7) ** 0.25 * law_rank), math.ceil(2.1 * 2 * 19**0.25 * law_rank))
        [shard] = plan([PARAMETERS], 100.0, KNOWN, vocabulary, goal="small").shards
        assert shard.rank == small
        assert shard.success is not None and shard.success >= 0.3
        [shard] = plan([PARAMETERS], 100.0, KNOWN, vocabulary).shards
        assert shard.rank == fast
        assert shard.success is not None and shard.success >= 0.95


def test_the_rank_does_not_go_by_what_the_values_cost_as_long_as_it_can_hold_them() -> None:
    vocabulary = vocabulary_for(2.5)
    assert [plan([500], bits, KNOWN, vocabulary, goal="small").shards[0].rank for bits in (1.0, 14_400.0)] == [4, 4]
    assert plan([500], 14_401.0, KNOWN, vocabulary, goal="small").shards[0].rank == 5  # 3.6 bits per parameter


@given(cost=st.floats(0, 1e5), vocabulary=st.floats(1, 1000))
def test_the_goal_fast_never_takes_a_lower_rank_than_small(cost: float, vocabulary: float) -> None:
    for inputs in (BASIS, KNOWN):
        small, fast = (plan([500], cost, inputs, vocabulary, goal=goal).shards[0].rank for goal in ("small", "fast"))
        assert fast >= small


def test_the_same_variety_takes_more_rank_the_more_tokens_share_an_adapter() -> None:
    vocabulary = vocabulary_for(10.0)
    ranks = {
        tokens: plan([tokens], 100.0, KNOWN, vocabulary, goal="small").shards[0].rank for tokens in (100, 1000, 4000)
    }
    # Odds of 3 to 7 at 1.618 times the law's rank, times (tokens / parameters of a rank)^0.15.
    assert ranks == {100: math.ceil(16.18 * 0.1**0.15), 1000: 17, 4000: math.ceil(16.18 * 4**0.15)}
    assert ranks == {100: 12, 1000: 17, 4000: 20}


def test_the_chance_of_a_plan_is_that_of_all_its_shards_together() -> None:
    # Rank 2 is even odds where the law's rank is 1; odds of 2⁴ where it is a half.
    giant = PARAMETERS
    result = plan_write([giant, giant], varied([1000.0, 500.0], [1.0, 0.5]), KNOWN, rank=2)
    assert [shard.success for shard in result.shards] == [pytest.approx(1 / 2), pytest.approx(16 / 17)]
    assert result.success == pytest.approx(8 / 17)
    assert result.calibrated


def test_a_plan_by_another_base_models_law_says_so() -> None:
    result = plan([500], 1000.0, dataclasses.replace(KNOWN, calibrated=False), vocabulary_for(8.0))
    assert not result.calibrated
    (warning,) = result.warnings
    assert "ranks are those that loramem-tiny would take" in warning


# --- the two ranks beside


def test_the_optimistic_rank_is_two_bits_per_parameter() -> None:
    for cost, rank in ((0.0, 1), (2000.0, 1), (2001.0, 2), (64_000.0, 32)):
        assert plan([500], cost).shards[0].optimistic_rank == rank


def test_the_laws_rank_stands_beside_with_its_interval() -> None:
    [shard] = plan([400], 100.0, KNOWN, 400.0, rank=3).shards
    assert shard.law_rank == RANK_LAW.rank(400.0)
    assert shard.vocabulary == 400.0


def test_a_law_that_is_asked_beyond_its_runs_says_so() -> None:
    # The law's rank is 8 for 400 different tokens, and 0.5 for 25, where no run was.
    assert plan([400], 1000.0, KNOWN, 400.0).warnings == ()
    (warning,) = plan([400], 1000.0, KNOWN, 25.0).warnings
    assert "law's ranks lie outside" in warning


# --- size and time


def test_the_size_is_four_bytes_a_parameter_and_what_stands_beside_them() -> None:
    [shard] = plan([5], rank=3).shards
    assert shard.size_bytes == 4 * 3 * PARAMETERS + 150 * 8 + 1400


def test_the_time_is_visits_times_tokens_times_what_one_takes_here() -> None:
    # 100 bits on 4000 parameters are 1/40 bit each: 20 · √(1/40) visits of 100 tokens at 2 ms.
    inputs = dataclasses.replace(BASIS, pace=Pace(20.0, 0.5, 9), seconds_per_visit=0.002)
    [shard] = plan([50, 50], 50.0, inputs, rank=4).shards
    assert shard.training_s == pytest.approx(20 * math.sqrt(1 / 40) * 100 * 0.002)
    assert plan([SHARD_TOKENS] * 2, 50.0, inputs, rank=4).training_s == pytest.approx(
        2 * 20 * math.sqrt(50 / 4000) * SHARD_TOKENS * 0.002
    )
    for missing in ({"pace": None}, {"seconds_per_visit": None}):
        assert plan([250], 50.0, dataclasses.replace(inputs, **missing)).training_s is None


# --- limits


def test_only_the_ranks_of_a_server_are_used_and_the_next_higher_one_is() -> None:
    limits = RankLimits(choices=(16, 8, 32))
    density = GOALS["small"].density * PARAMETERS
    for needed, rank in ((1, 8), (8, 8), (9, 16), (17, 32), (32, 32)):
        [shard] = plan([5], needed * density, goal="small", limits=limits).shards
        assert (shard.rank, limits.at_least(needed)) == (rank, rank)
    assert limits.most == limits.at_least(33) == 32
    assert RankLimits(20, (8, 16, 32)).most == RankLimits(20, (8, 16, 32)).at_least(17) == 16


def test_without_choices_any_rank_up_to_the_highest_is_allowed() -> None:
    assert [RankLimits(5).at_least(rank) for rank in (1, 5, 6)] == [1, 5, 5]
    assert RankLimits().most == MAX_RANK


@pytest.mark.parametrize(
    ("highest", "choices", "message"),
    [
        (0, (), "at least 1, not 0"),
        (-3, (), "at least 1, not -3"),
        (128, (8, 0), "at least 1, not 0"),
        (4, (8, 16), "none of the ranks 8, 16 is at most 4"),
    ],
)
def test_limits_that_allow_no_rank_are_refused(highest: int, choices: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankLimits(highest, choices)


def test_where_a_shard_needs_more_than_the_highest_rank_there_are_more_shards() -> None:
    bits = GOALS["small"].density * PARAMETERS  # of one rank
    for records, rank, shards in ((20, 20, 1), (20, 10, 2), (20, 5, 4), (20, 1, 20)):
        result = plan([5] * records, bits, goal="small", limits=RankLimits(rank))
        assert held(result) == list(range(records))
        assert len(result.shards) == shards
        assert {shard.rank for shard in result.shards} == {rank}


def test_shards_are_parted_only_as_long_as_they_need_less_for_it() -> None:
    # Whatever their number, phone numbers ask for eleven tokens.
    result = plan([5] * 20, 1.0, KNOWN, vocabulary_for(4.0), goal="small", limits=RankLimits(4))
    assert [shard.rank for shard in result.shards] == [4]
    # Of random tokens half of the records ask for half as many.
    parted = plan_write([5] * 20, varied([1.0] * 20, [0.3] * 20), KNOWN, goal="small", limits=RankLimits(4))
    assert held(parted) == list(range(20))
    assert {shard.rank for shard in parted.shards} <= {3, 4} and len(parted.shards) == 2


def test_a_record_that_needs_more_alone_gets_the_highest_rank() -> None:
    bits = GOALS["small"].density * PARAMETERS
    result = plan_write([10, 10, 10], priced([bits, 6 * bits, bits]), BASIS, goal="small", limits=RankLimits(4))
    assert [(shard.first, shard.rank) for shard in result.shards] == [(0, 1), (1, 4), (2, 1)]


def test_short_records_before_a_long_one_are_parted_from_it_in_the_end() -> None:
    # Cut at equal lengths they stay together until the target is as short as they are.
    bits = GOALS["small"].density * PARAMETERS
    result = plan_write([1, 1, 1, 100], priced([bits] * 3 + [4 * bits]), BASIS, goal="small", limits=RankLimits(4))
    assert ranges(result) == [(0, 3), (3, 4)]


@given(
    records=st.lists(st.tuples(st.integers(1, 500), st.floats(0, 3000)), max_size=30),
    highest=st.integers(1, 10),
    goal=st.sampled_from(sorted(GOALS)),
    calibrated=st.booleans(),
    data=st.data(),
)
def test_cutting_again_ends_and_keeps_every_record_once_in_order(
    records: list[tuple[int, float]], highest: int, goal: str, calibrated: bool, data: st.DataObject
) -> None:
    lengths, costs = [length for length, _ in records], [cost for _, cost in records]
    inputs = KNOWN if calibrated else BASIS
    rank = data.draw(st.none() | st.integers(1, highest))
    result = plan_write(
        lengths,
        varied(costs, [0.01 * length for length in lengths]),
        inputs,
        goal=goal,
        rank=rank,
        limits=RankLimits(highest),
    )
    assert held(result) == list(range(len(records)))
    for shard in result.shards:
        assert 1 <= shard.rank <= highest
        assert shard.cost_bits <= 3.6 * PARAMETERS * highest + 1e-6
        if rank is None and shard.records > 1 and not calibrated:
            assert shard.cost_bits <= GOALS["small"].density * PARAMETERS * highest + 1e-6


@given(cost=st.floats(0, 3e5), factor=st.floats(1, 100), calibrated=st.booleans(), goal=st.sampled_from(sorted(GOALS)))
def test_a_value_that_costs_more_never_gets_a_lower_rank(
    cost: float, factor: float, calibrated: bool, goal: str
) -> None:
    inputs, limits = KNOWN if calibrated else BASIS, RankLimits(10**6)
    less, more = (plan([500], bits, inputs, goal=goal, limits=limits).shards[0] for bits in (cost, cost * factor))
    assert less.rank <= more.rank
    assert less.optimistic_rank <= more.optimistic_rank


# --- what does not fit


def test_a_value_of_more_than_3_6_bits_per_parameter_is_refused_before_anything() -> None:
    limits = RankLimits(4)
    assert plan([50], 3.6 * 4 * PARAMETERS, limits=limits).shards[0].rank == 4
    with pytest.raises(DoesNotFit, match=r"14,401 bits .* rank 4, .* at most 14,400 .* Allow a rank of 5 or") as caught:
        plan([50], 3.6 * 4 * PARAMETERS + 1, limits=limits)
    assert (caught.value.cost_bits, caught.value.rank) == (14_401, 4)
    with pytest.raises(DoesNotFit):
        plan([50], 3.6 * 4 * PARAMETERS + 1, limits=limits, rank=4)


def test_records_that_do_not_fit_together_are_parted_even_at_a_given_rank() -> None:
    for rank in (None, 4, 2):
        result = plan([50] * 4, 10_000.0, limits=RankLimits(4), rank=rank)
        assert ranges(result) == [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert {shard.rank for shard in result.shards} == {rank or 4}


def test_few_different_tokens_do_not_put_more_into_a_shard_than_it_can_hold() -> None:
    result = plan([50] * 4, 10_000.0, KNOWN, vocabulary_for(0.1), limits=RankLimits(4))
    assert len(result.shards) == 4


# --- requests


def test_a_given_rank_is_used_for_every_shard_whatever_the_cost() -> None:
    for bits in (0.0, 10_000.0):
        result = plan([SHARD_TOKENS, SHARD_TOKENS], bits, rank=3, limits=RankLimits(3))
        assert [shard.rank for shard in result.shards] == [3, 3]
        assert result.parameters == 6 * PARAMETERS
        assert result.cost_bits == 2 * bits


def test_the_fast_goal_is_the_default() -> None:
    assert plan([5], 100.0) == plan([5], 100.0, goal="fast")
    assert plan([5], 100.0).goal == "fast"


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_a_rank_outside_the_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 16, not {rank}"):
        plan([5], rank=rank, limits=RankLimits(16))


def test_a_rank_that_is_not_among_the_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="one of 8, 16, not 9"):
        plan([5], rank=9, limits=RankLimits(choices=(8, 16)))


def test_an_unknown_goal_is_refused() -> None:
    with pytest.raises(ValueError, match="fast, small"):
        plan([5], goal="huge")


# --- few parameters

LINEAR = dataclasses.replace(KNOWN, parameters_per_rank=960, matrices=2)  # a single module


def test_adapters_for_few_parameters_are_as_full_as_their_rank_carries() -> None:
    # The boundary asks for rank 3, be they ten records or a hundred. A token is one of 87.2, 6.45 bits; at 1.1 bits
    # per parameter, 2 % more asked for, a rank carries 160.6 tokens: 43 records of eleven at rank 3.
    vocabulary = vocabulary_for(1.8)

    def chosen(records: int, **options: object) -> list[tuple[int, int]]:
        shards = plan([10] * records, 1.0, LINEAR, vocabulary, goal="small", **options).shards
        return [(shard.records, shard.rank) for shard in shards]

    assert chosen(10) == [(10, 3)]
    assert chosen(43) == [(43, 3)]
    assert chosen(56) == [(56, 4)]  # two of 28 would take 2 · 3 ranks
    assert chosen(86) == [(43, 3), (43, 3)]  # as many parameters as one of rank 6, in fewer steps
    assert chosen(430) == [(43, 3)] * 10
    assert chosen(56, limits=RankLimits(3)) == [(28, 3), (28, 3)]
    assert chosen(86, limits=RankLimits(choices=(8, 16))) == [(86, 8)]
    assert chosen(56, rank=3) == [(56, 3)]


def test_what_a_rank_carries_is_no_matter_of_speed_nor_of_several_modules() -> None:
    vocabulary, lengths = vocabulary_for(1.8), [10] * 90
    several = plan(lengths, 1.0, dataclasses.replace(LINEAR, matrices=6), vocabulary, goal="small").shards
    assert [shard.rank for shard in several] == [3] * math.ceil(11 * 90 / (FILL * 160))
    assert len(plan(lengths, 1.0, LINEAR, vocabulary).shards) == 1


def test_a_rank_with_room_carries_less() -> None:
    roomy, vocabulary = dataclasses.replace(LINEAR, room=1.6), vocabulary_for(1.8)
    shards = plan([10] * 90, 1.0, roomy, vocabulary, goal="small").shards
    assert all(shard.rank >= 1.6 * rank_that_carries(11 * shard.records, vocabulary, roomy.size) for shard in shards)


# --- one adapter

NARROW = PlanInputs(PARAMETERS, matrices=2)  # a single module
WIDER = dataclasses.replace(NARROW, above=(Size(3000, 6), Size(9000, 28)))
HELD_RECORDS = NARROW.size.shard_tokens() // 11  # of ten tokens


def test_one_adapter_holds_all_records_whatever_a_shard_would_hold() -> None:
    lengths = [10] * (2 * HELD_RECORDS)
    assert len(plan(lengths).shards) > 1
    whole = plan(lengths, inputs=NARROW, one_adapter=True)
    assert ranges(whole) == [(0, len(lengths))]
    assert whole.one_adapter
    assert plan([], one_adapter=True).shards == ()


def test_one_adapter_begins_where_its_tokens_and_its_rank_fit() -> None:
    few, more = plan([10] * HELD_RECORDS, inputs=WIDER, one_adapter=True), [10] * (HELD_RECORDS + 1)
    assert [shard.rung for shard in few.shards] == [0]
    [shard] = plan(more, inputs=WIDER, one_adapter=True).shards
    assert (shard.rung, shard.parameters) == (1, 3000 * shard.rank)
    [shard] = plan([5], 50.0 * PARAMETERS, inputs=WIDER, one_adapter=True, limits=RankLimits(20)).shards
    assert (shard.rung, shard.parameters) == (1, 3000 * shard.rank)
    [shard] = plan([5], 100.0 * PARAMETERS, inputs=WIDER, one_adapter=True, limits=RankLimits(20)).shards
    assert shard.rung == 2
    assert plan(more, inputs=NARROW, one_adapter=True).shards[0].rung == 0  # where no other placement is known
    assert plan(more, one_adapter=True).shards[0].rung == 0  # several modules are not bounded by their width


def test_above_the_first_placement_nothing_is_known_of_success_and_time() -> None:
    known = dataclasses.replace(
        WIDER, law=RANK_LAW, boundary=BOUNDARY, calibrated=True, pace=Pace(20.0, 0.5, 9), seconds_per_visit=0.002
    )
    low, high = (plan([10] * count, 3.0, known, one_adapter=True) for count in (2, 2 * HELD_RECORDS))
    assert (low.calibrated, high.calibrated) == (True, False)
    assert low.success is not None and low.training_s is not None
    assert (high.success, high.training_s) == (None, None)
    assert high.warnings


def test_one_adapter_is_refused_only_by_the_placement_that_holds_most() -> None:
    bits = 3.6 * PARAMETERS * 8
    assert plan([5], 8.9 * bits, inputs=WIDER, one_adapter=True, limits=RankLimits(8)).shards[0].rung == 2
    with pytest.raises(DoesNotFit, match="into one adapter of rank 8"):
        plan([5], 9.1 * bits, inputs=WIDER, one_adapter=True, limits=RankLimits(8))


def test_a_plan_for_one_adapter_has_one_for_each_group_and_survives_json() -> None:
    import json

    whole = plan_groups([300, 2], [10] * 302, priced([2.0] * 302), WIDER, one_adapter=True)
    assert ranges(whole) == [(0, 300), (300, 302)]
    assert [shard.rung for shard in whole.shards] != [0, 0]
    assert Plan.of(json.loads(json.dumps(dataclasses.asdict(whole)))) == whole


# --- groups


@given(
    groups=st.lists(st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 3000)), max_size=10), max_size=5),
    highest=st.integers(2, 40),
)
def test_a_shard_never_holds_records_of_two_groups(groups: list[list[tuple[int, float]]], highest: int) -> None:
    sizes, records = [len(group) for group in groups], [record for group in groups for record in group]
    lengths, costs = [length for length, _ in records], [cost for _, cost in records]
    whole = plan_groups(sizes, lengths, priced(costs), BASIS, goal="small", limits=RankLimits(highest))
    assert held(whole) == list(range(len(records)))
    group_of = [number for number, size in enumerate(sizes) for _ in range(size)]
    for shard in whole.shards:
        own = slice(shard.first, shard.first + shard.records)
        assert len(set(group_of[own])) == 1
        assert shard.length == sum(lengths[own])
        assert shard.cost_bits == pytest.approx(sum(costs[own]), abs=1e-6)


def test_each_group_is_planned_as_if_it_were_alone() -> None:
    first, second = [10] * 250, [20] * 30
    whole = plan_groups([250, 30], first + second, priced([2.0] * 280), BASIS)
    alone = [plan(lengths, 2.0) for lengths in (first, second)]
    assert [dataclasses.replace(shard, first=0) for shard in whole.shards] == [
        dataclasses.replace(shard, first=0) for one in alone for shard in one.shards
    ]
    assert len(whole.warnings) == 1  # said once
    assert plan_groups([], [], priced([]), BASIS).shards == ()
