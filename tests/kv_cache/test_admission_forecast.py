# SPDX-License-Identifier: Apache-2.0
"""What is foreseen, against the blocks that sequences then take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.kv_cache.admission_forecast import AdmissionForecast

SIZE = 4
sequences = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 100)),
    min_size=1,
    max_size=5,
)


def held(schedule: EvictionSchedule, length: int) -> int:
    return -(-length // SIZE) - schedule.evicted_blocks(length - 1)


@given(sequences)
def test_strides_of_several_lengths_are_never_foreseen_too_low(
    shapes: list[tuple[int, int, int]],
) -> None:
    forecast = AdmissionForecast()
    running = []
    for index, (budget, stride, ahead) in enumerate(shapes):
        schedule = EvictionSchedule(SIZE, budget * SIZE, stride * SIZE)
        length = schedule.next_eviction(0) + 1 + ahead
        running.append((schedule, length))
        forecast.evict(str(index), schedule)
        forecast.update(str(index), held(schedule, length))
    now = sum(held(schedule, length) for schedule, length in running)
    most = max(
        sum(held(schedule, length + step) for schedule, length in running)
        for step in range(200)
    )
    assert now + forecast.blocks() >= most
    for index in range(len(running)):
        forecast.drop(str(index))
    assert forecast.blocks() == 0


@pytest.mark.parametrize("ends", [True, False])
def test_who_evicts_no_more_is_not_foreseen(ends: bool) -> None:
    forecast = AdmissionForecast()
    schedule = EvictionSchedule(SIZE, 4 * SIZE, 2 * SIZE)
    forecast.evict("a", schedule)
    forecast.update("a", 5)
    assert forecast.blocks() > 0
    if ends:
        forecast.evict("a", None)
    else:
        forecast.drop("a")
    forecast.update("a", 6)
    assert forecast.blocks() == 0
