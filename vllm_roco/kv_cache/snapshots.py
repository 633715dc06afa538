# SPDX-License-Identifier: Apache-2.0
"""What sequences hold at a place in their text: frozen copies, and full blocks.

Owned by nobody: a snapshot's blocks lie in vLLM's free queue, where they count as free
memory, are kept in the order of their last use and are taken when memory is short: by
who runs, but by nobody who is let in while others run if the snapshot is in demand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from vllm_roco.kv_cache.recent_hits import RecentHits

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

MAX_LOST = 1024
"""Prefixes that are remembered to have had a snapshot, at most."""
MOST_IN_DEMAND = 0.25
"""Share of all blocks that nobody is let in on for the sake of snapshots, at most."""


class Snapshot(NamedTuple):
    """The live blocks of a sequence at the end of a prefix.

    It has read no more, or ends there: then statistics may count its last tokens, too.

    Attributes:
        name: What each block bears as its hash while its content is the snapshot's.
        blocks: Resident blocks, then incoming ones: copies, all full, or those of a
            sequence that has ended.
        windows: Of each group of layers with a window the blocks in it, all full. They
            are no copies, and may be those of a sequence or of other snapshots, too.
        window_names: What each of these bears as its hash, one group after the other.
    """

    name: BlockHashWithGroupId
    blocks: Sequence[KVCacheBlock]
    windows: Sequence[Sequence[KVCacheBlock]] = ()
    window_names: Sequence[BlockHashWithGroupId | None] = ()

    @property
    def is_whole(self) -> bool:
        """Whether vLLM has handed out none of the blocks, and not reset its cache."""
        name = self.name
        return all(block.block_hash == name for block in self.blocks) and all(
            block.block_hash == name
            for block, name in zip(
                chain.from_iterable(self.windows), self.window_names, strict=True
            )
        )

    @property
    def has_ends(self) -> bool:
        """Whether vLLM has handed out neither the first of the blocks nor the last.

        One of the two is the first in vLLM's free queue: the first of new copies, the
        last behind a hit, or of a sequence that has ended. In constant time.
        """
        ends = self.blocks[0], self.blocks[-1]
        return all(block.block_hash == self.name for block in ends)


class SnapshotStore:
    """Snapshots by the hash of the prefix that they stand for.

    vLLM's pool wipes the hash of a block that it hands out, and all of them when the
    prefix cache is reset. So the block tells by its hash whether it is still part of a
    snapshot, and nothing has to be told to the store.

    Attributes:
        num_published: Snapshots made since the start.
        num_hits: Requests that began with one.
        num_saved_tokens: Tokens that these did not have to read.
        num_dead: Snapshots that a look-up would have found, had they been whole.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._pool = block_pool
        self._most_in_demand = int(MOST_IN_DEMAND * block_pool.num_gpu_blocks)
        # the least recently used first, as in vLLM's free queue
        self._snapshots: OrderedDict[BlockHash, Snapshot] = OrderedDict()
        # prefixes of overwritten ones that nobody has looked up since, in order
        self._lost: OrderedDict[BlockHash, None] = OrderedDict()
        self._recent_hits = RecentHits()
        self.num_published = 0
        self.num_hits = 0
        self.num_saved_tokens = 0
        self.num_dead = 0

    @property
    def num_alive(self) -> int:
        """Snapshots that can be hit; each that no longer can costs time once."""
        self._forget_overwritten()
        return len(self._snapshots)

    def find(self, prefix: BlockHash) -> Snapshot | None:
        """Return the snapshot of a prefix, None if there is none or no longer."""
        snapshot = self._snapshots.get(prefix)
        if snapshot is not None and snapshot.is_whole:
            return snapshot
        if snapshot is not None:
            del self._snapshots[prefix]
            self.num_dead += 1
        elif prefix in self._lost:
            del self._lost[prefix]
            self.num_dead += 1
        return None

    def has(self, prefix: BlockHash) -> bool:
        """Return whether there is a whole snapshot of a prefix; not a look-up."""
        snapshot = self._snapshots.get(prefix)
        return snapshot is not None and snapshot.is_whole

    def has_ends(self, prefix: BlockHash) -> bool:
        """Return whether vLLM has not begun to hand out a prefix's snapshot.

        As far as can be told in constant time; not a look-up.
        """
        snapshot = self._snapshots.get(prefix)
        return snapshot is not None and snapshot.has_ends

    def may_have(self, prefix: BlockHash) -> bool:
        """Return whether there is a snapshot of a prefix, whole or not."""
        return prefix in self._snapshots

    def renew(self, prefix: BlockHash) -> None:
        """Note that a snapshot's blocks become the last ones of vLLM's free queue."""
        if prefix in self._snapshots:
            self._snapshots.move_to_end(prefix)

    def count_hit(
        self, prefix: BlockHash, num_tokens: int, *, is_again: bool = False
    ) -> None:
        """Note that a request begins behind a prefix.

        Args:
            prefix: Its hash.
            num_tokens: Its length.
            is_again: Whether it was preempted, and is no sign of others.
        """
        self.renew(prefix)
        if not is_again:
            self._recent_hits.add(prefix)
        self.num_hits += 1
        self.num_saved_tokens += num_tokens

    def num_blocks_in_demand(self, but: BlockHash | None, num_taken: int) -> int:
        """Return the free blocks of snapshots that are begun with again and again.

        Not those in windows, which are few and may be a sequence's. Nothing is counted
        where enough is left in any case, which is constant time.

        Args:
            but: The prefix of one that is not counted.
            num_taken: Free blocks that are to be taken.

        Returns:
            At most `MOST_IN_DEMAND` of all blocks; 0 where so many are left besides.
        """
        if num_taken + self._most_in_demand <= self._pool.get_num_free_blocks():
            return 0
        blocks = sum(
            len(snapshot.blocks)
            for prefix in self._recent_hits.repeated
            if prefix != but
            and (snapshot := self._snapshots.get(prefix)) is not None
            and snapshot.has_ends
            # or it is being copied
            and not snapshot.blocks[0].ref_cnt
        )
        return min(blocks, self._most_in_demand)

    def publish(
        self,
        prefix: BlockHash,
        live_blocks: Sequence[KVCacheBlock],
        windows: Sequence[Sequence[KVCacheBlock]] = (),
        *,
        is_wanted: bool = False,
    ) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Make a snapshot of the prefix if there is none and so many blocks are free.

        Beside those of snapshots that are in demand, unless somebody waits for it.

        Args:
            prefix: Its hash.
            live_blocks: What a sequence holds that has read it and no more.
            windows: Likewise in each group of layers with a window, full blocks which
                are never written again and which nobody else hashes.
            is_wanted: Whether somebody waits for it.

        Returns:
            Blocks to copy from and to, each with a reference for the copy.
        """
        needed, free = len(live_blocks), self._pool.get_num_free_blocks()
        if needed <= free and not is_wanted:
            needed += self.num_blocks_in_demand(None, needed)
        if needed > free or self.find(prefix):
            return []
        copies = self._pool.get_new_blocks(len(live_blocks))
        self._pool.touch(live_blocks)
        self._enter(prefix, copies, windows)
        return list(zip(live_blocks, copies, strict=True))

    def keep(self, prefix: BlockHash, live_blocks: Sequence[KVCacheBlock]) -> None:
        """Make a snapshot of what a sequence holds that ends, if there is none.

        Args:
            prefix: Hash of what it has read and written.
            live_blocks: What it holds of that, without a hash, before it lets go of it;
                the last one may be full in part.
        """
        if self.find(prefix) is None:
            self._enter(prefix, live_blocks, ())

    def _enter(
        self,
        prefix: BlockHash,
        blocks: Sequence[KVCacheBlock],
        windows: Sequence[Sequence[KVCacheBlock]],
    ) -> None:
        self.num_published += 1
        # no hash of a prefix is so short
        name = make_block_hash_with_group_id(
            BlockHash(self.num_published.to_bytes(8, "big")), 0
        )
        for block in blocks:
            block.set_block_hash(name)
        in_windows = [*chain.from_iterable(windows)]
        for block in in_windows:
            # a name stands for what was in the block when it got it
            if block.block_hash is None:
                block.set_block_hash(name)
        self._forget_overwritten()
        self._snapshots[prefix] = Snapshot(
            name, blocks, windows, [block.block_hash for block in in_windows]
        )

    def _forget_overwritten(self) -> None:
        """Drop the oldest snapshots as far as vLLM has begun to hand them out."""
        snapshots = self._snapshots
        while snapshots:
            prefix, snapshot = next(iter(snapshots.items()))
            # an end of the copies is the first of the snapshot in vLLM's free queue:
            # blocks in windows are freed later, when these have moved on. Without a KV
            # connector copies are free as soon as their step is scheduled
            if snapshot.has_ends:
                return
            del snapshots[prefix]
            self._lost[prefix] = None
            if len(self._lost) > MAX_LOST:
                self._lost.popitem(last=False)
