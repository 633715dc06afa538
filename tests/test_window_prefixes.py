# SPDX-License-Identifier: Apache-2.0
"""Requests begin behind prefixes of others where some layers have a sliding window.

`PagedWorker` holds what a window reads to the prefix, and to how the request evicts;
`Driver.check` looks for lost blocks in all groups after every step.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_kv_cache_block_sizes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.structured_output import StructuredOutputManager

from tests.scheduler_driver import BLOCK_SIZE, Driver, Setup
from tests.test_prefix_scheduler import LAST, PROMPT, cache_of, driver_of, hit_of, modes
from tests.test_prefix_waits import check_who_waits_goes_on, ends
from vllm_roco.kv_cache.window_manager import WindowManager
from vllm_roco.scheduler import describe

WINDOWS = (5, 30)
"""Less and more than a chunk of 8 tokens, at odds with blocks of 4."""
SHORT = PROMPT[:20]
"""Read before the first eviction, which is at 24."""


def with_windows(asynchronous: bool = False, **changes: Any) -> Driver:
    return driver_of(asynchronous, **{"windows": WINDOWS, **changes})


def window_blocks(driver: Driver, request_id: str) -> list[set[int]]:
    """Return the blocks that a request holds in each group with a window."""
    return [
        {block.block_id for block in window.req_to_blocks[request_id]} - {0}
        for window in driver.windows
    ]


def snapshot_windows(driver: Driver) -> list[list[KVCacheBlock]]:
    """Return the blocks of the only snapshot in each group with a window."""
    (snapshot,) = cache_of(driver).store._snapshots.values()
    return [[*blocks] for blocks in snapshot.windows]


@modes
@pytest.mark.parametrize("windows", [(1,), (4,), (5,), (200,), WINDOWS])
def test_prompts_that_share_a_prefix(
    asynchronous: bool, max_steps_in_flight: int, windows: tuple[int, ...]
) -> None:
    driver = with_windows(
        asynchronous, max_steps_in_flight=max_steps_in_flight, windows=windows
    )
    assert hit_of(driver, PROMPT, 30) == 0
    assert hit_of(driver, PROMPT, 30) == LAST
    turn = PROMPT + [1] * 40
    assert hit_of(driver, turn) == LAST
    assert hit_of(driver, turn) == 112
    sibling = PROMPT[:50] + [1] * 30
    assert hit_of(driver, sibling) == 0
    assert hit_of(driver, PROMPT[:50] + [90] * 30) == 48
    assert driver.worker.num_hits == cache_of(driver).store.num_hits == 4


@pytest.mark.parametrize("hash_size", [1, 2])
def test_a_snapshot_is_named_by_all_of_its_tokens(hash_size: int) -> None:
    """Hashes finer than a block were counted as blocks.

    A snapshot was named by a part of its tokens, and who shared that part alone began
    with K and V of the others.
    """
    driver = with_windows(hash_size=hash_size)
    assert hit_of(driver, PROMPT, 30) == 0
    assert hit_of(driver, PROMPT[: LAST - 2] + [1] * 30) == 0
    assert hit_of(driver, PROMPT, 30) == LAST
    assert hit_of(driver, PROMPT[: LAST - 2] + [1] * 32) == 96
    assert driver.worker.num_hits == 2


def test_vllm_takes_hashes_finer_than_a_block_beside_windows() -> None:
    setup = Setup(caching=True, windows=WINDOWS)
    config = copy.copy(setup.scheduler().vllm_config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.prefix_match_unit = 2
    sizes = resolve_kv_cache_block_sizes(setup.plan(config), config)
    assert sizes == (BLOCK_SIZE, 2)


@modes
def test_prompts_that_evict_nothing_begin_with_snapshots(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    driver = with_windows(asynchronous, max_steps_in_flight=max_steps_in_flight)
    for max_tokens in (1, 100):
        prompt = [*SHORT, max_tokens]
        assert hit_of(driver, prompt, max_tokens) == (0 if max_tokens == 1 else 16)
        assert hit_of(driver, prompt, max_tokens) == 16
    assert cache_of(driver).blocks.num_hits == 0
    # shorter than a chunk
    assert hit_of(driver, PROMPT[1:8]) == hit_of(driver, PROMPT[1:8]) == 0


def test_blocks_in_windows_are_held_by_both() -> None:
    driver = with_windows(windows=(30,))
    donor = driver.add(0, 30, prompt=PROMPT)
    while not cache_of(driver).store.num_alive:
        driver.step()
    other = driver.add(0, 30, prompt=PROMPT)
    driver.step()
    (of_donor,), (of_other,) = (window_blocks(driver, name) for name in (donor, other))
    # of the 29 tokens before the 72nd, of which the donor needs those from the 49th on
    assert len(of_donor & of_other) == 6
    assert driver.worker.num_copies == 2 * 4
    driver.abort(donor)
    driver.drain(200)


def test_a_burst_reads_its_prefix_once() -> None:
    driver = with_windows(True, max_steps_in_flight=2)
    for number in range(12):
        driver.add(0, 10, prompt=PROMPT + [number] * 5)
    driver.drain(500)
    assert cache_of(driver).store.num_hits == cache_of(driver).num_waits == 11


@pytest.mark.parametrize(
    ("prompt", "num_steps"), [(SHORT, 1), (PROMPT, 1), (PROMPT, 3)]
)
@ends
def test_who_waits_goes_on_when_the_reader_ends(
    prompt: list[int], num_steps: int, end: str
) -> None:
    driver = with_windows(max_num_batched_tokens=20)
    check_who_waits_goes_on(driver, prompt, end, num_steps)


@modes
def test_a_preempted_request_begins_behind_its_own_prompt(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    driver = with_windows(asynchronous, max_steps_in_flight=max_steps_in_flight)
    request_id = driver.add(0, 60, prompt=PROMPT)
    for _ in range(45):
        driver.step()
    request = driver.scheduler.requests[request_id]
    driver.scheduler.running.remove(request)
    driver.scheduler._preempt_request(request, 0.0)
    driver.drain(1000)
    assert len(driver.outputs[request_id]) == 60
    assert cache_of(driver).store.num_saved_tokens == LAST


@pytest.mark.parametrize("number", [0, 1])
def test_a_block_in_a_window_that_is_handed_out_ends_a_snapshot(number: int) -> None:
    driver = with_windows()
    hit_of(driver, PROMPT)
    blocks = snapshot_windows(driver)
    # the last 4 and the last 29 tokens before the 72nd
    assert [len(group) for group in blocks] == [1, 8]
    pool = driver.manager.block_pool
    pool.evict_blocks({blocks[number][-1].block_id})
    assert hit_of(driver, PROMPT) == 0
    assert cache_of(driver).store.num_dead == 1
    assert hit_of(driver, PROMPT) == LAST


def test_snapshots_share_a_block_and_its_name() -> None:
    driver = with_windows(windows=(200,))
    hit_of(driver, PROMPT)
    hit_of(driver, PROMPT + [1] * 40)
    store = cache_of(driver).store
    first, second = store._snapshots.values()
    (before,), (after,) = first.windows, second.windows
    assert after[: len(before)] == before
    assert first.name != second.name
    assert [block.block_hash for block in before] == [first.name] * len(before)
    # one lost block ends both, and its next name revives neither
    driver.manager.block_pool.evict_blocks({before[0].block_id})
    before[0].set_block_hash(second.name)
    assert not first.is_whole
    assert not second.is_whole


def test_blocks_of_windows_are_taken_in_the_order_of_their_last_use() -> None:
    """What a window has left is not given away before what nobody will ask for."""
    driver = with_windows(spare_blocks=60)
    hit_of(driver, PROMPT)
    pool = driver.manager.block_pool
    num_named = sum(block.block_hash is not None for block in pool.blocks)
    assert num_named == 4 + 1 + 8
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks() - num_named))
    assert hit_of(driver, PROMPT) == LAST
    # copies go before blocks in windows, so that the first to go, which is the last of
    # them behind a hit, tells of all
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - num_named + 1)
    (snapshot,) = cache_of(driver).store._snapshots.values()
    assert taken[-1] is snapshot.blocks[-1]
    assert cache_of(driver).store.num_alive == 0
    pool.free_blocks(taken)
    assert hit_of(driver, PROMPT) == 0


@modes
def test_copies_are_free_before_what_an_aborted_publisher_had_in_its_window(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """So the first copy tells of all here too, whatever step is still in flight."""
    driver = with_windows(
        asynchronous, max_steps_in_flight=max_steps_in_flight, windows=(30,)
    )
    store = cache_of(driver).store
    donor = driver.add(0, 30, prompt=PROMPT)
    while not store.num_published:
        if driver.num_in_flight == max_steps_in_flight:
            driver.complete()
        driver.schedule()
    driver.abort(donor)
    pool = driver.manager.block_pool
    (snapshot,) = store._snapshots.values()
    num_named = len(snapshot.blocks) + len(snapshot.windows[0])
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - num_named + 1)
    assert taken[-1] is snapshot.blocks[0]
    assert store.num_alive == 0
    pool.free_blocks(taken)
    driver.drain(10)


def test_a_reset_forgets_all_snapshots() -> None:
    driver = with_windows()
    hit_of(driver, PROMPT)
    assert driver.scheduler.reset_prefix_cache()
    assert cache_of(driver).store.num_alive == 0
    assert not any(block.block_hash for block in driver.manager.block_pool.blocks)
    assert hit_of(driver, PROMPT) == 0
    assert hit_of(driver, PROMPT) == LAST


def test_vllm_finds_no_block_by_the_tokens() -> None:
    """The same tokens have other keys where something else was evicted before."""
    driver = with_windows()
    for _ in range(2):
        hit_of(driver, PROMPT, 20)
        assert len(driver.manager.block_pool.cached_block_hash_to_block) == 0


def test_who_evicts_otherwise_has_other_snapshots() -> None:
    driver = with_windows(max_budget=200, allow_full=True)
    own: list[dict[str, Any]] = [
        {"roco_budget": 24},
        {"roco_budget": 12, "roco_stride": 4},
        {"roco_chunk": 4},
    ]
    for options in [{}, *own]:
        assert hit_of(driver, PROMPT, extra_args=options) <= 16
    for options in [{}, *own]:
        assert hit_of(driver, PROMPT, extra_args=options) >= LAST


@pytest.mark.parametrize("is_first", [True, False])
def test_who_never_evicts_leaves_nothing_to_who_may(is_first: bool) -> None:
    """Nobody has measured its blocks, of which one that evicts needs the statistics."""
    driver = with_windows(allow_full=True)
    full: dict[str, Any] = {"extra_args": {"roco_budget": "full"}}
    rows = [full, {}] if is_first else [{}, full]
    assert [hit_of(driver, SHORT, 50, **row) for row in rows] == [0, 0]
    assert [hit_of(driver, SHORT, 50, **row) for row in rows] == [16, 16]


@pytest.mark.parametrize("spare_blocks", [0, 1, 3, 5, 8, 13])
@pytest.mark.parametrize("reserve", [True, False])
def test_a_pool_without_room_for_hit_and_copy_serves_all(
    spare_blocks: int, reserve: bool
) -> None:
    driver = with_windows(
        spare_blocks=spare_blocks, scheduler_reserve_full_isl=reserve, windows=(30, 5)
    )
    for _ in range(4):
        driver.add(0, 10, prompt=PROMPT)
    driver.drain(1000)
    hit_of(driver, PROMPT, 10)
    assert len(driver.finished) == 5


def test_admission_counts_what_a_window_will_hold() -> None:
    """Behind a long prefix vLLM asked for none: it counted what the window has left."""
    driver = with_windows(windows=(30,))
    hit_of(driver, PROMPT, 30)
    (window,) = driver.windows
    assert isinstance(window, WindowManager)
    (kept,) = snapshot_windows(driver)
    row = window.row_at(kept, LAST)
    assert [block.is_null for block in row] == [True] * 10 + [False] * 8
    window.max_admission_blocks_per_request = 14

    def needed(num_tokens: int, is_capped: bool) -> int:
        return window.get_num_blocks_to_allocate(
            "asks", num_tokens, row, LAST, LAST, num_tokens, is_capped
        )

    assert [needed(LAST + more, True) for more in (4, 8, 400)] == [9, 10, 14]
    assert needed(LAST + 400, False) == 108
    # blocks that others hold as well need no memory
    driver.manager.block_pool.touch(kept)
    assert needed(LAST + 4, True) == 1
    driver.manager.block_pool.free_blocks(kept)
    assert window.get_num_blocks_to_allocate("asks", 400, (), 0, 0, 400, True) == 14


def test_without_caching_the_managers_stay_vllms() -> None:
    driver = Driver(Setup(windows=WINDOWS))
    assert [type(window) for window in driver.windows] == [SlidingWindowManager] * 2
    driver.add(0, 5, prompt=PROMPT)
    driver.drain(100)


def test_the_start_up_line_tells_of_hits_and_why_there_are_none() -> None:
    setup = Setup(caching=True, windows=WINDOWS)
    scheduler = setup.scheduler()
    assert "Prefix caching: on. Switched off" in describe(scheduler)
    config = scheduler.vllm_config
    plan = setup.plan(config)
    group = plan.kv_cache_groups[0]
    group.kv_cache_spec = replace(
        group.kv_cache_spec, block_size=2 * BLOCK_SIZE, page_size_padded=None
    )
    other = type(scheduler)(
        config,
        plan,
        StructuredOutputManager(config),
        block_size=2 * BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )
    assert (
        "Prefix caching: not for this model, whose layers have KV cache blocks of "
        "several sizes. Switched off" in describe(other)
    )


@pytest.mark.parametrize("spare_blocks", range(180, 280, 10))
def test_a_long_step_behind_a_long_hit_is_not_waited_for(spare_blocks: int) -> None:
    """All that evicts nothing may be read in one step, not a chunk alone.

    With 260 spare blocks the hit left too few for the step, of which admission knew
    nothing: with nothing else to run, the request waited for ever.
    """
    driver = Driver(
        Setup(
            chunk=8,
            max_num_batched_tokens=404,
            caching=True,
            allow_full=True,
            windows=(8,),
            spare_blocks=spare_blocks,
        )
    )
    whole = {"roco_budget": "full"}
    prompt = [token % 90 + 1 for token in range(400)]
    for own in ([], [7] * 372):
        driver.add(0, 2, prompt=prompt + own, extra_args=whole)
        driver.drain(400)
