# SPDX-License-Identifier: Apache-2.0
"""The block manager inside vLLM's real cache manager and block pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request

from tests.kv_cache.managers import (
    BLOCK,
    BUDGET_BLOCKS,
    NUM_BLOCKS,
    STRIDE_BLOCKS,
    cache_manager,
    request,
    roco_manager,
    run,
)
from tests.kv_cache.specs import one_group, roco_spec
from vllm_roco.kv_cache.budgeted_manager import BudgetedManager
from vllm_roco.kv_cache.integrity import check_integrity
from vllm_roco.kv_cache.manager import RocoManager


def null_places(manager: RocoManager, request_id: str = "a") -> list[int]:
    row = manager.req_to_blocks[request_id]
    return [place for place, block in enumerate(row) if block.is_null]


def test_a_new_manager_holds_nothing() -> None:
    manager = roco_manager(cache_manager())
    assert manager.held.largest == 0
    assert manager.num_freed_blocks == 0
    assert manager.held_blocks("a") == 0
    check_integrity(manager)


@pytest.mark.parametrize("step", [1, 7, 16, 40, 64])
def test_the_gap_is_where_the_schedule_says(step: int) -> None:
    """After every step, whatever its size: `row[B : B+E]` and nothing else is null."""
    cache = cache_manager()
    manager = roco_manager(cache)
    sequence = request()
    for _ in range(400 // step + 4):
        processed = sequence.num_computed_tokens
        assert run(cache, sequence, step)
        evicted = manager.plans.default.schedule.evicted_blocks(processed)
        assert null_places(manager) == list(
            range(BUDGET_BLOCKS, BUDGET_BLOCKS + evicted)
        )
        blocks = -(-sequence.num_computed_tokens // BLOCK)
        assert len(manager.req_to_blocks["a"]) == blocks
        assert manager.held_blocks("a") == manager.held.of("a") == blocks - evicted
        assert manager.num_freed_blocks == evicted
        free = cache.block_pool.get_num_free_blocks()
        assert free == NUM_BLOCKS - 1 - (blocks - evicted)
        check_integrity(manager)
    assert manager.num_freed_blocks > 3 * STRIDE_BLOCKS


def test_tokens_in_flight_keep_their_blocks() -> None:
    """At 112 tokens two blocks are due, but only 95 are known to be processed."""
    cache = cache_manager()
    manager = roco_manager(cache)
    sequence = request()
    run(cache, sequence, 95)
    run(cache, sequence, 17)
    assert run(cache, sequence, 16, in_flight=17)
    assert null_places(manager) == []
    assert run(cache, sequence, 16, in_flight=16)
    assert null_places(manager) == [4, 5]


def test_a_step_over_many_strides_frees_them_all() -> None:
    cache = cache_manager()
    manager = roco_manager(cache)
    sequence = request()
    run(cache, sequence, 40 * BLOCK)
    run(cache, sequence, 1)
    assert null_places(manager) == list(range(4, 40))
    assert manager.held_blocks("a") == 5


def test_freeing_twice_at_one_length_frees_once() -> None:
    cache = cache_manager()
    manager = roco_manager(cache)
    sequence = request()
    run(cache, sequence, 96)
    for _ in range(3):
        manager.remove_skipped_blocks("a", 96)
    assert manager.num_freed_blocks == 2
    check_integrity(manager)


def test_a_request_that_holds_nothing_is_ignored() -> None:
    """vLLM asks before the first allocation, and must not find a row afterwards."""
    manager = roco_manager(cache_manager())
    manager.remove_skipped_blocks("unknown", 1 << 16)
    assert "unknown" not in manager.req_to_blocks
    assert manager.held_blocks("unknown") == 0
    assert "unknown" not in manager.req_to_blocks


def test_freed_blocks_serve_others() -> None:
    cache = cache_manager(one_group(roco_spec(), 10))
    manager = roco_manager(cache)
    first, second = request("a"), request("b")
    assert run(cache, first, 6 * BLOCK)
    assert not run(cache, second, 4 * BLOCK)
    assert run(cache, first, 1)
    assert run(cache, second, 4 * BLOCK)
    check_integrity(manager)


@pytest.mark.parametrize("num_tokens", [1, 40, 96, 97, 400])
def test_everything_comes_back(num_tokens: int) -> None:
    """A finished, aborted or preempted request is freed the same way."""
    cache = cache_manager()
    manager = roco_manager(cache)
    free = cache.block_pool.get_num_free_blocks()
    sequence = request()
    run(cache, sequence, num_tokens)
    run(cache, sequence, 1)
    cache.free(sequence)
    assert cache.block_pool.get_num_free_blocks() == free
    assert cache.block_pool.null_block.is_null
    assert manager.held.largest == 0
    assert not manager.req_to_blocks
    check_integrity(manager)


def test_a_request_that_starts_again_evicts_again() -> None:
    """A preempted request comes back under its name, from its first token on."""
    cache = cache_manager()
    manager = roco_manager(cache)
    for _ in range(2):
        sequence = request()
        run(cache, sequence, 200)
        run(cache, sequence, 1)
        assert null_places(manager) == [4, 5, 6, 7, 8, 9, 10, 11]
        cache.free(sequence)


def test_a_request_that_was_never_allocated_can_be_freed() -> None:
    cache = cache_manager()
    cache.free(request())
    assert cache.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    check_integrity(roco_manager(cache))


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_admission_is_capped_by_the_bound(steps_in_flight: int) -> None:
    """vLLM asks whether the whole prompt fits before it admits a request."""
    spec = roco_spec(max_steps_in_flight=steps_in_flight)
    bound = spec.max_blocks_per_sequence
    for num_blocks, fits in ((bound, False), (bound + 1, True)):
        cache = cache_manager(one_group(spec, num_blocks))
        allocated = cache.allocate_slots(
            request(), 4 * BLOCK, full_sequence_must_fit=True
        )
        assert (allocated is not None) == fits


def decode_together(
    cache: KVCacheManager, sequences: list[Request], num_steps: int, in_flight: int
) -> int:
    """Decode all of them and return the most blocks that were held at once."""
    most = 0
    for _ in range(num_steps):
        for sequence in sequences:
            assert run(cache, sequence, 1, in_flight=in_flight)
            # within a step too: who comes later may be about to give blocks back
            free = cache.block_pool.get_num_free_blocks()
            most = max(most, cache.block_pool.num_gpu_blocks - 1 - free)
    return most


def evicting(cache: KVCacheManager, lengths: list[int]) -> list[Request]:
    """Return sequences that have been read and have lost their first blocks."""
    sequences = [request(str(index)) for index in range(len(lengths))]
    for sequence, length in zip(sequences, lengths, strict=True):
        assert run(cache, sequence, length)
        assert run(cache, sequence, 1)
    return sequences


FIRST_EVICTION = (BUDGET_BLOCKS + STRIDE_BLOCKS) * BLOCK
PERIOD = STRIDE_BLOCKS * BLOCK


@pytest.mark.parametrize("in_flight", [0, 1])
@given(lengths=st.lists(st.integers(FIRST_EVICTION, 400), min_size=1, max_size=6))
@example(lengths=[FIRST_EVICTION + 3 * PERIOD // 2] * 3 + [FIRST_EVICTION + 17] * 3)
def test_growth_is_foreseen(lengths: list[int], in_flight: int) -> None:
    """Whatever their places in the stride, no more than that will be held."""
    cache = cache_manager()
    sequences = evicting(cache, lengths)
    held = NUM_BLOCKS - 1 - cache.block_pool.get_num_free_blocks()
    ahead = roco_manager(cache).foreseen_blocks()
    most = decode_together(cache, sequences, 2 * PERIOD, in_flight)
    assert most <= held + ahead


@pytest.mark.parametrize("length", range(FIRST_EVICTION, FIRST_EVICTION + PERIOD, 5))
def test_no_more_than_the_growth_is_foreseen(length: int) -> None:
    """Sequences of one length reach their peak together: all of it is needed."""
    cache = cache_manager()
    sequences = evicting(cache, [length] * 5)
    held = NUM_BLOCKS - 1 - cache.block_pool.get_num_free_blocks()
    ahead = roco_manager(cache).foreseen_blocks()
    most = decode_together(cache, sequences, 2 * PERIOD, in_flight=1)
    assert held + ahead - len(sequences) <= most <= held + ahead


def test_little_is_asked_within_a_block() -> None:
    """Each step asked vLLM's own methods anew, a tenth of what `schedule` took."""
    cache = cache_manager()
    manager = roco_manager(cache)
    (sequence,) = evicting(cache, [FIRST_EVICTION])
    lengths = []
    for _ in range(2 * PERIOD):
        if sequence.num_computed_tokens + 1 > manager.quiet_until["0"]:
            lengths.append(sequence.num_computed_tokens + 1)
        assert run(cache, sequence, 1)
    # the first token of each block, the last before each eviction
    ends = {FIRST_EVICTION + PERIOD, FIRST_EVICTION + 2 * PERIOD}
    assert {length for length in lengths if length % BLOCK != 1} == ends
    assert len(lengths) == 2 * STRIDE_BLOCKS + len(ends)


