# SPDX-License-Identifier: Apache-2.0
"""Prompts that are read without eviction begin with blocks of others, as in stock vLLM.

`PagedWorker` holds each hit to the prefix and to blocks of earlier steps, and lets no
sequence evict that holds a block of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.scheduler_driver import BLOCK_SIZE, Driver
from tests.test_prefix_scheduler import (
    LAST,
    PROMPT,
    cache_of,
    driver_of,
    hit_of,
    modes,
)

HEADER = PROMPT[:10]
"""Two blocks and a half, within the second chunk; the first eviction is at 24."""
OPEN = 100
"""A `max_tokens` with which any request may evict."""


def begins_with(driver: Driver, prompt: list[int], max_tokens: int, **more: Any) -> int:
    """Run a request until it writes, and return with how many tokens it began."""
    saved = cache_of(driver).blocks.num_saved_tokens
    request_id = driver.add(0, max_tokens, prompt=prompt, **more)
    step_until(driver, lambda: bool(driver.outputs[request_id]))
    return cache_of(driver).blocks.num_saved_tokens - saved


def step_until(driver: Driver, is_done: Callable[[], bool]) -> None:
    for _ in range(200):
        if is_done():
            return
        driver.step()
    pytest.fail("nothing comes of it")


def row_of(driver: Driver, request_id: str) -> list[int]:
    return [block.block_id for block in driver.manager.req_to_blocks[request_id]]


@modes
@pytest.mark.parametrize("first", [4, OPEN])
@pytest.mark.parametrize("second", [4, OPEN])
@pytest.mark.parametrize("is_writing", [True, False])
def test_the_second_request_begins_behind_the_header(
    asynchronous: bool,
    max_steps_in_flight: int,
    first: int,
    second: int,
    is_writing: bool,
) -> None:
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    assert begins_with(driver, [*HEADER, 90], first) == 0
    if not is_writing:
        driver.drain(200)
    assert begins_with(driver, [*HEADER, 91, 92, 93], second) == 8
    # both blocks of the header, and that of the tokens that follow both of them
    assert begins_with(driver, [*HEADER, 91, 92, 94], 4) == 12
    driver.drain(500)
    assert driver.worker.num_hits == 2


def test_who_cannot_evict_holds_the_same_blocks() -> None:
    driver = driver_of()
    for own in range(3):
        begins_with(driver, [*HEADER, 90 + own], 10)
    rows = [row_of(driver, str(number)) for number in range(3)]
    assert rows[0][:2] == rows[1][:2] == rows[2][:2]
    assert len({row[2] for row in rows}) == 3
    assert driver.worker.num_shared == 4


def test_who_may_evict_holds_blocks_of_its_own() -> None:
    driver = driver_of()
    for own in range(3):
        begins_with(driver, [*HEADER, 90 + own], OPEN)
    rows = [row_of(driver, str(number)) for number in range(3)]
    assert len({block for row in rows for block in row}) == sum(map(len, rows))
    driver.drain(500)
    assert driver.worker.num_shared == 0
    assert driver.worker.num_evictions > 3


@modes
def test_who_evicts_leaves_copies_of_its_prompt(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    begins_with(driver, [*HEADER, 90], OPEN)
    step_until(driver, lambda: driver.manager.num_freed_blocks > 0)
    assert begins_with(driver, [*HEADER, 91], 4) == 8
    driver.drain(500)
    # the last one has left its blocks as they were
    assert begins_with(driver, [*HEADER, 92], OPEN) == 8


@pytest.mark.parametrize(("room", "expected"), [(0, 0), (1, 4), (2, 8)])
def test_copies_are_left_as_far_as_room_goes(room: int, expected: int) -> None:
    driver = driver_of()
    begins_with(driver, [*HEADER, 90], OPEN)
    pool = driver.manager.block_pool
    # the answer takes three blocks until the first eviction
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 3 - room)
    driver.check = lambda: None
    step_until(driver, lambda: driver.manager.num_freed_blocks > 0)
    pool.free_blocks(taken)
    assert begins_with(driver, [*HEADER, 91], 4) == expected


@pytest.mark.parametrize("room", [2, 3, 4, 5])
def test_copies_do_not_take_the_blocks_before_them(room: int) -> None:
    """Made over the first blocks of that very prompt, nobody would find any."""
    driver = driver_of()
    prompt = PROMPT[:20]
    begins_with(driver, prompt[:8], 4)
    driver.drain(100)
    assert begins_with(driver, prompt, OPEN) == 8
    pool = driver.manager.block_pool
    # of the rest, and the answer takes one until the first eviction
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 1 - room)
    driver.check = lambda: None
    step_until(driver, lambda: driver.manager.num_freed_blocks > 0)
    pool.free_blocks(taken)
    assert begins_with(driver, [*prompt, 91], 4) == room * BLOCK_SIZE


@pytest.mark.parametrize("room", [0, 2])
def test_copies_do_not_take_what_others_begin_with_again_and_again(room: int) -> None:
    """A snapshot in demand, on whose blocks nobody is let in either."""
    driver = driver_of(spare_blocks=20)
    for begun in (0, LAST, LAST):
        assert hit_of(driver, PROMPT) == begun
    prompt = PROMPT[1:21]
    begins_with(driver, prompt, OPEN)
    pool, store = driver.manager.block_pool, cache_of(driver).store
    (snapshot,) = store._snapshots.values()
    # the answer takes one until the first eviction
    spared = len(snapshot.blocks) + 1 + room
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - spared)
    driver.check = lambda: None
    num_freed = driver.manager.num_freed_blocks
    step_until(driver, lambda: driver.manager.num_freed_blocks > num_freed)
    pool.free_blocks(taken)
    assert snapshot.is_whole
    assert begins_with(driver, [*prompt, 91], 4) == room * BLOCK_SIZE


@pytest.mark.parametrize("num_left", [1, 2, 3])
@pytest.mark.parametrize("num_hit", [0, 8, 20], ids=["copies", "both", "origins"])
def test_the_last_blocks_of_a_prompt_go_first(num_hit: int, num_left: int) -> None:
    """As in vLLM: without the first ones nobody finds the others."""
    driver = driver_of()
    prompt = PROMPT[:20]
    if num_hit:
        begins_with(driver, prompt[:num_hit], 4)
        driver.drain(100)
    # what it copies, or leaves copies of, is used last
    assert begins_with(driver, [*prompt, 90], OPEN) == num_hit
    driver.drain(500)
    assert driver.manager.num_freed_blocks
    pool = driver.manager.block_pool
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks() - num_left))
    assert begins_with(driver, [*prompt, 91], 4) == num_left * BLOCK_SIZE


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_blocks_are_kept_once(end: str) -> None:
    """A copy of what a request has begun with would stand in the place of others'."""
    driver = driver_of()
    pool = driver.manager.block_pool
    for own in range(4):
        prompt = [*HEADER, 90 + own, 1]
        assert begins_with(driver, prompt, OPEN) == (8 if own else 0)
        if end == "preempt":
            driver.scheduler.running.pop()
            request = driver.scheduler.requests[str(own)]
            driver.scheduler._preempt_request(request, 0.0)
        driver.abort(str(own))
        hashes = [block.block_hash for block in pool.blocks if block.block_hash]
        assert len(set(hashes)) == len(hashes)
        # those of the header, and the last one of each prompt
        assert len(hashes) == 2 + own + 1
    # what was let go is handed out first
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks() - 6))
    assert begins_with(driver, [*HEADER, 99], 4) == 8


