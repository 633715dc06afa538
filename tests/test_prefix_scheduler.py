# SPDX-License-Identifier: Apache-2.0
"""Requests that begin behind prefixes of others, over vLLM's real scheduler.

`PagedWorker` holds each hit to the prefix, to what the sequence keeps alone, and to the
age of its statistics; `Driver.check` looks for lost and shared blocks after every step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.kv_cache.specs import one_group
from tests.scheduler_driver import BLOCK_SIZE, Driver, Setup
from vllm_roco.kv_cache.prefix_cache import PrefixCache
from vllm_roco.scheduler import describe

CHUNK = 8
PROMPT = list(range(2, 80))
"""78 tokens: 9 chunks of 8, and 6 more; the first eviction is at 24."""
LAST = 72

modes = pytest.mark.parametrize(
    ("asynchronous", "max_steps_in_flight"),
    [
        pytest.param(False, 1, id="synchronous"),
        pytest.param(True, 2, id="asynchronous"),
        pytest.param(True, 3, id="two-stages"),
    ],
)


def driver_of(asynchronous: bool = False, **changes: Any) -> Driver:
    attributes = {
        name: changes.pop(name)
        for name in list(changes)
        if name not in Setup.__dataclass_fields__
    }
    setup = Setup(caching=True, asynchronous=asynchronous, **changes)
    return Driver(setup, **attributes)


def cache_of(driver: Driver) -> PrefixCache:
    cache = driver.manager.prefix_cache
    assert cache is not None
    return cache


def hit_of(driver: Driver, prompt: list[int], max_tokens: int = 1, **more: Any) -> int:
    """Run a request alone and return with how many tokens it began."""
    saved = cache_of(driver).store.num_saved_tokens
    driver.add(len(prompt), max_tokens, prompt=prompt, **more)
    driver.drain(1000)
    return cache_of(driver).store.num_saved_tokens - saved


@modes
def test_prompts_that_share_a_prefix(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    assert hit_of(driver, PROMPT, 30) == 0
    assert hit_of(driver, PROMPT, 30) == LAST
    # a next turn, and what it leaves for the one after it
    turn = PROMPT + [1] * 40
    assert hit_of(driver, turn) == LAST
    assert hit_of(driver, turn) == 112
    # parts from the others within the seventh chunk, where none of them was cut
    sibling = PROMPT[:50] + [1] * 30
    assert hit_of(driver, sibling) == 0
    # now the place is known
    assert hit_of(driver, PROMPT[:50] + [90] * 30) == 48
    assert hit_of(driver, [5] + PROMPT) == 0
    assert driver.worker.num_hits == cache_of(driver).store.num_hits == 4


def test_a_prompt_of_whole_chunks_serves_itself_and_longer_ones() -> None:
    driver = driver_of()
    prompt = PROMPT[:48]
    assert hit_of(driver, prompt, 2) == 0
    assert hit_of(driver, prompt) == 40
    assert hit_of(driver, PROMPT) == 48


@modes
def test_a_preempted_request_begins_behind_its_own_prompt(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """Capped there: its output was read token by token, as the rows of no other are."""
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    request_id = driver.add(0, 60, prompt=PROMPT)
    for _ in range(45):
        driver.step()
    request = driver.scheduler.requests[request_id]
    assert request.num_tokens > 100
    # the cache stays: only the request loses its blocks
    driver.scheduler.running.remove(request)
    driver.scheduler._preempt_request(request, 0.0)
    driver.drain(1000)
    assert len(driver.outputs[request_id]) == 60
    assert cache_of(driver).store.num_saved_tokens == LAST
    assert driver.worker.num_hits == 1


def test_generated_tokens_are_no_prefix() -> None:
    driver = driver_of()
    request_id = driver.add(0, 60, prompt=PROMPT)
    for _ in range(50):
        driver.step()
    text = PROMPT + driver.outputs[request_id]
    assert len(text) > 112
    # the same text as a prompt is cut behind the other's prompt
    assert hit_of(driver, [*text, 1]) == LAST
    assert hit_of(driver, text) > LAST


def test_salts_adapters_and_skips_are_obeyed() -> None:
    driver = driver_of()
    hit_of(driver, PROMPT)
    assert hit_of(driver, PROMPT, cache_salt="other") == 0
    assert hit_of(driver, PROMPT, cache_salt="other") == LAST
    adapter = LoRARequest("adapter", 1, "/nowhere")
    assert hit_of(driver, PROMPT, lora_request=adapter) == 0
    assert hit_of(driver, PROMPT, lora_request=adapter) == LAST
    assert hit_of(driver, PROMPT, skip_reading_prefix_cache=True) == 0
    assert hit_of(driver, PROMPT) == LAST


def test_a_prompt_with_an_image_shares_nothing() -> None:
    """An input item may end its chunks early, so it keeps other blocks."""
    driver = driver_of()
    hit_of(driver, PROMPT)
    image = MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier="picture",
        mm_position=PlaceholderRange(offset=74, length=3),
    )
    for features, hit in (([], LAST), ([image], 0)):
        request = Request(
            request_id="asks",
            prompt_token_ids=PROMPT,
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            mm_features=features,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        )
        # the image is behind the prefix, so the prefix is the same
        assert driver.scheduler._get_local_prefix_cache_hit(request)[1] == hit
        assert driver.scheduler._end_of_step(request, 64, 78) == (72 if hit else 78)


def test_a_reset_forgets_all_snapshots() -> None:
    driver = driver_of()
    hit_of(driver, PROMPT)
    assert driver.scheduler.reset_prefix_cache()
    assert cache_of(driver).store.num_alive == 0
    assert hit_of(driver, PROMPT) == 0
    assert hit_of(driver, PROMPT) == LAST


def test_a_reset_of_running_requests_forgets_all_snapshots() -> None:
    driver = driver_of(True, max_steps_in_flight=2)
    hit_of(driver, PROMPT)
    driver.add(0, 30, prompt=PROMPT)
    for _ in range(5):
        driver.step()
    driver.preempt_all()
    assert cache_of(driver).store.num_alive == 0
    driver.drain(1000)


def test_a_request_begins_behind_a_gap_with_stale_steps_in_flight() -> None:
    """The driver's own check took the gap for blocks that were freed too early."""
    driver = driver_of(
        True, max_steps_in_flight=3, stride=4, chunk=24, max_num_batched_tokens=68
    )
    names = [driver.add(0, 2, prompt=PROMPT[:37]) for _ in range(2)]
    both = dict.fromkeys(names, 13)
    assert [driver.schedule() for _ in range(2)] == [{names[0]: 24}, both]
    driver.complete()
    driver.preempt_all()
    assert [driver.schedule() for _ in range(2)] == [{names[0]: 24}, both]
    assert driver.scheduler.requests[names[1]].num_stale_output_tokens == 13
    driver.drain(100)
    assert {len(driver.outputs[name]) for name in names} == {2}


