"""A plan puts every record into one shard, in order and within the limits, and gives each shard a rank."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramem.capacity import GOALS, Plan, plan_write

SHARD_RECORDS, SHARD_TOKENS = GOALS["fast"].shard_records, GOALS["fast"].shard_tokens
PARAMETERS = 1000  # per rank


def plan(lengths: Sequence[int], bits_each: float = 1.0, **options: object) -> Plan:
    return plan_write(lengths, [bits_each] * len(lengths), PARAMETERS, **options)


def ranges(plan: Plan) -> list[tuple[int, int]]:
    return [(shard.first, shard.first + shard.records) for shard in plan.shards]


# --- shards


def test_nothing_to_write_needs_no_shard() -> None:
    empty = plan([])
    assert (empty.shards, empty.parameters, empty.cost_bits) == ((), 0, 0)


def test_a_few_records_share_one_shard() -> None:
    [shard] = plan_write([3, 4, 5], [10.0, 20.0, 30.5], PARAMETERS, rank=2).shards
    assert (shard.first, shard.records, shard.length, shard.cost_bits) == (0, 3, 12, 60.5)
    assert (shard.rank, shard.parameters) == (2, 2 * PARAMETERS)


def test_as_many_records_as_a_shard_holds_share_one_and_one_more_needs_two() -> None:
    assert ranges(plan([1] * SHARD_RECORDS)) == [(0, SHARD_RECORDS)]
    assert len(plan([1] * (SHARD_RECORDS + 1)).shards) == 2


def test_short_records_before_long_ones_keep_to_the_limit_of_records() -> None:
    assert ranges(plan([1] * (SHARD_RECORDS + 1) + [SHARD_TOKENS] * 2)) == [
        (0, SHARD_RECORDS),
        (SHARD_RECORDS, SHARD_RECORDS + 1),
        (SHARD_RECORDS + 1, SHARD_RECORDS + 2),
        (SHARD_RECORDS + 2, SHARD_RECORDS + 3),
    ]


def test_as_many_tokens_as_a_shard_holds_share_one_and_one_more_needs_two() -> None:
    half = SHARD_TOKENS // 2
    assert ranges(plan([half, SHARD_TOKENS - half])) == [(0, 2)]
    assert ranges(plan([half + 1, SHARD_TOKENS - half])) == [(0, 1), (1, 2)]


def test_shards_are_of_nearly_equal_size() -> None:
    sizes = [shard.records for shard in plan([1] * (2 * SHARD_RECORDS + 10)).shards]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 2


def test_a_record_longer_than_a_shard_gets_one_of_its_own() -> None:
    giant = SHARD_TOKENS + 1
    assert ranges(plan([1, 1, giant, 1])) == [(0, 2), (2, 3), (3, 4)]
    assert ranges(plan([giant, giant])) == [(0, 1), (1, 2)]
    assert ranges(plan([giant, 1, 1])) == [(0, 1), (1, 3)]


LENGTHS = st.one_of(st.integers(1, 30), st.integers(1, SHARD_TOKENS), st.integers(SHARD_TOKENS, 3 * SHARD_TOKENS))


@given(lengths=st.lists(LENGTHS, max_size=40), copies=st.integers(1, max(1, SHARD_RECORDS // 10)))
@settings(deadline=None)
def test_every_record_is_in_one_shard_in_order_within_the_limits(lengths: list[int], copies: int) -> None:
    lengths = lengths * copies
    costs = [float(index) for index in range(len(lengths))]
    shards = plan_write(lengths, costs, PARAMETERS).shards
    assert [i for shard in shards for i in range(shard.first, shard.first + shard.records)] == list(range(len(lengths)))
    for shard in shards:
        own = slice(shard.first, shard.first + shard.records)
        assert 1 <= shard.records <= SHARD_RECORDS
        assert shard.records == 1 or shard.length <= SHARD_TOKENS
        assert shard.length == sum(lengths[own])
        assert shard.cost_bits == sum(costs[own])
        assert shard.parameters == shard.rank * PARAMETERS


# --- ranks


@pytest.mark.parametrize("goal", GOALS)
def test_the_rank_is_guessed_from_the_cost_of_the_values(goal: str) -> None:
    wanted = 3 * GOALS[goal].min_rank + 1
    bits = GOALS[goal].density * PARAMETERS * (wanted - 0.5)
    assert plan([5], bits, goal=goal, max_rank=10 * wanted).shards[0].rank == wanted
    # the cost of a shard is that of all its records
    assert plan([5] * 4, bits / 4, goal=goal, max_rank=10 * wanted).shards[0].rank == wanted


@pytest.mark.parametrize("goal", GOALS)
def test_a_guess_keeps_to_the_smallest_and_the_largest_rank(goal: str) -> None:
    assert plan([5], 0.0, goal=goal).shards[0].rank == GOALS[goal].min_rank
    largest = GOALS[goal].min_rank + 3
    assert plan([5], 1e9, goal=goal, max_rank=largest).shards[0].rank == largest
    assert plan([5], 0.0, goal=goal, max_rank=1).shards[0].rank == 1


def test_each_shard_has_a_rank_of_its_own() -> None:
    giant = GOALS["small"].shard_tokens + 1
    bits = GOALS["small"].density * PARAMETERS
    cheap = (GOALS["small"].min_rank + 1) * bits
    shards = plan_write([giant, giant], [cheap, 3 * cheap], PARAMETERS, goal="small", max_rank=10**6).shards
    assert [shard.rank for shard in shards] == [math.ceil(cheap / bits), math.ceil(3 * cheap / bits)]


def test_a_given_rank_is_used_for_every_shard_whatever_the_cost() -> None:
    for bits in (0.0, 1e9):
        result = plan([SHARD_TOKENS, SHARD_TOKENS], bits, rank=3, max_rank=3)
        assert [shard.rank for shard in result.shards] == [3, 3]
        assert result.parameters == 6 * PARAMETERS
        assert result.cost_bits == 2 * bits


def test_the_fast_goal_is_the_default() -> None:
    assert plan([5], 100.0) == plan([5], 100.0, goal="fast")
    assert plan([5], 100.0).goal == "fast"


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_a_rank_outside_the_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 16, not {rank}"):
        plan([5], rank=rank, max_rank=16)


def test_an_unknown_goal_is_refused() -> None:
    with pytest.raises(ValueError, match="fast, small"):
        plan([5], goal="huge")


def test_a_shard_can_be_moved_behind_others() -> None:
    [shard] = plan([5, 6]).shards
    moved = shard.moved(10)
    assert (moved.first, moved.records, moved.length, moved.rank) == (10, 2, 11, shard.rank)
    assert shard.first == 0