def test_nothing_is_foreseen_for_sequences_that_have_lost_nothing() -> None:
    cache = cache_manager()
    assert run(cache, request(), FIRST_EVICTION)
    assert roco_manager(cache).foreseen_blocks() == 0


@pytest.mark.parametrize("num_tokens", [3 * BLOCK, 40 * BLOCK])
def test_what_an_admitted_prompt_will_take_is_foreseen(num_tokens: int) -> None:
    """Read in steps, it takes its blocks later than it was promised them."""
    cache = cache_manager(one_group(roco_spec(), NUM_BLOCKS))
    manager = roco_manager(cache)
    reading = request("a", num_tokens)
    most = min(num_tokens // BLOCK, manager.plans.default.max_blocks)
    assert cache.allocate_slots(reading, BLOCK, full_sequence_must_fit=True) is not None
    assert manager.foreseen_blocks() == most - 1
    for _ in range(num_tokens // BLOCK - 1):
        reading.num_computed_tokens += BLOCK
        assert cache.allocate_slots(reading, BLOCK) is not None
        assert manager.foreseen_blocks() == most - manager.held.of("a")
    reading.num_computed_tokens += BLOCK
    # from the first decode step on it is one of those that evict, or has lost nothing
    assert cache.allocate_slots(reading, 1) is not None
    evicts = num_tokens > FIRST_EVICTION
    assert (manager.foreseen_blocks() > 0) == evicts
    assert manager.foreseen_blocks() <= STRIDE_BLOCKS
    cache.free(reading)
    assert manager.foreseen_blocks() == 0


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", range(3 * BLOCK - 2, 3 * BLOCK + 2))
def test_decodes_in_flight_are_foreseen(num_tokens: int, steps_in_flight: int) -> None:
    """A prompt of whole blocks was promised a block less than it held: with more steps
    in flight, it decodes before its last prompt step is processed."""
    spec = roco_spec(max_steps_in_flight=steps_in_flight)
    cache = cache_manager(one_group(spec, NUM_BLOCKS))
    manager = roco_manager(cache)
    reading = request("a", num_tokens)
    assert cache.allocate_slots(reading, num_tokens, full_sequence_must_fit=True)
    promised = manager.held.of("a") + manager.foreseen_blocks()
    reading.num_computed_tokens = num_tokens
    for step in range(1, steps_in_flight):
        reading.num_in_flight_tokens = num_tokens + step - 1
        assert cache.allocate_slots(reading, 1) is not None
        reading.num_computed_tokens += 1
    assert manager.held.of("a") == promised


def test_more_than_the_bound_is_never_held() -> None:
    """With the chunk hook unheard, 225 blocks were held against 15 that vLLM had
    planned with, and nobody noticed."""
    cache = cache_manager(one_group(roco_spec(), NUM_BLOCKS))
    most = roco_manager(cache).plans.default.max_blocks
    assert run(cache, request("a"), most * BLOCK)
    with pytest.raises(RuntimeError, match=f"hold {most + 1} blocks.*vllm_roco.verify"):
        run(cache, request("b"), most * BLOCK + 1)


def test_who_begins_behind_nothing_needs_no_cache_of_prefixes() -> None:
    """The base class could not admit anybody: two of its methods were not written."""
    kwargs = {"enable_caching": False, "kv_cache_group_id": 0}
    pool = cache_manager().block_pool
    manager = BudgetedManager(
        roco_spec(), block_pool=pool, scheduler_block_size=BLOCK, **kwargs
    )

    def needed(num_tokens: int, hit: list[KVCacheBlock]) -> int:
        return manager.get_num_blocks_to_allocate(
            "a", num_tokens, hit, 0, 0, num_tokens, apply_admission_cap=True
        )

    assert needed(3 * BLOCK, []) == needed(3 * BLOCK, [pool.null_block]) == 3
    assert needed(1 << 12, []) == manager.plans.default.max_blocks


def test_another_scheduler_is_noticed() -> None:
    """Its steps may have any length."""
    cache = cache_manager()
    roco_manager(cache).scheduler_ends_chunks = False
    with pytest.raises(RuntimeError, match="Leave --scheduler-cls out"):
        run(cache, request(), BLOCK)


def test_admission_leaves_room_for_the_next_peak() -> None:
    """Blocks that are free between two peaks are not given to another request."""
    cache = cache_manager(one_group(roco_spec(), 1 + 2 * BUDGET_BLOCKS + 4))
    (sequence,) = evicting(cache, [FIRST_EVICTION])
    free = cache.block_pool.get_num_free_blocks()
    ahead = roco_manager(cache).foreseen_blocks()
    assert 0 < ahead < free
    for num_tokens, fits in (((free - ahead) * BLOCK, True), (free * BLOCK, False)):
        waiting = request("b", num_tokens)
        allocated = cache.allocate_slots(
            waiting, num_tokens, full_sequence_must_fit=True
        )
        assert (allocated is not None) == fits
        cache.free(waiting)
    # a running request is not asked to leave room for others
    assert run(cache, sequence, 1)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abc"), st.integers(1, 120)),
            st.tuples(st.sampled_from("abc"), st.just(0)),
        ),
        max_size=40,
    )
)
def test_books_agree_with_the_pool(steps: list[tuple[str, int]]) -> None:
    """Any interleaving of steps and frees (0 tokens) of three requests."""
    cache = cache_manager()
    manager = roco_manager(cache)
    running: dict[str, Request] = {}
    for request_id, num_tokens in steps:
        if num_tokens:
            sequence = running.setdefault(request_id, request(request_id))
            run(cache, sequence, num_tokens)
        elif request_id in running:
            cache.free(running.pop(request_id))
        check_integrity(manager)
        held = [manager.held_blocks(name) for name in running]
        assert manager.held.largest == max(held, default=0)
        free = cache.block_pool.get_num_free_blocks()
        assert free + sum(held) == NUM_BLOCKS - 1