def test_nothing_is_shared_when_caching_is_off() -> None:
    driver = Driver(Setup())
    assert driver.manager.prefix_cache is None
    for _ in range(3):
        driver.add(0, 5, prompt=PROMPT)
        driver.drain(100)
    assert driver.worker.num_hits == 0


@modes
def test_a_model_with_other_caches_beside_has_no_hits(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """A snapshot holds nothing of the other layers; the start-up line says so."""
    setup = Setup(
        caching=True, asynchronous=asynchronous, max_steps_in_flight=max_steps_in_flight
    )
    alone, spec = setup.scheduler(), setup.spec()
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=spec.dtype
    )
    full = replace(full, page_size_padded=spec.page_size_bytes)
    plan = one_group(spec, 1000)
    plan.kv_cache_groups.append(KVCacheGroupSpec(["another layer"], full))
    config = alone.vllm_config
    scheduler = type(alone)(
        config, plan, StructuredOutputManager(config), block_size=BLOCK_SIZE
    )
    (manager,) = scheduler.roco_managers
    assert scheduler.prefix_cache is manager.prefix_cache is None
    assert (
        "Prefix caching: not for this model, whose layers have KV caches of several "
        "kinds. Switched off: speculative" in describe(scheduler)
    )
    assert "Prefix caching: on. Switched off: speculative" in describe(alone)


@pytest.mark.parametrize("spare_blocks", [0, 1, 5, 8])
def test_a_pool_without_room_for_hit_and_copy_serves_all(spare_blocks: int) -> None:
    driver = driver_of(spare_blocks=spare_blocks)
    for _ in range(4):
        driver.add(0, 10, prompt=PROMPT)
    driver.drain(1000)
    hit_of(driver, PROMPT, 10)
    assert len(driver.finished) == 5


