# SPDX-License-Identifier: Apache-2.0
"""Finds blocks of sequences that have evicted nothing, by vLLM's own hashes.

Until its first eviction a sequence's blocks are what they are in any vLLM: K and V of
the tokens at their places. So a prompt that is read without eviction begins with them
at any block, not only where there is a snapshot. Whose they are decides how:

* A request that can never evict (prompt and `max_tokens` fit) *shares*: it holds the
  same blocks as others, by reference, as in stock vLLM.
* A request that may evict later will write over its blocks. They are *private*: others
  copy them while it runs, and it copies what it begins with itself. Before it evicts,
  those of its prompt are copied into free blocks, where they are kept as long as any.

A turn of a conversation that is read for the next one's sake does neither: see
`read_for_next_turn`.

The statistics in such blocks are those of all queries that have been asked over them,
whoever asked; a later eviction goes by the mean over these. A request that never
evicts, however long it gets, leaves no statistics: what it writes is found by its like
alone.
"""

from __future__ import annotations

from array import array
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.kv_cache.block_events import UNMEASURED_GROUP_ID, ToldBlockPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.request_plans import RequestPlans


class Found(NamedTuple):
    """What a request may begin with, and whether there is more in the next step.

    Attributes:
        blocks: From the first one on.
        num_shared: How many of them may be shared; the others are to be copied.
        grows: Whether the step being scheduled writes the next one. Copies are made
            before a step, and who shares a block adds to statistics that must have been
            started, so it can be begun with after the step.
    """

    blocks: list[KVCacheBlock]
    num_shared: int
    grows: bool


class _Owner(NamedTuple):
    """A request whose blocks are hashed.

    Attributes:
        request: The request.
        is_private: Whether it may evict, so that nobody may share its blocks.
        has_copies: Whether it began with copies of others' blocks.
    """

    request: Request
    is_private: bool
    has_copies: bool


