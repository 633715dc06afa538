# SPDX-License-Identifier: Apache-2.0
"""Where prompts can be cut, and that no client can make that dear for the others."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.chunking import TURNS_PER_CHUNK
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.prefix_cache import PrefixCache
from vllm_roco.kv_cache.shared_prefixes import MAX_PREFIXES
from vllm_roco.request_options.planner import RequestPlanner
from vllm_roco.request_plans import RequestPlans, ResolvedPlan

BLOCK_SIZE = 16
LENGTH = 131_072
SERVER = RocoConfig()


class Cache(PrefixCache):
    """Of a server with the default options, asked by clients with chunks of theirs."""

    def __init__(self) -> None:
        self.book = RequestPlans(self.plan({}))
        pool = BlockPool(1000, True, BLOCK_SIZE)
        super().__init__(pool, 0, BLOCK_SIZE, self.book, {})
        self.num_asked = 0
        find = self.store.find

        def counted(prefix: BlockHash) -> Any:
            self.num_asked += 1
            return find(prefix)

        self.store.find = counted  # type: ignore[method-assign]

    @staticmethod
    def plan(options: dict[str, object]) -> ResolvedPlan:
        plan = RequestPlanner(SERVER, BLOCK_SIZE).plan(options, LENGTH)
        return ResolvedPlan.of(plan, BLOCK_SIZE, 2, LENGTH)

    def request(self, name: str, chunk: int, text: int) -> Any:
        """Return a request whose whole prompt is one of the texts."""
        self.book.enter(name, self.plan({"roco_chunk": chunk}))
        words = random.Random(text)
        request = SimpleNamespace(
            request_id=name,
            num_prompt_tokens=LENGTH,
            num_tokens=LENGTH,
            max_tokens=100,
            num_computed_tokens=0,
            skip_reading_prefix_cache=False,
            block_hashes=[
                BlockHash(words.randbytes(32)) for _ in range(LENGTH // BLOCK_SIZE)
            ],
        )
        self.enter(request)
        return request


@pytest.mark.parametrize("chunk", [16, 32, 48, 256, 1024, 2048])
def test_a_small_chunk_has_no_more_places_than_the_servers_has(chunk: int) -> None:
    cache = Cache()
    reader = cache.request("reader", chunk, text=1)
    cache.offer(reader)
    cache.admit("reader")
    cache.num_asked = 0
    follower = cache.request("follower", chunk, text=2)
    assert not cache.must_wait(follower)
    assert cache.offer(follower) is None
    most = TURNS_PER_CHUNK * LENGTH // SERVER.chunk
    assert 0 < cache.num_asked <= 2 * most


@pytest.mark.parametrize("chunk", [16, 48, 1024])
def test_steps_end_at_places_and_places_at_ends_of_chunks(chunk: int) -> None:
    cache = Cache()
    reader = cache.request("reader", chunk, text=1)
    follower = cache.request("follower", chunk, text=1)
    cache.offer(reader)
    cache.admit("reader")
    # the longest place ahead is asked for, and the reader's step ends there
    assert cache.must_wait(follower)
    end = cache.first_stop(reader, 0, LENGTH)
    assert end < LENGTH
    assert end % chunk == 0
    reader.num_computed_tokens = end
    assert [place for _, place, _ in cache._readers.arrivals()][-1:] == [end]


def test_prompts_with_the_smallest_chunk_do_not_flush_what_others_share() -> None:
    cache = Cache()
    header = cache.request("a", 1024, text=1).block_hashes[: 4096 // BLOCK_SIZE]
    for name, text in (("b", 2), ("c", 3)):
        parted = cache.request(name, 1024, text=text)
        parted.block_hashes[: len(header)] = header
        cache.enter(parted)
    key = cache._keys.key(parted, 4096)
    assert cache._shared.part_at(key)
    smallest = 16
    assert 8 * LENGTH // smallest >= MAX_PREFIXES
    for text in range(8):
        cache.request(f"small {text}", smallest, text=100 + text)
    assert cache._shared.part_at(key)
