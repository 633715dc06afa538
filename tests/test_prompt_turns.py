# SPDX-License-Identifier: Apache-2.0
"""Prompts are read one after another once a step has enough of them."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from tests.scheduler_driver import Driver, Setup
from vllm_roco.scheduler import MAX_PASSED_OVER

# B 4, S 2, chunk 2 blocks: nothing is evicted up to 23 tokens, so chunks begin at 16
TURNS = [
    Setup(max_num_batched_tokens=500, prefill_tokens=16),
    Setup(
        max_num_batched_tokens=500,
        prefill_tokens=16,
        asynchronous=True,
        max_steps_in_flight=2,
    ),
]
both = pytest.mark.parametrize("setup", TURNS, ids=["sync", "async"])
NEVER = 10**6
LONG = 64


def changed(setup: Setup, **changes: Any) -> Setup:
    return Setup(**{**vars(setup), **changes})


@both
def test_prompts_are_read_in_order_of_arrival(setup: Setup) -> None:
    """16 were read side by side, and all were done as late as the last one."""
    driver = Driver(setup)
    first, second, third, fourth = (driver.add(LONG) for _ in range(4))
    assert driver.step() == {first: 16}
    # what was read in this step is not enough before the second
    assert driver.step() == {first: 8, second: 16}
    for _ in range(4):
        assert driver.step() == {first: 8, second: 8}
    # its last chunk, and the second's
    assert driver.step() == {first: 8, second: 8}
    assert driver.step() == {second: 8, third: 16}
    assert driver.step() == {third: 8, fourth: 16}
    driver.drain(20)


@both
def test_the_mean_prompt_is_done_sooner_and_the_last_no_later(setup: Setup) -> None:
    """A step takes as long as its tokens; below 16 the GPU is not full."""

    def times(prefill_tokens: int) -> list[int]:
        driver = Driver(changed(setup, prefill_tokens=prefill_tokens), max_num_seqs=8)
        requests = [driver.add(LONG) for _ in range(8)]
        done: dict[str, int] = {}
        clock = 0
        while driver.scheduler.has_requests():
            step = driver.step()
            clock += max(16, sum(step.values())) if step else 0
            for request_id in requests:
                if driver.outputs[request_id]:
                    done.setdefault(request_id, clock)
        return [done[request_id] for request_id in requests]

    turns, together = times(setup.prefill_tokens), times(NEVER)
    assert turns == sorted(turns)
    assert fmean(turns) < 0.75 * fmean(together)
    assert max(turns) <= 1.1 * max(together)


@both
def test_steps_of_prompts_that_evict_nothing_stay_as_they_are(setup: Setup) -> None:
    """They are cut where vLLM cuts them, too."""

    def steps(prefill_tokens: int) -> list[dict[str, int]]:
        driver = Driver(
            changed(setup, prefill_tokens=prefill_tokens, max_num_batched_tokens=70),
            max_num_seqs=16,
        )
        for index in range(20):
            driver.add(8 + 5 * (index % 4))
        return [driver.step() for _ in range(8)]

    found = steps(1)
    assert sum(found[0].values()) == 70
    assert found == steps(NEVER)


@both
def test_the_end_of_a_prompt_joins_any_step(setup: Setup) -> None:
    driver = Driver(changed(setup, prefill_tokens=1))
    first, second = driver.add(LONG), driver.add(20)
    third, fourth = driver.add(LONG), driver.add(20)
    assert driver.step() == {first: 16, second: 20, fourth: 20}
    for _ in range(6):
        step = driver.step()
        assert step[first] == 8
        assert third not in step
    assert driver.step() == {third: 16}
    driver.drain(20)


@both
def test_short_prompts_do_not_put_off_whose_turn_it_is(setup: Setup) -> None:
    driver = Driver(changed(setup, prefill_tokens=1), max_num_seqs=8)
    first, second = driver.add(LONG), driver.add(LONG)
    ends: dict[str, int] = {}
    for _ in range(30):
        short = driver.add(20)
        step = driver.step()
        assert second in ends or short in step or second in step
        for request_id in (first, second):
            if driver.outputs[request_id]:
                ends.setdefault(request_id, driver.num_steps)
    in_flight = setup.max_steps_in_flight - 1
    assert ends == {first: 7 + in_flight, second: 14 + in_flight}


@both
def test_who_waits_for_a_turn_counts_as_waiting(setup: Setup) -> None:
    """Data parallelism balances on those that wait for capacity."""
    driver = Driver(setup)
    for _ in range(7):
        driver.add(LONG)
    driver.step()
    for num_running in (2, 2):
        driver.step()
        stats = driver.scheduler.make_stats()
        assert stats is not None
        assert stats.num_running_reqs == num_running
        assert stats.num_waiting_reqs == 7 - num_running
        assert stats.num_skipped_waiting_reqs == 0
    assert driver.scheduler.prefill_capacity_bound


def test_no_more_are_passed_over_than_a_step_can_afford() -> None:
    driver = Driver(changed(TURNS[0], prefill_tokens=1))
    driver.add(LONG)
    for _ in range(MAX_PASSED_OVER + 1):
        driver.add(LONG)
    short = driver.add(4)
    for _ in range(7):
        assert short not in driver.step()
    # the second is let in, so that one fewer waits before it
    assert short in driver.step()


@both
def test_the_rest_behind_a_prefix_joins_any_step(setup: Setup) -> None:
    driver = Driver(changed(setup, prefill_tokens=1, caching=True))
    header = [2 + place % 50 for place in range(LONG)]
    first = driver.add(LONG, 4, prompt=header)
    while first not in driver.finished:
        driver.step()
    other, waiting = (driver.add(LONG, prompt=[token] * LONG) for token in (60, 61))
    again = driver.add(LONG + 3, prompt=[*header, 1, 1, 1])
    step = driver.step()
    assert step[other] == 16
    assert step[again] == 3
    assert waiting not in step
    driver.drain(40)


@both
def test_decodes_take_part_in_every_step(setup: Setup) -> None:
    driver = Driver(changed(setup, prefill_tokens=1))
    decoding = driver.add(4, 100)
    driver.step()
    for _ in range(3):
        driver.add(4 * LONG)
    for _ in range(80):
        assert driver.step()[decoding] == 1


@both
@pytest.mark.parametrize("prefill_tokens", [1, 16, NEVER])
def test_chunks_end_where_they_always_do(setup: Setup, prefill_tokens: int) -> None:
    """`PagedWorker` compares each eviction with that of the request alone."""
    driver = Driver(changed(setup, prefill_tokens=prefill_tokens), max_num_seqs=8)
    requests = [driver.add(30 + 9 * index, 20) for index in range(8)]
    lengths = dict.fromkeys(requests, 0)
    ends: dict[str, list[int]] = {request_id: [] for request_id in requests}
    while driver.scheduler.has_requests():
        for request_id, num_tokens in driver.step().items():
            lengths[request_id] += num_tokens
            ends[request_id].append(lengths[request_id])
    for index, request_id in enumerate(requests):
        length = 30 + 9 * index
        chunks = [end for end in ends[request_id] if end < length]
        assert chunks == list(range(16, length, 8))
        assert length in ends[request_id]


def test_a_running_prompt_waits_for_those_ahead() -> None:
    """A resumed request reads a token up to where it evicts, and then whole chunks."""
    driver = Driver(changed(TURNS[0], prefill_tokens=8))
    first = driver.add(13, 60)
    while len(driver.outputs[first]) < 27:
        driver.step()
    driver.preempt_all()
    assert driver.step() == {first: 23}
    second = driver.add(LONG)
    assert driver.step() == {first: 1, second: 16}
    for _ in range(2):
        assert driver.step() == {first: 8}
    assert driver.step() == {first: 1, second: 8}
    driver.drain(60)


def test_who_waits_for_a_turn_holds_nothing() -> None:
    driver = Driver(TURNS[0])
    for _ in range(4):
        driver.add(LONG)
    for _ in range(4):
        driver.step()
        assert len(driver.manager.held.requests) <= 2