def test_nothing_is_ever_cached() -> None:
    """A resident block may hold other tokens than those that it was hashed for."""
    cache = cache_manager(enable_caching=True)
    first = request("a", 300)
    assert run(cache, first, 300)
    cache.free(first)
    second = request("b", 300)
    assert second.block_hashes
    blocks, num_tokens, _ = cache.get_computed_blocks(second)
    assert num_tokens == 0
    assert not any(blocks.blocks)
    assert all(block.block_hash is None for block in cache.block_pool.blocks)


def test_another_group_keeps_its_prefix_cache_to_itself() -> None:
    """Hits need every group, so there are none beside RoCo layers."""
    spec = roco_spec()
    full = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=spec.dtype
    )
    plan = one_group(spec, NUM_BLOCKS)
    plan = replace(
        plan, kv_cache_groups=[*plan.kv_cache_groups, KVCacheGroupSpec(["full"], full)]
    )
    cache = cache_manager(plan, enable_caching=True)
    first = request("a", 160)
    assert run(cache, first, 160)
    assert run(cache, first, 1)
    roco, other = cache.coordinator.single_type_managers
    assert [block.is_null for block in roco.req_to_blocks["a"]].count(True) == 6
    assert not any(block.is_null for block in other.req_to_blocks["a"])
    cache.free(first)
    _, num_tokens, _ = cache.get_computed_blocks(request("b", 160))
    assert num_tokens == 0