@pytest.mark.parametrize("max_tokens", [4, OPEN], ids=["sharers", "others"])
@modes
def test_blocks_are_kept_once_while_others_hold_them(
    asynchronous: bool, max_steps_in_flight: int, max_tokens: int
) -> None:
    """Else each request that ends before these do leaves one more copy."""
    driver = driver_of(
        asynchronous, max_steps_in_flight=max_steps_in_flight, spare_blocks=100
    )
    pool = driver.manager.block_pool
    begins_with(driver, [*HEADER, 90], OPEN)
    for own in (91, 92):
        # the next one copies while this one ends
        begins_with(driver, [*HEADER, own, 1], max_tokens)
        begins_with(driver, [*HEADER, own, 2], max_tokens)
        for request_id in [*driver.scheduler.requests][1:]:
            driver.abort(request_id)
        found = Counter(block.block_hash for block in pool.blocks if block.block_hash)
        assert set(found.values()) == {1}
    assert not driver.manager.num_freed_blocks
    driver.drain(500)
    # whoever held them has left them
    assert begins_with(driver, [*HEADER, 99], 4) == 8


@pytest.mark.parametrize("max_tokens", [13, OPEN])
def test_blocks_of_who_runs_are_found_as_long_as_it_runs(max_tokens: int) -> None:
    """Not let go of for copies that are free, and may be handed out."""
    driver = driver_of()
    begins_with(driver, [*HEADER, 90], max_tokens)
    assert begins_with(driver, [*HEADER, 91], OPEN) == 8
    driver.abort("1")
    pool = driver.manager.block_pool
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks()))
    assert begins_with(driver, [*HEADER, 92], 4) == 8
    assert not driver.finished


