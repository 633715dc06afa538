# SPDX-License-Identifier: Apache-2.0
"""Books that do not agree with the block tables are noticed."""

from __future__ import annotations

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager

from tests.kv_cache.managers import cache_manager, request, roco_manager, run
from vllm_roco.kv_cache.integrity import check_integrity


@pytest.fixture
def cache() -> KVCacheManager:
    """Two requests, one of which has lost two blocks."""
    cache = cache_manager()
    first, second = request("a"), request("b")
    run(cache, first, 96)
    run(cache, first, 1)
    run(cache, second, 40)
    check_integrity(roco_manager(cache))
    return cache


def test_a_block_that_two_requests_hold(
    cache: KVCacheManager,
) -> None:
    manager = roco_manager(cache)
    manager.req_to_blocks["b"][0] = manager.req_to_blocks["a"][0]
    with pytest.raises(RuntimeError, match="is held by request b and by request a"):
        check_integrity(manager)


def test_a_block_that_a_request_holds_twice(
    cache: KVCacheManager,
) -> None:
    manager = roco_manager(cache)
    manager.req_to_blocks["b"][0] = manager.req_to_blocks["b"][1]
    with pytest.raises(RuntimeError, match="is held by request b and by request b"):
        check_integrity(manager)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_gap_in_the_wrong_place(cache: KVCacheManager, place: int) -> None:
    manager = roco_manager(cache)
    row = manager.req_to_blocks["a"]
    row[4], row[place] = row[place], row[4]
    with pytest.raises(RuntimeError, match=r"null blocks at .* a gap at \[4, 5\]"):
        check_integrity(manager)


def test_wrong_counts(cache: KVCacheManager) -> None:
    manager = roco_manager(cache)
    manager.held.add("b", 1)
    with pytest.raises(RuntimeError, match="holds 3 blocks, but 4 are on the books"):
        check_integrity(manager)


def test_a_count_of_a_request_that_is_gone(
    cache: KVCacheManager,
) -> None:
    manager = roco_manager(cache)
    del manager.req_to_blocks["b"]
    with pytest.raises(RuntimeError, match="b has no row, but 3 blocks are on the"):
        check_integrity(manager)


def test_a_block_that_is_free(cache: KVCacheManager) -> None:
    manager = roco_manager(cache)
    cache.block_pool.free_blocks([manager.req_to_blocks["b"][2]])
    with pytest.raises(RuntimeError, match="of request b has 0 references"):
        check_integrity(manager)


def test_a_hash_on_a_block_that_will_be_written_over(cache: KVCacheManager) -> None:
    manager = roco_manager(cache)
    owner = request("a")
    cache.block_pool.cache_full_blocks(
        owner, manager.req_to_blocks["a"], 0, 1, manager.block_size, 0
    )
    with pytest.raises(RuntimeError, match="of request a bears a hash"):
        check_integrity(manager)


@pytest.mark.parametrize("request_id", ["a", "b"])
def test_a_length_that_is_passed_over(cache: KVCacheManager, request_id: str) -> None:
    """At which "a" evicts next, and "b" needs its next block."""
    manager = roco_manager(cache)
    manager.quiet_until[request_id] += 16
    with pytest.raises(RuntimeError, match=f"request {request_id} is taken to need"):
        check_integrity(manager)
