# SPDX-License-Identifier: Apache-2.0
"""Which survivors go over which victims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_roco import policy
from vllm_roco.eviction_schedule import EvictionSchedule


@pytest.mark.parametrize(
    ("victims", "moves"),
    [
        pytest.param([4, 5], [], id="the outgoing blocks go as they are"),
        pytest.param([0, 2], [(4, 0), (5, 2)], id="all of it survives"),
        pytest.param([1, 4], [(5, 1)], id="one survives"),
        pytest.param([3, 5], [(4, 3)], id="the other survives"),
        pytest.param([], [], id="nothing goes"),
    ],
)
def test_moves_by_hand(victims: list[int], moves: list[tuple[int, int]]) -> None:
    planned = policy.plan_moves(torch.tensor(victims, dtype=torch.int64), 4)
    assert planned == moves


@given(
    st.integers(1, 12).flatmap(
        lambda budget: st.integers(1, 12).flatmap(
            lambda victims: st.tuples(
                st.just(budget),
                st.permutations(range(budget + victims)).map(
                    lambda order: sorted(order[:victims])
                ),
            )
        )
    )
)
def test_moves_leave_nothing_needed_in_the_dying_range(
    example: tuple[int, list[int]],
) -> None:
    budget, victims = example
    places = list(range(budget + len(victims)))
    survivors = set(places) - set(victims)
    moves = policy.plan_moves(torch.tensor(victims), budget)
    for source, destination in moves:
        places[destination] = source
    assert set(places[:budget]) == survivors
    assert len(moves) == sum(place < budget for place in victims)


@given(
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(0, 8),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_recent_drops_the_oldest(
    budget_blocks: int, stride_blocks: int, sink_blocks: int, steps: list[int]
) -> None:
    """Over many steps, some of them larger than all resident blocks."""
    sink_blocks = min(sink_blocks, budget_blocks)
    schedule = EvictionSchedule(
        block_size=1, budget=budget_blocks, stride=stride_blocks
    )
    # logical index of the block at every place of the row
    row: list[int] = []
    kept: list[int] = []
    for blocks in steps:
        before = schedule.evicted_blocks(len(row))
        arrived = range(len(row), len(row) + blocks)
        row += arrived
        kept += arrived
        after = schedule.evicted_blocks(len(row))
        oldest_first = [block for block in kept if block >= sink_blocks]
        for block in oldest_first[: after - before]:
            kept.remove(block)

        live = [*range(budget_blocks), *range(budget_blocks + before, len(row))]
        for source, destination in policy.plan_recent_moves(
            before, after, budget_blocks, sink_blocks
        ):
            assert source >= budget_blocks
            assert sink_blocks <= destination < budget_blocks
            row[live[destination]] = row[live[source]]
        live = [*range(budget_blocks), *range(budget_blocks + after, len(row))]
        assert sorted(row[place] for place in live[: len(row) - after]) == kept


def test_recent_moves_no_block_twice_in_a_large_step() -> None:
    # a step of 20 blocks through a ring of 3: only the last 3 are worth a copy
    moves = policy.plan_recent_moves(0, 20, 4, 1)
    assert moves == [(21, 3), (22, 1), (23, 2)]


def test_recent_with_sinks_alone_moves_nothing() -> None:
    assert policy.plan_recent_moves(0, 20, 4, 4) == []