@modes
def test_nobody_is_let_in_on_what_others_begin_with_again_and_again(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    driver = driver_of(
        asynchronous,
        max_steps_in_flight=max_steps_in_flight,
        # those of the snapshot, and some
        spare_blocks=9,
    )
    hit_of(driver, PROMPT)
    for _ in range(2):
        assert hit_of(driver, PROMPT) == LAST
    # one that runs for long, and one that there would be room for beside it
    driver.add(0, 100, prompt=[7] * 60)
    for _ in range(12):
        driver.step()
    late = driver.add(0, 1, prompt=[8] * 60)
    for _ in range(10):
        driver.step()
    assert not driver.outputs[late]
    driver.drain(1000)
    assert driver.outputs[late]
    assert hit_of(driver, PROMPT) == LAST


@modes
def test_what_is_hit_is_taken_after_what_was_made_since(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """vLLM's queue of free blocks has what a hit was copied from at its fresh end."""
    driver = driver_of(
        asynchronous, max_steps_in_flight=max_steps_in_flight, spare_blocks=60
    )
    others = [[first, *PROMPT] for first in (90, 91)]
    for prompt in (PROMPT, *others):
        assert hit_of(driver, prompt) == 0
    assert hit_of(driver, PROMPT) == LAST
    store, pool = cache_of(driver).store, driver.manager.block_pool
    newest = [*store._snapshots.values()][-1]
    # all but the blocks of one snapshot
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - len(newest.blocks))
    assert store.num_alive == 1
    pool.free_blocks(taken)
    assert [hit_of(driver, prompt) for prompt in others] == [0, 0]
    assert hit_of(driver, PROMPT) == LAST


@modes
def test_who_begins_with_what_is_in_demand_needs_its_blocks_once(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    driver = driver_of(
        asynchronous, max_steps_in_flight=max_steps_in_flight, spare_blocks=12
    )
    for _ in range(3):
        hit_of(driver, PROMPT)
    driver.add(0, 100, prompt=[7] * 60)
    for _ in range(12):
        driver.step()
    late = driver.add(0, 1, prompt=PROMPT)
    for _ in range(8):
        driver.step()
    assert driver.outputs[late]


def test_a_request_that_is_preempted_again_and_again_is_no_demand() -> None:
    driver = driver_of()
    request_id = driver.add(0, 60, prompt=PROMPT)
    request = driver.scheduler.requests[request_id]
    for _ in range(3):
        while request.num_computed_tokens <= len(PROMPT):
            driver.step()
        # the cache stays: only the request loses its blocks
        driver.scheduler.running.remove(request)
        driver.scheduler._preempt_request(request, 0.0)
    driver.drain(1000)
    store = cache_of(driver).store
    assert store.num_hits > 2
    all_blocks = driver.manager.block_pool.num_gpu_blocks
    assert store.num_blocks_in_demand(None, all_blocks) == 0


def test_publishing_takes_what_is_left_and_preempts_nobody() -> None:
    """In a pool that is too small anyway, nobody is preempted who was not before."""
    preemptions = {}
    for caching in (False, True):
        driver = Driver(
            Setup(caching=caching, spare_blocks=9), scheduler_reserve_full_isl=False
        )
        counted = preemptions[caching] = []
        preempt = driver.scheduler._preempt_request

        def count(request: Any, *args: Any, **kwargs: Any) -> None:
            counted.append(request.request_id)  # noqa: B023 -- called in the loop
            preempt(request, *args, **kwargs)  # noqa: B023

        driver.scheduler._preempt_request = count
        for number in range(6):
            driver.add(0, 40, prompt=[number + 2] * 60)
        driver.drain(5000)
        assert len(driver.finished) == 6
    assert preemptions[False]
    assert len(preemptions[True]) <= len(preemptions[False])


@modes
def test_a_donor_that_goes_in_the_step_of_its_snapshot(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """The copy comes first in the stream of steps, whoever gets the blocks then."""
    driver = driver_of(asynchronous, max_steps_in_flight=max_steps_in_flight)
    store = cache_of(driver).store
    donor = driver.add(0, 30, prompt=PROMPT)
    while not store.num_published:
        if driver.num_in_flight == max_steps_in_flight:
            driver.complete()
        driver.schedule()
    driver.abort(donor)
    driver.add(0, 30, prompt=[7] * 60)
    assert hit_of(driver, PROMPT, 20) == LAST


def test_a_snapshot_that_lost_a_block_is_dead() -> None:
    driver = driver_of(spare_blocks=30)
    store = cache_of(driver).store
    hit_of(driver, PROMPT)
    assert store.num_alive == 1
    pool = driver.manager.block_pool
    # what was never used goes first, then the oldest snapshot's first block
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 3)
    pool.free_blocks(taken)
    assert store.num_alive == 0
    assert hit_of(driver, PROMPT) == 0
    assert store.num_dead <= 1


def test_the_pool_is_whole_in_the_end() -> None:
    driver = driver_of(True, max_steps_in_flight=2, spare_blocks=20)
    for number in range(30):
        stem = PROMPT[: 8 * (number % 9)]
        driver.add(0, 20, prompt=[*stem, *([number] * 11)])
        driver.step()
        if number % 7 == 3:
            driver.scheduler.finish_requests(
                str(number - 1), RequestStatus.FINISHED_ABORTED
            )
            driver.check()
    driver.drain(5000)
    assert cache_of(driver).store.num_hits > 5
