# SPDX-License-Identifier: Apache-2.0
"""Where prompts can be cut, and that no client can make that dear for the others."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
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
        self.num_keys = 0
        keys = self._keys.keys

        def each(request: Any, lengths: Iterable[int]) -> Iterator[BlockHash]:
            for key in keys(request, lengths):
                self.num_keys += 1
                yield key

        self._keys.keys = each  # type: ignore[method-assign]

    @staticmethod
    def plan(options: dict[str, object]) -> ResolvedPlan:
        plan = RequestPlanner(SERVER, BLOCK_SIZE).plan(options, LENGTH)
        return ResolvedPlan.of(plan, BLOCK_SIZE, 2, LENGTH)

    def request(
        self, name: str, chunk: int, text: int, other: Any = None, num_shared: int = 0
    ) -> Any:
        """Return a request whose whole prompt is one of the texts.

        Args:
            name: Its id.
            chunk: Its own chunk.
            text: Which text.
            other: A request whose prompt begins likewise.
            num_shared: As many tokens.
        """
        self.book.enter(name, self.plan({"roco_chunk": chunk}))
        words = random.Random(text)
        request = SimpleNamespace(
            request_id=name,
            num_prompt_tokens=LENGTH,
            num_tokens=LENGTH,
            max_tokens=100,
            num_computed_tokens=0,
            num_preemptions=0,
            skip_reading_prefix_cache=False,
            block_hashes=[
                BlockHash(words.randbytes(32)) for _ in range(LENGTH // BLOCK_SIZE)
            ],
        )
        if other is not None:
            shared = other.block_hashes[: num_shared // BLOCK_SIZE]
            request.block_hashes[: len(shared)] = shared
        self.enter(request)
        return request

    def admit_first(self, request: Any) -> None:
        """Let a request in, whatever it begins with."""
        self.offer(request)
        self.admit(request.request_id)


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


def test_a_prompt_is_not_gone_through_for_readers_of_others() -> None:
    """64 that wait for their turn did that whenever one began to read, or ended."""
    cache = Cache()
    first = cache.request("first", 1024, text=1)
    second = cache.request("second", 256, text=2, other=first, num_shared=1024)
    for reader in (first, second):
        cache.admit_first(reader)
    follower = cache.request("follower", 256, text=3, other=second, num_shared=4096)
    # both are behind what they share with it
    for reader in (first, second):
        reader.num_computed_tokens = 5120
    assert [*cache._readers.arrivals()]
    cache.num_keys = cache.num_asked = 0
    assert not cache.must_wait(follower)
    assert cache.num_keys <= 2
    assert cache.num_asked == 0


@pytest.mark.parametrize("seed", range(20))
def test_whoever_shares_a_place_ahead_of_a_reader_is_seen(seed: int) -> None:
    draw = random.Random(seed)
    cache = Cache()
    requests: list[Any] = []
    for number in range(8):
        chunk = draw.choice([16, 48, 256, 512, 1024])
        other = draw.choice(requests) if requests else None
        num_shared = draw.randrange(0, 12_000, BLOCK_SIZE)
        name = str(number)
        requests.append(cache.request(name, chunk, number, other, num_shared))
    readers, followers = requests[::2], requests[1::2]
    for reader in readers:
        cache.admit_first(reader)
    num_read = 0
    for _ in range(40):
        for reader in readers:
            reader.num_computed_tokens += draw.randrange(0, 40) * BLOCK_SIZE
        for follower in followers:
            places = cache._places.between(follower, 0)
            prefixes = cache._keys.keys(follower, places)
            is_read = any(
                cache._readers.reader_of(prefix, place)
                for prefix, place in zip(prefixes, places, strict=True)
            )
            num_read += is_read
            assert cache._is_being_read(follower) >= is_read
        [*cache._readers.arrivals()]
    assert num_read > 0


def test_who_waits_for_room_is_looked_for_once() -> None:
    """In each step all places of the first one in the queue were looked up again."""
    cache = Cache()
    request = cache.request("waits", 256, text=1)
    lengths = [4096, 8192, LENGTH]
    keys = {length: cache._keys.key(request, length) for length in lengths}

    def look() -> tuple[int, int]:
        """Return how much is offered, and look-ups that were made for it."""
        cache.num_asked = 0
        hit = cache.offer(request)
        return 0 if hit is None else hit.num_tokens, cache.num_asked

    def publish(length: int) -> None:
        pool = cache.store._pool
        live = pool.get_new_blocks(10)
        for _, copy in cache.store.publish(keys[length], live):
            pool.free_blocks([copy])

    num_places = len(cache._places.between(request, 0, LENGTH - 1))
    assert look() == (0, num_places)
    assert look() == (0, 0)
    # another one's, behind which it does not begin
    other = cache.request("other", 256, text=2)
    keys[0] = cache._keys.key(other, 4096)
    publish(0)
    assert look() == (0, num_places)
    # one of all of it, which has no token left to be read
    publish(LENGTH)
    publish(8192)
    found, num_asked = look()
    assert (found, num_asked < num_places) == (8192, True)
    assert look() == (8192, 1)
    publish(4096)
    assert look() == (8192, num_asked)
    # what it would begin with is overwritten
    dead = cache.store.find(keys[8192])
    assert dead is not None
    dead.blocks[0].reset_hash()
    found, num_asked = look()
    assert (found, num_asked < num_places) == (4096, True)
    assert look() == (4096, 1)
    # who has written something before it was preempted has
    request.num_tokens += 1
    assert look() == (LENGTH, 1)


def test_what_was_found_for_one_is_no_bound_for_the_next() -> None:
    """They are as long as each other, and no snapshot is made in between."""
    cache = Cache()
    first, second = (cache.request(str(text), 256, text) for text in range(2))
    pool = cache.store._pool
    for _, copy in cache.store.publish(
        cache._keys.key(second, 4096), pool.get_new_blocks(10)
    ):
        pool.free_blocks([copy])
    assert cache.offer(first) is None
    hit = cache.offer(second)
    assert hit is not None
    assert hit.num_tokens == 4096


def test_each_place_of_a_new_prompt_has_one_key() -> None:
    cache = Cache()
    request = cache.request("a", 256, text=1)
    assert cache.num_keys == len(cache._places.between(request, 0))
