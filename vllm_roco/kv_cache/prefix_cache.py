# SPDX-License-Identifier: Apache-2.0
"""Lets requests begin behind a prefix that others have read.

At the ends of its chunks, what a sequence keeps is a function of its tokens alone.
There, and nowhere else, a snapshot of its live blocks stands for the prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm_roco.kv_cache.prefix_readers import PrefixReaders
from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes
from vllm_roco.kv_cache.snapshots import SnapshotStore
from vllm_roco.observability.families import PrefixCounts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.eviction_schedule import EvictionSchedule


class Hit(NamedTuple):
    """What a request may begin with.

    Attributes:
        num_tokens: Length of the prefix.
        prefix: Its hash.
        row: Blocks of the snapshot where a row would have them, null in the gap.
    """

    num_tokens: int
    prefix: BlockHash
    row: list[KVCacheBlock]


class PrefixCache:
    """The prefixes of one block manager.

    Args:
        block_pool: vLLM's blocks.
        schedule: The eviction arithmetic.
        chunk: Tokens between two places at which there can be a snapshot.

    Attributes:
        store: The snapshots, with their counters.
        num_waits: Requests that have waited for a prefix that another one was reading.
    """

    def __init__(
        self, block_pool: BlockPool, schedule: EvictionSchedule, chunk: int
    ) -> None:
        self.store = SnapshotStore(block_pool)
        self.num_waits = 0
        self._null_block = block_pool.null_block
        self._schedule = schedule
        self._chunk = chunk
        self._shared = SharedPrefixes()
        self._readers = PrefixReaders()
        # whom vLLM is about to let in, and what it was offered
        self._offered: tuple[Request, Hit | None] | None = None
        # for what waiting requests wait
        self._waits: dict[str, BlockHash] = {}

    def counts(self) -> PrefixCounts:
        """Return what is there and was done; each dead snapshot costs time once."""
        store = self.store
        return PrefixCounts(
            live_snapshots=store.num_alive,
            published_snapshots=store.num_published,
            dead_snapshots=store.num_dead,
            snapshot_hits=store.num_hits,
            saved_tokens=store.num_saved_tokens,
            waits=self.num_waits,
        )

    def enter(self, request: Request) -> None:
        """Take note of a new request's prompt."""
        places = self._places(request, 0)
        if places:
            self._shared.enter(self._prefixes(request, places))

    def offer(self, request: Request, max_tokens: int | None = None) -> Hit | None:
        """Return what a request may begin with, None for nothing.

        Args:
            request: A request that is about to be let in.
            max_tokens: A bound on the length of the prefix, of vLLM's own.
        """
        hit = None
        if not request.skip_reading_prefix_cache:
            hit = self._find(request, max_tokens)
        self._offered = request, hit
        return hit

    def withdraw(self, request: Request) -> None:
        """Offer nothing after all."""
        self._offered = request, None

    def admit(self, request_id: str) -> None:
        """Note that a request is let in, with what it was offered."""
        if self._offered is None or self._offered[0].request_id != request_id:
            return
        request, hit = self._offered
        self._offered = None
        self._waits.pop(request_id, None)
        start = 0
        if hit is not None:
            start = hit.num_tokens
            self.store.count_hit(hit.prefix, start)
        places = self._places(request, start)
        if places:
            self._readers.begin(request, places, self._prefixes(request, places))

    def drop(self, request_id: str) -> None:
        """Forget a request that is preempted or done."""
        self._readers.drop(request_id)
        self._waits.pop(request_id, None)

    def must_wait(self, request: Request) -> bool:
        """Return whether another request is reading more of this one's prompt.

        Constant time for one that waits already.
        """
        if not self._readers:
            return False
        awaited = self._waits.get(request.request_id)
        if awaited is not None:
            if self._readers.reader_of(awaited) is not None:
                return True
            del self._waits[request.request_id]
        if request.skip_reading_prefix_cache:
            return False
        store, readers = self.store, self._readers
        awaited = None
        others_length = 0
        for length in reversed(self._hit_places(request)):
            if awaited is not None and length <= others_length:
                break
            prefix = self._prefix(request, length)
            # a request that can begin here is no further from the end than the other
            if store.find(prefix) is not None:
                return False
            if awaited is None and (other := readers.reader_of(prefix)) is not None:
                awaited, others_length = prefix, other.num_computed_tokens
        if awaited is None:
            return False
        readers.want(awaited)
        self._waits[request.request_id] = awaited
        self.num_waits += 1
        return True

    def first_stop(self, request: Request, start: int, end: int) -> int:
        """Return where a step must end so that a snapshot can be made, at most `end`.

        Args:
            request: The request.
            start: Its length before the step.
            end: Its length after the step, as far as everything else is concerned.
        """
        chunk = self._chunk
        most = min(end - 1, request.num_prompt_tokens, self._num_hashed(request))
        for length in range((start // chunk + 1) * chunk, most + 1, chunk):
            if self._is_due(request, length, self._prefix(request, length)):
                return length
        return end

    def publish(
        self, rows: Mapping[str, Sequence[KVCacheBlock]]
    ) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Make snapshots of what is due, when all requests of a step are chosen.

        Args:
            rows: The block table of each request.

        Returns:
            Blocks to copy from and to before the step, see `SnapshotStore.publish`.
        """
        copies: list[tuple[KVCacheBlock, KVCacheBlock]] = []
        for request, length, prefix in self._readers.arrivals():
            if self._is_due(request, length, prefix):
                live = self._live(rows[request.request_id], length)
                copies += self.store.publish(prefix, live)
        return copies

    def _find(self, request: Request, max_tokens: int | None) -> Hit | None:
        for length in reversed(self._hit_places(request, max_tokens)):
            prefix = self._prefix(request, length)
            snapshot = self.store.find(prefix)
            if snapshot is not None:
                resident = self._schedule.budget_blocks
                gap = [self._null_block] * self._schedule.evicted_blocks(length)
                blocks = snapshot.blocks
                row = [*blocks[:resident], *gap, *blocks[resident:]]
                return Hit(length, prefix, row)
        return None

    def _is_due(self, request: Request, length: int, prefix: BlockHash) -> bool:
        """Return whether a snapshot at a place of a prompt is worth its blocks."""
        # the last place for a prompt that goes on, and for the same one once more:
        # its last token must be read to go on from
        return (
            length + self._chunk >= request.num_prompt_tokens
            or self._shared.part_at(prefix)
            or self._readers.is_wanted(prefix)
        )

    def _live(self, row: Sequence[KVCacheBlock], length: int) -> Sequence[KVCacheBlock]:
        resident = self._schedule.budget_blocks
        full = length // self._schedule.block_size
        incoming = resident + self._schedule.evicted_blocks(length)
        return [*row[: min(resident, full)], *row[incoming:full]]

    def _places(self, request: Request, start: int) -> range:
        """Return the lengths of a prompt behind `start` where it can be cut."""
        chunk = self._chunk
        most = min(request.num_prompt_tokens, self._num_hashed(request))
        return range((start // chunk + 1) * chunk, most + 1, chunk)

    def _hit_places(self, request: Request, max_tokens: int | None = None) -> range:
        # generated tokens were read one by one, the first time
        most = min(
            request.num_prompt_tokens,
            request.num_tokens - 1,
            self._num_hashed(request),
        )
        if max_tokens is not None:
            most = min(most, max_tokens)
        return range(self._chunk, most + 1, self._chunk)

    def _num_hashed(self, request: Request) -> int:
        return len(request.block_hashes) * self._schedule.block_size

    def _prefix(self, request: Request, length: int) -> BlockHash:
        return request.block_hashes[length // self._schedule.block_size - 1]

    def _prefixes(self, request: Request, places: Sequence[int]) -> Sequence[BlockHash]:
        return [self._prefix(request, length) for length in places]
