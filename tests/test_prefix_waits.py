# SPDX-License-Identifier: Apache-2.0
"""Requests that wait while another one reads their prefix, or for their turn."""

from __future__ import annotations

import pytest
from vllm.v1.request import Request

from tests.scheduler_driver import BLOCK_SIZE, Driver
from tests.test_prefix_scheduler import LAST, PROMPT, cache_of, driver_of, modes
from vllm_roco.prefix_scheduler import MAX_WAITS_PER_STEP


@modes
def test_a_burst_reads_its_prefix_once(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """A dozen of them had read it before the first one was done with it."""
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    for number in range(12):
        driver.add(0, 10, prompt=PROMPT + [number] * 5)
    read = 0
    while driver.scheduler.has_requests() or driver.num_in_flight:
        scheduled = driver.step()
        read += sum(tokens for tokens in scheduled.values() if tokens > 1)
    # all that is behind the last common chunk is each request's own
    assert read == 12 * (83 - LAST) + LAST
    assert cache_of(driver).store.num_hits == 11
    assert cache_of(driver).num_waits == 11


@modes
def test_who_waits_begins_in_the_step_that_publishes(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """It began a step later, and the reader's last tokens had a step of their own."""
    driver = driver_of(
        asynchronous,
        max_steps_in_flight=max_steps_in_flight,
        max_num_batched_tokens=40,
    )
    names = [driver.add(0, 1, prompt=PROMPT) for _ in range(3)]
    steps = [driver.step() for _ in range(9)]
    assert steps[-1] == dict.fromkeys(names, len(PROMPT) - LAST)
    driver.drain(100)
    counts = cache_of(driver).counts()
    assert (counts.published_snapshots, counts.snapshot_hits) == (1, 2)


@modes
def test_who_waits_goes_on_when_a_later_reader_publishes_first(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """It waited on for the one that had begun first, and which was far behind."""
    driver = driver_of(
        asynchronous,
        max_steps_in_flight=max_steps_in_flight,
        max_num_batched_tokens=44,
    )
    # leaves a snapshot where the others part from it
    driver.add(0, 1, prompt=PROMPT[:50] + [1] * 30)
    for _ in range(4):
        driver.step()
    # log-probabilities of a prompt want all of it read
    driver.add(0, 1, prompt=PROMPT, skip_reading_prefix_cache=True)
    driver.step()
    waiting = driver.add(0, 1, prompt=PROMPT)
    for _ in range(2):
        assert waiting not in driver.step()
    cache = cache_of(driver)
    assert cache.counts().published_snapshots == 1
    overtaking = driver.add(0, 1, prompt=[*PROMPT, 1])
    steps = [driver.step() for _ in range(5)]
    assert [step.get(overtaking) for step in steps] == [8, 8, 8, 7, None]
    assert [step.get(waiting) for step in steps] == [None] * 4 + [len(PROMPT) - LAST]
    driver.drain(100)
    assert cache.counts().saved_tokens == 48 + LAST


def test_who_waits_goes_on_when_there_are_blocks_as_long() -> None:
    """It waited on for a snapshot of the same tokens."""
    driver = driver_of(max_num_batched_tokens=12)
    driver.add(0, 1, prompt=PROMPT)
    waiting = driver.add(0, 1, prompt=PROMPT[:18])
    assert waiting not in driver.step()
    cache, pool = cache_of(driver), driver.manager.block_pool
    request = driver.scheduler.requests[waiting]
    assert cache.must_wait(request)
    blocks = pool.get_new_blocks(4)
    group_id = driver.manager.kv_cache_group_id
    pool.cache_full_blocks(request, blocks, 0, 4, BLOCK_SIZE, group_id)
    assert not cache.must_wait(request)
    hit = cache.offer(request)
    assert hit is not None
    assert hit.row == blocks


LONG = [token % 90 + 1 for token in range(200)]
"""Of a sequence that evicts at 72 for the first time, read in one step up to there."""


@pytest.mark.parametrize("num_steps", [0, 1])
def test_nobody_waits_for_a_reader_that_has_gone_past(num_steps: int) -> None:
    """Its step was, or had been, too long already to end where others want it to.

    They waited for another one or two steps, until it was known to be past.
    """
    driver = driver_of(budget=64, max_num_batched_tokens=204)
    reader = driver.add(0, 1, prompt=LONG)
    for _ in range(num_steps):
        driver.step()
    # end with the 40 tokens that they share with it, so that nobody knew of the place
    names = [driver.add(0, 90, prompt=LONG[:40] + [7] * own) for own in (0, 1, 2)]
    step = driver.step()
    assert step[reader] == (8 if num_steps else 64)
    # one reads, and the others wait for that one
    assert [step.get(name) for name in names] == [40, None, None]
    driver.drain(500)


def test_one_of_those_that_come_behind_a_reader_takes_over() -> None:
    driver = driver_of(budget=64, max_num_batched_tokens=204)
    driver.add(0, 1, prompt=LONG)
    driver.step()
    names = [driver.add(0, 1, prompt=LONG[:42] + [own] * 60) for own in range(3)]
    steps = [driver.step() for _ in range(2)]
    assert [[step.get(name) for name in names] for step in steps] == [
        [40, None, None],
        [24, 24, 24],
    ]
    driver.drain(100)
    assert cache_of(driver).counts().saved_tokens == 2 * 40


@pytest.mark.parametrize("spare_blocks", range(4, 40, 4))
def test_a_snapshot_is_made_before_those_that_wait_take_its_room(
    spare_blocks: int,
) -> None:
    driver = driver_of(spare_blocks=spare_blocks, max_num_batched_tokens=40)
    names = [driver.add(0, 9, prompt=[*PROMPT, n]) for n in range(4)]
    driver.drain(1000)
    assert {len(driver.outputs[name]) for name in names} == {9}
    counts = cache_of(driver).counts()
    assert (counts.published_snapshots, counts.snapshot_hits) == (1, 3)


def test_a_header_that_is_waited_for_is_published_on_the_way() -> None:
    """The one that reads it goes on, and is cut where the others end."""
    driver = driver_of()
    driver.add(0, 1, prompt=PROMPT)
    header = PROMPT[:50]
    driver.add(0, 1, prompt=header)
    driver.add(0, 1, prompt=header)
    driver.drain(100)
    assert cache_of(driver).store.num_hits == 2
    assert cache_of(driver).store.num_saved_tokens == 96


@modes
def test_who_waits_for_its_turn_asks_for_a_snapshot(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """Passed over in each step, it had asked nobody, and read all of its prompt."""
    driver = driver_of(
        asynchronous,
        max_steps_in_flight=max_steps_in_flight,
        prefill_tokens=1,
        max_num_batched_tokens=40,
    )
    driver.add(0, 1, prompt=PROMPT)
    driver.add(0, 1, prompt=PROMPT[:50])
    driver.drain(100)
    assert cache_of(driver).store.num_saved_tokens == 48
    assert cache_of(driver).num_waits == 1


def test_who_waits_for_its_turn_asks_anew_only_if_readers_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It walked the ends of its chunks in each step, and so did all that waited."""
    driver = driver_of(prefill_tokens=1, max_num_batched_tokens=40)
    cache = cache_of(driver)
    asked: list[str] = []
    ask = cache.must_wait

    def noted(request: Request) -> bool:
        asked.append(request.request_id)
        return ask(request)

    monkeypatch.setattr(cache, "must_wait", noted)
    first = driver.add(0, 1, prompt=PROMPT)
    waiting = driver.add(0, 1, prompt=[token + 1 for token in PROMPT])
    for _ in range(3):
        assert waiting not in driver.step()
    assert asked.count(waiting) == 1
    driver.abort(first)
    assert waiting in driver.step()
    driver.drain(100)


def test_others_go_ahead_of_those_that_wait() -> None:
    driver = driver_of(max_num_batched_tokens=40)
    driver.add(0, 1, prompt=PROMPT)
    waiting = driver.add(0, 1, prompt=PROMPT)
    other = driver.add(0, 1, prompt=[1] * 12)
    driver.step()
    driver.step()
    assert other in driver.finished
    assert waiting not in driver.finished
    driver.drain(100)


def check_who_waits_goes_on(
    driver: Driver, prompt: list[int], end: str, num_steps: int
) -> None:
    """Let a request that another one waits for end, by an abort or a preemption.

    Args:
        driver: Has room for both.
        prompt: Of both.
        end: "abort" or "preempt".
        num_steps: Steps in which it reads, in the last at least while the other waits.
    """
    reader = driver.add(0, 1, prompt=prompt)
    waiting = driver.add(0, 1, prompt=prompt)
    for _ in range(num_steps):
        step = driver.step()
        assert reader in step
        assert waiting not in step
    assert cache_of(driver).num_waits == 1
    assert reader not in driver.finished
    if end == "abort":
        driver.abort(reader)
        assert waiting in driver.step()
    else:
        driver.preempt_all()
    driver.drain(100)
    assert waiting in driver.finished


ends = pytest.mark.parametrize("end", ["abort", "preempt"])


@pytest.mark.parametrize("num_steps", [2, 3])
@ends
def test_who_waits_goes_on_when_the_reader_ends(end: str, num_steps: int) -> None:
    check_who_waits_goes_on(driver_of(), PROMPT, end, num_steps)


def test_a_long_queue_of_waiting_requests_is_not_walked_to_its_end() -> None:
    driver = driver_of(max_num_batched_tokens=40)
    driver.add(0, 1, prompt=PROMPT)
    for _ in range(MAX_WAITS_PER_STEP + 20):
        driver.add(0, 1, prompt=PROMPT)
    last = driver.add(0, 1, prompt=[1] * 4)
    driver.step()
    assert cache_of(driver).num_waits == MAX_WAITS_PER_STEP + 1
    driver.drain(1000)
    assert last in driver.finished
    assert cache_of(driver).store.num_saved_tokens == (MAX_WAITS_PER_STEP + 20) * LAST


@pytest.mark.parametrize(
    ("changes", "others", "counts"),
    [
        pytest.param({}, PROMPT, (1, 0, 1), id="for-a-prefix"),
        pytest.param(
            {"prefill_tokens": 1, "max_num_batched_tokens": 40},
            PROMPT[::-1],
            (1, 1, 0),
            id="for-its-turn",
        ),
    ],
)
def test_vllms_counters_tell_who_waits_and_why(
    changes: dict[str, int], others: list[int], counts: tuple[int, int, int]
) -> None:
    """Balancers of several engines go by all that wait."""
    driver = driver_of(**changes)
    driver.add(0, 1, prompt=PROMPT)
    driver.add(0, 1, prompt=others)
    for _ in range(3):
        driver.step()
    assert driver.scheduler.get_request_counts() == (1, 1)
    stats = driver.stats[-1]
    found = stats.num_running_reqs, stats.num_waiting_reqs
    assert (*found, stats.num_skipped_waiting_reqs) == counts
    driver.drain(100)
    assert driver.scheduler.get_request_counts() == (0, 0)