class CountingRow(list[KVCacheBlock]):
    """A row that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, place: Any) -> Any:
        self.looks += 1
        return super().__getitem__(place)

    def __iter__(self) -> Any:
        raise AssertionError("walks the whole row")


@pytest.mark.parametrize("num_blocks", [1, 6, 7, 100, 1000])
def test_nothing_due_costs_no_look_at_a_row_of_any_length(num_blocks: int) -> None:
    cache = cache_manager(one_group(roco_spec(chunk=1 << 20), num_blocks + 2))
    manager = roco_manager(cache)
    sequence = request("a", 1)
    run(cache, sequence, num_blocks * BLOCK)
    processed = num_blocks * BLOCK
    manager.remove_skipped_blocks("a", processed)
    row = CountingRow(manager.req_to_blocks["a"])
    manager.req_to_blocks["a"] = row
    manager.remove_skipped_blocks("a", processed)
    assert row.looks == 0


@pytest.mark.parametrize("strides", [1, 2, 10])
def test_what_is_due_costs_a_look_for_each_block_that_goes(strides: int) -> None:
    cache = cache_manager(one_group(roco_spec(chunk=1 << 20), 1002))
    manager = roco_manager(cache)
    sequence = request("a", 1)
    run(cache, sequence, 1000 * BLOCK)
    processed = (1000 - strides * STRIDE_BLOCKS) * BLOCK
    manager.remove_skipped_blocks("a", processed)
    freed = manager.num_freed_blocks
    row = CountingRow(manager.req_to_blocks["a"])
    manager.req_to_blocks["a"] = row
    manager.remove_skipped_blocks("a", 1000 * BLOCK)
    assert manager.num_freed_blocks - freed == strides * STRIDE_BLOCKS
    assert row.looks <= strides * STRIDE_BLOCKS + 1