def test_a_copy_serves_others_when_its_origin_evicts() -> None:
    """So the origin leaves no other one."""
    driver = driver_of()
    origin = driver.add(0, OPEN, prompt=HEADER[:8])
    for _ in range(10):
        driver.step()
    begins_with(driver, [*HEADER, 91], OPEN)
    driver.worker.num_copies = 0
    step_until(driver, lambda: driver.manager.num_freed_blocks > 0)
    assert driver.worker.num_copies == 0
    assert begins_with(driver, [*HEADER, 92], 4) == 8
    driver.abort(origin)
    driver.drain(500)


@pytest.mark.parametrize("max_tokens", [4, OPEN])
def test_siblings_wait_one_step_for_the_first_of_them(max_tokens: int) -> None:
    driver = driver_of()
    for _ in range(4):
        driver.add(0, max_tokens, prompt=PROMPT[:11])
    assert driver.step() == {"0": 11}
    assert driver.step() == {"0": 1, "1": 3, "2": 3, "3": 3}
    assert cache_of(driver).num_waits == 3
    driver.drain(500)
    assert cache_of(driver).blocks.num_hits == 3


def test_answers_are_begun_with_by_the_next_turn() -> None:
    driver = driver_of()
    begins_with(driver, HEADER, 4)
    driver.drain(20)
    text = HEADER + driver.outputs["0"]
    # the last token was sampled, and not read
    assert begins_with(driver, [*text, 1], 4) == 12
    assert begins_with(driver, [*text, 2], OPEN) == 12


def test_what_is_longer_begins_at_ends_of_chunks_alone() -> None:
    driver = driver_of()
    begins_with(driver, PROMPT[:20], 4)
    driver.drain(20)
    assert begins_with(driver, PROMPT, 4) == 0
    assert cache_of(driver).store.num_hits == 0
    driver.drain(20)
    # and leaves its snapshots to shorter ones too
    begins_with(driver, PROMPT[:18] + [90] * 20, 4)
    driver.drain(20)
    driver.scheduler.kv_cache_manager.block_pool.evict_blocks(
        {
            block.block_id
            for block in driver.manager.block_pool.blocks
            if block.block_hash and len(block.block_hash) > 12
        }
    )
    assert begins_with(driver, PROMPT[:18], 4) == 0
    assert cache_of(driver).store.num_saved_tokens == 16


@modes
@pytest.mark.parametrize("max_tokens", [8, OPEN])
def test_a_preempted_request_goes_on_as_if_it_had_not_been(
    asynchronous: bool, max_steps_in_flight: int, max_tokens: int
) -> None:
    """What it evicts later must not depend on who was there before."""
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    request_id = driver.add(0, max_tokens, prompt=HEADER)
    step_until(driver, lambda: len(driver.outputs[request_id]) >= 5)
    while driver.num_in_flight:
        driver.complete()
    request = driver.scheduler.requests[request_id]
    full = request.num_computed_tokens // BLOCK_SIZE * BLOCK_SIZE
    # the last of three steps in flight has filled a block
    assert full == (16 if max_steps_in_flight == 3 else 12)
    driver.scheduler.running.remove(request)
    driver.scheduler._preempt_request(request, 0.0)
    driver.drain(500)
    expected = 0 if max_tokens == OPEN else full
    assert cache_of(driver).blocks.num_saved_tokens == expected


@modes
@pytest.mark.parametrize("first", [4, OPEN])
def test_blocks_that_no_step_will_fill_are_not_found(
    asynchronous: bool, max_steps_in_flight: int, first: int
) -> None:
    """One of higher priority takes the blocks of a request that was chosen before it.

    The step that should have filled them does not, and the request came back to them.
    """
    driver = driver_of(
        asynchronous,
        max_steps_in_flight=max_steps_in_flight,
        max_num_batched_tokens=20,
        policy="priority",
        long_prefill_token_threshold=8,
        scheduler_reserve_full_isl=False,
    )
    pool = driver.manager.block_pool
    driver.add(0, 1, prompt=[91] * 7)
    chosen = driver.add(0, first, prompt=PROMPT[:23], priority=1)
    assert driver.step() == {"0": 7, "1": 8}
    driver.add(0, 4, prompt=[90] * 4)
    assert driver.step() == {"1": 8, "2": 4}
    while driver.num_in_flight:
        driver.complete()
    # one block that it fills, one that it does not, and none for the other
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 2)
    driver.check = lambda: None
    assert driver.step() == {"2": 1}
    request = driver.scheduler.requests[chosen]
    assert request.num_preemptions == 1
    found = cache_of(driver).blocks.find(request).blocks
    assert len(found) == 4
    pool.free_blocks(taken)
    del driver.check
    driver.drain(500)
    assert driver.worker.num_hits == 1