class BlockCache:
    """The hashed blocks of one block manager.

    Args:
        block_pool: vLLM's blocks, with the map from hashes to them.
        group_id: vLLM's number of the manager's KV cache group.
        block_size: Tokens per block.
        plans: What holds for each request.
        is_used: Whether requests are served at all.
        serves_all: Whether those that evict while they are read begin with blocks, too.

    Attributes:
        is_used: Likewise.
        num_hits: Requests that began with blocks found here.
        num_saved_tokens: Tokens that these did not have to read.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        group_id: int,
        block_size: int,
        plans: RequestPlans,
        *,
        is_used: bool = True,
        serves_all: bool = False,
    ) -> None:
        self.num_hits = 0
        self.num_saved_tokens = 0
        self._pool = block_pool
        if block_pool.enable_kv_cache_events:
            ToldBlockPool.take_over(block_pool, group_id)
        self._group_id = group_id
        self._group_ids = [group_id]
        self._block_size = block_size
        self._plans = plans
        self.is_used = is_used
        self._serves_all = serves_all
        # unfinished requests that are not served for the sake of their next turn
        self._for_next_turn: set[str] = set()
        # who was to be read so first of all that ask the same
        self._first_to_ask: dict[BlockHash, Request] = {}
        self._owners: dict[str, _Owner] = {}
        # those of them that evict in the step being scheduled
        self._evicting: list[str] = []
        # blocks of their prompts that others have, each with a reference
        self._kept: list[KVCacheBlock] = []
        self._private_blocks: set[int] = set()
        # whether requests of a step are being chosen; what is hashed between steps has
        # been written
        self._is_choosing = True
        # blocks that are written in the step being scheduled
        self._fresh_blocks: set[int] = set()
        # where a look-up has come to one of them: blocks before it, its hash, and
        # whether the one that asked is measured
        self._growing: set[tuple[int, BlockHash, bool]] = set()

    def serves(self, request: Request) -> bool:
        """Return whether a request leaves its blocks to others, and no snapshots.

        That is one that has evicted nothing when all of it is read, unless it is read
        for its next turn, see `read_for_next_turn`.
        """
        return (
            self.is_used
            and request.num_tokens < self._first_eviction(request)
            and request.request_id not in self._for_next_turn
        )

    def read_for_next_turn(self, request: Request) -> None:
        """Let a new request begin with snapshots alone, leave such, and share no block.

        So its statistics are of its own queries, and the next turn of its conversation
        may begin where its answer ends, though it evicts. Samples of one prompt share
        its blocks instead, see `read_as_sample`.
        """
        if not self.read_as_sample(request):
            self._first_to_ask[self._prompt_key(request)] = request
            self._for_next_turn.add(request.request_id)

    def read_as_sample(self, request: Request) -> bool:
        """Return whether another request with the same prompt was to be read alone.

        It is not, unless it has begun: its blocks serve both.

        Args:
            request: A new request.
        """
        if not self._first_to_ask:
            return False
        first = self._first_to_ask.get(self._prompt_key(request))
        if first is None:
            return False
        if not first.num_computed_tokens:
            self._for_next_turn.discard(first.request_id)
        return True

    def forget(self, request: Request) -> None:
        """Forget how a request was to be read that is done."""
        self._for_next_turn.discard(request.request_id)
        if self._first_to_ask:
            prompt = self._prompt_key(request)
            if self._first_to_ask.get(prompt) is request:
                del self._first_to_ask[prompt]

    def _prompt_key(self, request: Request) -> BlockHash:
        """Return what stands for a whole prompt, the same for its samples."""
        num_blocks = request.num_prompt_tokens // self._block_size
        whole = request.block_hashes[num_blocks - 1] if num_blocks else b""
        start = num_blocks * self._block_size
        tail = request.all_token_ids[start : request.num_prompt_tokens]
        return BlockHash(whole + array("q", tail).tobytes())

    def may_evict(self, request: Request) -> bool:
        """Return whether a request evicts if it writes as much as it may."""
        most = request.num_prompt_tokens + request.max_tokens
        return most >= self._first_eviction(request)

    def can_begin_with_blocks(self, request: Request) -> bool:
        """Return whether a request may begin with what `find` returns.

        Not if it evicts while it is read, unless all are served. Nor if it has been
        preempted and may evict later: what it has written must come out as if it had
        read all by itself.
        """
        return (self._serves_all or self.serves(request)) and not (
            request.num_tokens > request.num_prompt_tokens and self.may_evict(request)
        )

    def begin(self, request: Request, *, has_copies: bool = False) -> None:
        """Note that a request is let in, whose blocks are to be found by others.

        Args:
            request: The request.
            has_copies: Whether it begins with copies of others' blocks.
        """
        is_private = self.may_evict(request)
        self._owners[request.request_id] = _Owner(request, is_private, has_copies)

    def group_of(self, request: Request) -> int:
        """Return the number under which blocks of a request are hashed."""
        if self._plans.of(request.request_id).is_measured:
            return self._group_id
        return UNMEASURED_GROUP_ID

    def is_owner(self, request_id: str) -> bool:
        """Return whether the blocks of a request are to be found by others."""
        return request_id in self._owners

    def is_sharer(self, request_id: str) -> bool:
        """Return whether a request may hold the same blocks as others."""
        owner = self._owners.get(request_id)
        return owner is not None and not owner.is_private

    def find(self, request: Request, max_tokens: int | None = None) -> Found:
        """Return the blocks that a request may begin with.

        Args:
            request: One that can begin with blocks.
            max_tokens: A bound on the tokens in them, of vLLM's own.
        """
        most_blocks = self._most_blocks(request)
        if max_tokens is not None:
            most_blocks = min(most_blocks, max_tokens // self._block_size)
        blocks: list[KVCacheBlock] = []
        num_shared: int | None = 0 if self.may_evict(request) else None
        grows = False
        measured = self._plans.of(request.request_id).is_measured
        for block_hash in request.block_hashes[:most_blocks]:
            cached = self._find_one(block_hash, measured=measured)
            if cached is None:
                break
            if cached[0].block_id in self._fresh_blocks:
                self._growing.add((len(blocks), block_hash, measured))
                grows = True
                break
            if num_shared is None and cached[0].block_id in self._private_blocks:
                num_shared = len(blocks)
            blocks += cached
        if num_shared is None:
            num_shared = len(blocks)
        return Found(blocks, num_shared, grows)

    def is_known_to_grow(self, request: Request) -> bool:
        """Return whether `find` has said for another one that there is more to come.

        For all that wait for the same blocks one of them is looked up: a block's hash
        stands for all tokens up to its end.

        Args:
            request: One that can begin with blocks.
        """
        if not self._growing:
            return False
        most_blocks, hashes = self._most_blocks(request), request.block_hashes
        measured = self._plans.of(request.request_id).is_measured
        return any(
            place < most_blocks and hashes[place] == fresh and of_measured == measured
            for place, fresh, of_measured in self._growing
        )

    def has(self, request: Request, num_tokens: int) -> bool:
        """Return whether a request may begin with so many tokens, in constant time.

        As far as can be told by the last block of them.

        Args:
            request: One that can begin with blocks.
            num_tokens: Tokens of whole blocks, fewer than the request's.
        """
        if not 0 < num_tokens < self._first_eviction(request):
            return False
        block_hash = request.block_hashes[num_tokens // self._block_size - 1]
        measured = self._plans.of(request.request_id).is_measured
        return self._find_one(block_hash, measured=measured) is not None

    @property
    def writes(self) -> bool:
        """Whether the step being scheduled writes blocks that others may want."""
        return bool(self._fresh_blocks)

    def add(self, request_id: str, blocks: Iterable[KVCacheBlock]) -> None:
        """Note blocks of a request that vLLM has hashed.

        Between steps those are full; while one is chosen, that step fills them.
        """
        ids = [block.block_id for block in blocks]
        if self._is_choosing:
            self._fresh_blocks.update(ids)
        if self._owners[request_id].is_private:
            self._private_blocks.update(ids)

    def withdraw(self, request_id: str) -> None:
        """Note that a request evicts in the step being scheduled.

        Raises:
            RuntimeError: It shares blocks.
        """
        if self.is_sharer(request_id):
            raise RuntimeError(
                f"roco: request {request_id} shares its blocks, and would evict: it "
                "has become longer than its prompt and max_tokens together. This "
                "release of vLLM is not supported; switch prefix caching off with "
                "--no-enable-prefix-caching."
            )
        self._evicting.append(request_id)

    def drop(self, request_id: str, row: Iterable[KVCacheBlock]) -> None:
        """Forget a request that lets go of its blocks; they can be found until reused.

        Those that a step should have filled that it no longer takes part in cannot.
        """
        owner = self._owners.pop(request_id, None)
        if owner is None:
            return
        row = list(row)
        ids = {block.block_id for block in row}
        self._private_blocks -= ids
        unwritten = self._fresh_blocks & ids
        if unwritten:
            self._pool.evict_blocks(unwritten)
        # who shares all that it began with has nothing that others have, too
        if owner.is_private or owner.has_copies:
            self._keep_once(row)

    def _keep_once(self, row: Iterable[KVCacheBlock]) -> None:
        """Let go of what is found twice: in a row that ends, and in older blocks.

        Both would be kept as long as they are found, in the place of other prompts'.
        Older blocks stay if somebody holds them, who leaves them or copies of them;
        otherwise those of the row do, with which others begin.
        """
        find = self._pool.cached_block_hash_to_block.get_one_block
        spare: list[KVCacheBlock] = []
        older: list[KVCacheBlock] = []
        for block in row:
            if block.block_hash is None:
                continue
            other = find(block.block_hash)
            if other is None or other is block:
                continue
            if other.ref_cnt:
                spare.append(block)
            else:
                older.append(other)
        # without a hash they are the next ones to be handed out
        self._pool.touch(older)
        self._pool.evict_blocks({block.block_id for block in chain(spare, older)})
        self._pool.free_blocks(older)

    def begin_step(self) -> None:
        """Note that requests are chosen for a step: what is hashed now it will fill."""
        self._is_choosing = True

    def end_step(
        self,
        rows: Mapping[str, Sequence[KVCacheBlock]],
        num_in_demand: Callable[[int], int],
    ) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Note that all requests of a step are chosen.

        What the step writes can be found from now on, what it evicts from cannot.

        Args:
            rows: The block table of each request.
            num_in_demand: Tells how many free blocks are not to be taken, where so many
                would be.

        Returns:
            Blocks to copy from and to before the step, each with a reference for that.
        """
        self._is_choosing = False
        self._fresh_blocks.clear()
        self._growing.clear()
        copies: list[tuple[KVCacheBlock, KVCacheBlock]] = []
        for request_id in self._evicting:
            if request_id in self._owners:
                request, row = self._owners[request_id].request, rows[request_id]
                self._pool.evict_blocks({block.block_id for block in row})
                self.drop(request_id, row)
                copies += self._keep_prompt(request, row, num_in_demand)
        self._evicting.clear()
        return copies

    def release(self) -> None:
        """Let go of what `end_step` has kept, once vLLM has let go of the copies.

        The copies come behind it in their prompts, and are to be handed out before it.
        """
        if self._kept:
            self._pool.free_blocks(reversed(self._kept))
            self._kept.clear()

    def _keep_prompt(
        self,
        request: Request,
        row: Sequence[KVCacheBlock],
        num_in_demand: Callable[[int], int],
    ) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Hash copies of blocks of a prompt that nobody else has, as room goes.

        Not over those that others have: behind these the copies are found.

        Args:
            request: The request.
            row: Its block table.
            num_in_demand: As in `end_step`.

        Returns:
            As `end_step`, the last block of the prompt first: it is free first.
        """
        hashes = request.block_hashes[: request.num_prompt_tokens // self._block_size]
        gone: list[int] = []
        there: list[KVCacheBlock] = []
        for place, block_hash in enumerate(hashes):
            cached = self._pool.get_cached_block(block_hash, self._group_ids)
            if cached is None:
                gone.append(place)
            else:
                there += cached
        if not gone:
            return []
        self._pool.touch(there)
        self._kept += there
        room = self._pool.get_num_free_blocks() - num_in_demand(len(gone))
        gone = gone[: max(0, room)]
        sources = [row[place] for place in gone]
        targets = self._pool.get_new_blocks(len(gone))
        self._pool.touch(sources)
        blocks = list(row)
        for place, target in zip(gone, targets, strict=True):
            blocks[place] = target
        for run in _runs(gone):
            # apart, or the event of it would tell of the blocks between them, too
            self._pool.cache_full_blocks(
                request=request,
                blocks=blocks,
                num_cached_blocks=run.start,
                num_full_blocks=run.stop,
                block_size=self._block_size,
                kv_cache_group_id=self._group_id,
            )
        return [*zip(sources, targets, strict=True)][::-1]

    def count_hit(self, num_tokens: int) -> None:
        """Note that a request begins with blocks of so many tokens."""
        self.num_hits += 1
        self.num_saved_tokens += num_tokens

    def _most_blocks(self, request: Request) -> int:
        """Return with how many blocks a request may begin at most."""
        # the last token must be read to go on from
        most = min(request.num_tokens, self._first_eviction(request)) - 1
        return min(most // self._block_size, len(request.block_hashes))

    def _first_eviction(self, request: Request) -> int:
        return self._plans.of(request.request_id).first_eviction

    def _find_one(
        self, block_hash: BlockHash, *, measured: bool
    ) -> list[KVCacheBlock] | None:
        """Return the block of a hash, in a list as vLLM does, None if there is none."""
        if not measured:
            # those are never private
            cached = self._pool.get_cached_block(block_hash, [UNMEASURED_GROUP_ID])
            if cached is not None:
                return cached
        return self._pool.get_cached_block(block_hash, self._group_ids)


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Yield the runs of consecutive numbers, which ascend."""
    run = range(0)
    for number in numbers:
        if number != run.stop:
            if run:
                yield run
            run = range(number, number)
        run = range(run.start, number + 1)
    if run:
        yield run
