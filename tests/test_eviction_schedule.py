# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of eviction against simulations that only count blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_roco.eviction_schedule import NEVER, EvictionSchedule

SHAPES = [(16, 1, 1), (16, 4, 2), (16, 3, 5), (32, 8, 1), (1, 7, 3), (128, 2, 2)]

schedules = st.builds(
    lambda block_size, budget, stride: EvictionSchedule(
        block_size=block_size, budget=budget * block_size, stride=stride * block_size
    ),
    st.sampled_from([1, 2, 16]),
    st.integers(1, 8),
    st.integers(1, 8),
)


def every_schedule() -> list[EvictionSchedule]:
    return [EvictionSchedule(bs, b * bs, s * bs) for bs, b, s in SHAPES]


@pytest.mark.parametrize("schedule", every_schedule(), ids=str)
def test_evicted_blocks_are_what_a_token_by_token_count_gives(
    schedule: EvictionSchedule,
) -> None:
    evicted = 0
    for n in range(20 * (schedule.budget + schedule.stride)):
        full_and_kept = n // schedule.block_size - evicted
        if full_and_kept == schedule.budget_blocks + schedule.stride_blocks:
            evicted += schedule.stride_blocks
        assert schedule.evicted_blocks(n) == evicted


@pytest.mark.parametrize("schedule", every_schedule(), ids=str)
def test_nothing_is_evicted_before_budget_and_stride_are_full(
    schedule: EvictionSchedule,
) -> None:
    first = schedule.budget + schedule.stride
    assert schedule.evicted_blocks(first - 1) == 0
    assert schedule.evicted_blocks(first) == schedule.stride_blocks


@given(schedules, st.integers(0, 2000), st.integers(0, 2000))
def test_evicted_blocks_never_shrink(
    schedule: EvictionSchedule, n: int, more: int
) -> None:
    assert schedule.evicted_blocks(n) <= schedule.evicted_blocks(n + more)


@given(schedules, st.integers(0, 2000))
def test_next_eviction_is_the_first_length_with_more(
    schedule: EvictionSchedule, n: int
) -> None:
    evicted = schedule.evicted_blocks(n)
    first = next(
        length
        for length in range(n + 1, 10**6)
        if schedule.evicted_blocks(length) > evicted
    )
    assert schedule.next_eviction(n) == first


@given(schedules, st.lists(st.integers(1, 300), max_size=40))
def test_attended_tokens_stay_within_their_bounds(
    schedule: EvictionSchedule, steps: list[int]
) -> None:
    before = 0
    for queries in steps:
        after = before + queries
        attended = schedule.live_tokens(after, before)
        assert queries <= attended < schedule.budget + schedule.stride + queries
        kept = schedule.live_tokens(after, after)
        assert kept <= schedule.max_live_tokens() < schedule.budget + schedule.stride
        before = after


@given(schedules, st.lists(st.integers(1, 300), max_size=40))
def test_the_dying_range_is_full_when_it_goes(
    schedule: EvictionSchedule, steps: list[int]
) -> None:
    after = 0
    for queries in steps:
        after += queries
        evicted = schedule.evicted_blocks(after)
        if evicted:
            gap_end = (schedule.budget_blocks + evicted) * schedule.block_size
            assert gap_end <= after


@given(
    schedules,
    st.integers(1, 3),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 96), st.booleans()), max_size=60),
)
def test_held_blocks_stay_within_their_bound(
    schedule: EvictionSchedule,
    steps_in_flight: int,
    chunk_blocks: int,
    steps: list[tuple[int, bool]],
) -> None:
    """Blocks come when a step is scheduled, and go before a later one is."""
    chunk = chunk_blocks * schedule.block_size
    bound = schedule.max_blocks(steps_in_flight * chunk)
    in_flight: list[int] = []
    scheduled = processed = 0
    for queries, processes_early in steps:
        queries = min(queries, chunk)
        while len(in_flight) == steps_in_flight or (in_flight and processes_early):
            processed += in_flight.pop(0)
        in_flight.append(queries)
        scheduled += queries
        allocated = -(-scheduled // schedule.block_size)
        assert allocated - schedule.evicted_blocks(processed) <= bound


@pytest.mark.parametrize("schedule", every_schedule(), ids=str)
@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_the_bound_on_held_blocks_is_hardly_above_the_worst_case(
    schedule: EvictionSchedule, steps_in_flight: int
) -> None:
    in_flight = steps_in_flight * 4 * schedule.block_size
    most = max(
        -(-(processed + in_flight) // schedule.block_size)
        - schedule.evicted_blocks(processed)
        for processed in range(3 * (schedule.budget + schedule.stride))
    )
    slack = schedule.max_blocks(in_flight) - most
    # a block of one token is never held in part
    assert slack == (1 if schedule.block_size > 1 else 2)


@given(schedules, st.integers(0, 400), st.integers(0, 800), st.integers(0, 400))
def test_nothing_is_evicted_from_a_length_on(
    schedule: EvictionSchedule, until: int, n: int, more: int
) -> None:
    ends = replace(schedule, until=until)
    evicted = ends.evicted_blocks(n)
    assert evicted == schedule.evicted_blocks(min(n, until))
    assert evicted % schedule.stride_blocks == 0
    assert evicted <= ends.evicted_blocks(n + more)
    assert ends.evicted_blocks(until + more) == ends.evicted_blocks(until)
    following = ends.next_eviction(n)
    assert following == NEVER or following <= until
    last = min(following, until + more + n) - 1
    assert ends.evicted_blocks(max(n, last)) == evicted
    if following < NEVER:
        assert ends.evicted_blocks(following) > evicted


@given(
    schedules,
    st.integers(0, 200),
    st.integers(1, 400),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_held_blocks_stay_within_their_bound_when_eviction_ends(
    schedule: EvictionSchedule,
    until: int,
    length: int,
    steps_in_flight: int,
    chunk_blocks: int,
) -> None:
    ends = replace(schedule, until=until)
    in_flight = steps_in_flight * chunk_blocks * ends.block_size
    bound = ends.max_blocks(in_flight, length)
    for scheduled in range(1, length + 1):
        allocated = -(-scheduled // ends.block_size)
        processed = max(0, scheduled - in_flight)
        assert allocated - ends.evicted_blocks(processed) <= bound
