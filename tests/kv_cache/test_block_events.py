# SPDX-License-Identifier: Apache-2.0
"""What a router learns of RoCo's block managers from vLLM's KV events."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from typing_extensions import override
from vllm.distributed.kv_events import (
    BlockRemoved,
    BlockStored,
    EventBatch,
    EventPublisher,
)
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from tests.scheduler_driver import BLOCK_SIZE, Driver, Setup

LONG = list(range(2, 80))
"""Evicts while it is read; 20 tokens do not."""
WHOLE: dict[str, Any] = {"roco_budget": "full"}


class Router(EventPublisher):
    """Believes all that it is told.

    Attributes:
        blocks: How many blocks there are of each hash.
        num_removed: Blocks that were there and are no longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Counter[object] = Counter()
        self.num_removed = 0

    @override
    def publish(self, events: EventBatch) -> None:
        """Take note of a step's events, each of which must make sense by itself."""
        for event in events.events:
            assert isinstance(event, BlockStored | BlockRemoved)
            assert event.group_idx == 0
            if isinstance(event, BlockRemoved):
                self.blocks.subtract(event.block_hashes)
                self.num_removed += len(event.block_hashes)
                assert min(self.blocks.values()) >= 0
            else:
                # vLLM knows the group, if not its kind
                assert event.kv_cache_spec_kind == "unknown"
                assert len(event.token_ids) == BLOCK_SIZE * len(event.block_hashes)
                parent = event.parent_block_hash
                assert parent is None or parent in self.blocks
                self.blocks.update(event.block_hashes)

    @override
    def shutdown(self) -> None:
        """Nothing to do."""


def told(driver: Driver) -> Router:
    """Return a router that is told what is stored and removed from now on."""
    router = Router()
    driver.scheduler.kv_event_publisher = router
    return router


def blocks_in(driver: Driver) -> Counter[object]:
    """Return how many blocks vLLM's pool finds by each hash."""
    pool = driver.manager.block_pool
    return Counter(
        maybe_convert_block_hash(get_block_hash(block.block_hash))
        for block in pool.blocks
        if block.block_hash is not None
        and pool.cached_block_hash_to_block.get_one_block(block.block_hash)
    )


@pytest.mark.parametrize("spare_blocks", [20, 1000])
def test_a_router_knows_what_is_found_by_tokens(spare_blocks: int) -> None:
    """Half of it was told of a group 4294967295, with a warning for each event.

    Also of blocks that go with a small pool, and of copies of a prompt before it is
    evicted from, each of which is told apart from those that others have.
    """
    driver = Driver(
        Setup(caching=True, allow_full=True, events=True, spare_blocks=spare_blocks)
    )
    router = told(driver)
    for number, options in enumerate([WHOLE, {}, WHOLE, {}]):
        # never evicts, or may; then one that does while it is read
        for max_tokens in (3, 60):
            prompt = [*LONG[:14], number, *LONG[:5]]
            driver.add(0, max_tokens, prompt=prompt, extra_args=options)
            driver.drain(500)
            assert +router.blocks == blocks_in(driver)
        driver.add(0, 1, prompt=LONG, extra_args=options)
        driver.drain(500)
        assert +router.blocks == blocks_in(driver)
    assert router.num_removed
    assert len(router.blocks) > 20


def test_snapshots_are_not_told() -> None:
    """They are of a prompt and of how it evicts; a block's hash is of tokens alone."""
    driver = Driver(Setup(caching=True, events=True))
    router = told(driver)
    driver.add(0, 1, prompt=LONG)
    driver.drain(500)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    assert cache.store.num_alive == 1
    assert not router.blocks


def test_copies_of_a_prompt_are_told_run_by_run() -> None:
    """One event told of hashes of some blocks and tokens of all from the first on."""
    driver = Driver(Setup(caching=True, events=True))
    router = told(driver)
    driver.add(0, 60, prompt=LONG[:20])
    while not router.blocks:
        driver.step()
    pool = driver.manager.block_pool
    # others have the second block and the fourth
    request = driver.scheduler.requests["0"]
    spares = pool.get_new_blocks(5)
    for place in (1, 3):
        pool.cache_full_blocks(request, spares, place, place + 1, BLOCK_SIZE, 0)
    pool.free_blocks(spares)
    driver.drain(500)
    assert +router.blocks == blocks_in(driver)
    assert set(request.block_hashes[:5]) <= {
        get_block_hash(block.block_hash) for block in pool.blocks if block.block_hash
    }