def test_salts_and_skips_are_obeyed() -> None:
    driver = driver_of()
    assert begins_with(driver, [*HEADER, 90], 4) == 0
    assert begins_with(driver, [*HEADER, 91], 4, cache_salt="other") == 0
    assert begins_with(driver, [*HEADER, 91], 4, skip_reading_prefix_cache=True) == 0
    assert begins_with(driver, [*HEADER, 92], 4) == 8


def test_a_reset_forgets_all_blocks() -> None:
    driver = driver_of()
    begins_with(driver, [*HEADER, 90], 4)
    driver.drain(20)
    assert driver.scheduler.reset_prefix_cache()
    assert begins_with(driver, [*HEADER, 91], 4) == 0


@pytest.mark.parametrize("max_tokens", [8, OPEN])
@pytest.mark.parametrize("spare_blocks", [0, 1, 2, 3])
def test_a_pool_without_room_for_block_and_copy_serves_all(
    spare_blocks: int, max_tokens: int
) -> None:
    driver = driver_of(spare_blocks=spare_blocks)
    for own in range(6):
        driver.add(0, max_tokens, prompt=[*HEADER, 90 + own])
    driver.drain(2000)
    assert len(driver.finished) == 6


def test_a_block_is_looked_up_once_for_each_request_that_is_let_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice, once to see whether to wait and once to begin, where others wrote."""
    driver = driver_of(max_num_batched_tokens=40)
    begins_with(driver, [*HEADER, 90], 4)
    driver.drain(20)
    pool = driver.manager.block_pool
    get_cached_block, asked = pool.get_cached_block, []

    def noted(block_hash: Any, group_ids: list[int]) -> Any:
        asked.append(block_hash)
        return get_cached_block(block_hash, group_ids)

    monkeypatch.setattr(pool, "get_cached_block", noted)
    # the first one writes blocks in the step that lets the second one in
    driver.add(0, 4, prompt=[60] * 11)
    driver.add(0, 4, prompt=[*HEADER, 91])
    assert len(driver.step()) == 2
    assert len(asked) == len(set(asked)) == 3
    assert cache_of(driver).blocks.num_hits == 1


def test_those_that_wait_for_the_same_blocks_look_them_up_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of them walked all blocks of the prompt: with 64 and 100,000 tokens, half a
    second of the step."""
    driver = driver_of(mode="full", allow_full=True, max_num_batched_tokens=68)
    pool = driver.manager.block_pool
    get_cached_block, asked = pool.get_cached_block, []

    def noted(block_hash: Any, group_ids: list[int]) -> Any:
        asked.append(block_hash)
        return get_cached_block(block_hash, group_ids)

    monkeypatch.setattr(pool, "get_cached_block", noted)
    prompt = [2 + place % 50 for place in range(400)]
    reader = driver.add(0, 1, prompt=prompt)
    for own in range(20):
        driver.add(0, 1, prompt=[*prompt, 60 + own])
    while not cache_of(driver).num_waits:
        asked.clear()
        assert reader in driver.step()
    assert cache_of(driver).num_waits == 20
    # without statistics they are looked for among those, and then among others
    assert len(asked) <= 2 * len(prompt) // BLOCK_SIZE
    driver.drain(200)
    assert cache_of(driver).blocks.num_hits == 20


@modes
def test_an_answer_that_ends_with_a_block_leaves_it(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """Hashed when the last token was known, it was taken for one yet to be filled."""
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    # the last token is not computed, and all others are four blocks
    request_id = driver.add(0, 6, prompt=PROMPT[:11])
    driver.drain(50)
    text = [*PROMPT[:11], *driver.outputs[request_id][:5]]
    assert begins_with(driver, [*text, 90], 4) == len(text) == 16


def test_shared_blocks_leave_room_for_more_requests() -> None:
    """Four of them would not fit without sharing."""
    driver = driver_of(spare_blocks=3)
    pool = driver.manager.block_pool
    prompt = PROMPT[:16]
    begins_with(driver, [*prompt, 90], 6)
    free = pool.get_num_free_blocks()
    for own in range(3):
        assert begins_with(driver, [*prompt, 91 + own], 2) == 16
    assert pool.get_num_free_blocks() >= free - 3
    driver.drain(100)
