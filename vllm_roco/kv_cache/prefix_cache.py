# SPDX-License-Identifier: Apache-2.0
"""Lets requests begin behind a prefix that others have read.

A prompt that evicts while it is read begins with a snapshot: at the ends of its chunks,
and nowhere else, what a sequence keeps is a function of its tokens alone. One that does
not may also begin with blocks, see `block_cache`.

That is `prefix_hits: exact`. With `longest` all prompts may begin with blocks, and with
the blocks in which an answer ended, that has evicted: they hold what the conversation
kept, which is not what its next turn would keep if it read all of it.

Where other layers have a sliding window, a snapshot holds their blocks as well, and all
prompts begin with snapshots: of one that evicts nothing it is a function of its tokens,
too, but blocks that are found one by one would have to be there for all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.eviction_schedule import NEVER
from vllm_roco.kv_cache.block_cache import BlockCache, Found
from vllm_roco.kv_cache.prefix_readers import PrefixReaders
from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes
from vllm_roco.kv_cache.snapshots import SnapshotStore
from vllm_roco.observability.families import PrefixCounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.window_manager import WindowManager
    from vllm_roco.request_plans import RequestPlans

_UNMEASURED = b"unmeasured"


class Hit(NamedTuple):
    """What a request may begin with.

    Attributes:
        num_tokens: Length of the prefix.
        row: Blocks where a row would have them, null in the gap.
        num_shared: First blocks of the row that the request may hold itself; of the
            others it needs copies.
        snapshot: Hash of the prefix if the blocks are a snapshot's.
        windows: Rows of the groups of layers with a window, in their order, to be held
            as they are.
    """

    num_tokens: int
    row: list[KVCacheBlock]
    num_shared: int = 0
    snapshot: BlockHash | None = None
    windows: Sequence[list[KVCacheBlock]] = ()


class PrefixCache:
    """The prefixes of one block manager.

    Args:
        block_pool: vLLM's blocks.
        group_id: vLLM's number of the manager's KV cache group.
        block_size: Tokens per block.
        plans: What holds for each request.
        windows: Managers of the groups of layers with a window, with the same blocks.
        is_exact: Whether who evicts while it is read keeps what it would keep alone;
            otherwise there are no windows.

    Attributes:
        windows: Likewise.
        store: The snapshots, with their counters.
        blocks: The blocks of sequences that have evicted nothing, with theirs.
        num_waits: Requests that have waited for a prefix that another one was reading.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        group_id: int,
        block_size: int,
        plans: RequestPlans,
        windows: Sequence[WindowManager] = (),
        *,
        is_exact: bool = True,
    ) -> None:
        self.windows = windows
        self.store = SnapshotStore(block_pool)
        self.blocks = BlockCache(
            block_pool,
            group_id,
            block_size,
            plans,
            is_used=not windows,
            serves_all=not is_exact,
        )
        self.num_waits = 0
        self._null_block = block_pool.null_block
        self._block_size = block_size
        # beside windows, --prefix-match-unit may make it less than a block
        self._hash_size = block_pool.hash_block_size
        self._plans = plans
        self._is_exact = is_exact
        # lengths at which earlier turns of waiting requests ended
        self._earlier: dict[str, int] = {}
        self._shared = SharedPrefixes()
        self._readers = PrefixReaders()
        # what blocks there are for whom vLLM asks about next, from `must_wait`
        self._found: tuple[Request, Found] | None = None
        # whom vLLM is about to let in, and what it was offered
        self._offered: tuple[Request, Hit | None] | None = None
        # for what waiting requests wait; None for blocks of the step being chosen
        self._waits: dict[str, BlockHash | None] = {}
        # of waiting requests, the readers' changes that they have seen
        self._asked: dict[str, int] = {}

    def counts(self) -> PrefixCounts:
        """Return what is there and was done; each dead snapshot costs time once."""
        store, blocks = self.store, self.blocks
        return PrefixCounts(
            live_snapshots=store.num_alive,
            published_snapshots=store.num_published,
            dead_snapshots=store.num_dead,
            snapshot_hits=store.num_hits,
            block_hits=blocks.num_hits,
            saved_tokens=store.num_saved_tokens + blocks.num_saved_tokens,
            waits=self.num_waits,
        )

    def enter(self, request: Request) -> None:
        """Take note of a new request's prompt."""
        if not self._is_exact and (length := self._earlier_end(request)):
            self._earlier[request.request_id] = length
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
            hit = self._find_snapshot(request, max_tokens)
            if self.blocks.can_begin_with_blocks(request):
                found = self._blocks_for(request, max_tokens)
                num_tokens = len(found.blocks) * self._block_size
                if num_tokens > (hit.num_tokens if hit else 0):
                    hit = Hit(num_tokens, found.blocks, found.num_shared)
        self._offered = request, hit
        return hit

    def _blocks_for(self, request: Request, max_tokens: int | None) -> Found:
        known, self._found = self._found, None
        if max_tokens is None and known is not None and known[0] is request:
            return known[1]
        return self.blocks.find(request, max_tokens)

    def offered_to(self, request_id: str) -> Hit | None:
        """Return what a request was offered that vLLM is about to let in."""
        if self._offered is None or self._offered[0].request_id != request_id:
            return None
        return self._offered[1]

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
        self._asked.pop(request_id, None)
        start = 0
        if hit is not None:
            start = hit.num_tokens
            if hit.snapshot is None:
                self.blocks.count_hit(start)
            else:
                self.store.count_hit(hit.snapshot, start)
        if self.blocks.serves(request):
            self.blocks.begin(request)
            return
        places = self._places(request, start)
        if places:
            self._readers.begin(request, places, self._prefixes(request, places))

    def keep_end(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Keep what a request holds that is done, for the turn that goes on from it.

        Steps in flight may still write into its blocks, before anybody reads these.

        Args:
            request: A request that has evicted, or not.
            row: Its block table.
        """
        self._earlier.pop(request.request_id, None)
        if self._is_exact or not row:
            return
        size, request_id = self._block_size, request.request_id
        schedule = self._plans.of(request_id).schedule
        computed = request.num_computed_tokens
        length = min(computed, self._num_hashed(request)) // size * size
        evicted = schedule.evicted_blocks(computed)
        if (
            # who has evicted nothing leaves blocks
            not evicted
            or computed < request.num_prompt_tokens
            or schedule.evicted_blocks(length) != evicted
            # a next turn evicts on behind it
            or schedule.next_eviction(length) == NEVER
        ):
            return
        live = self._live(request, row, length)
        self.store.keep(self._prefix(request, length), live)

    def drop(self, request_id: str, row: Sequence[KVCacheBlock]) -> None:
        """Forget a request that is preempted or done, and lets go of its row."""
        self._readers.drop(request_id)
        self._waits.pop(request_id, None)
        self._asked.pop(request_id, None)
        self.blocks.drop(request_id, row)

    def must_wait(self, request: Request) -> bool:
        """Return whether another request is reading more of this one's prompt.

        Constant time for one that waits already.
        """
        self._found = None
        if request.skip_reading_prefix_cache:
            return False
        awaited = self._waits.get(request.request_id)
        if awaited is not None and self._readers.reader_of(awaited) is not None:
            return True
        start = 0
        if self.blocks.can_begin_with_blocks(request) and (
            self.blocks.writes or self._readers
        ):
            found = self.blocks.find(request)
            if found.grows:
                return self._wait(request, None)
            self._found = request, found
            start = len(found.blocks) * self._block_size
        awaited = self._awaited(request, start)
        if awaited is None:
            return False
        self._readers.want(awaited)
        return self._wait(request, awaited)

    def ask(self, request: Request) -> None:
        """Ask who reads more of a waiting request's prompt for a snapshot.

        Constant time as long as nobody begins or ceases to read.
        """
        changes = self._readers.num_changes
        if self._asked.get(request.request_id) != changes:
            self._asked[request.request_id] = changes
            self.must_wait(request)

    def last_length(self, request: Request) -> int:
        """Return a length at which a request can begin, 0 if none of the last ones.

        Constant time: shorter prefixes are not looked for.
        """
        places = self._hit_places(request)
        if not places or request.skip_reading_prefix_cache:
            return 0
        length = places[-1]
        if self.store.find(self._prefix(request, length)) is not None:
            return length
        if (earlier := self._earlier_length(request)) > 0:
            return earlier
        blocks = self.blocks
        if blocks.can_begin_with_blocks(request) and blocks.has(request, length):
            return length
        return 0

    def _wait(self, request: Request, awaited: BlockHash | None) -> bool:
        self.num_waits += request.request_id not in self._waits
        self._waits[request.request_id] = awaited
        return True

    def _awaited(self, request: Request, start: int) -> BlockHash | None:
        """Return the prefix longer than `start` that another request is reading."""
        if not self._readers:
            return None
        store, readers = self.store, self._readers
        start = max(start, self._earlier_length(request))
        awaited = None
        others_length = 0
        for length in reversed(self._hit_places(request)):
            if length <= max(start, others_length):
                break
            prefix = self._prefix(request, length)
            # a request that can begin here is no further from the end than the other
            if store.find(prefix) is not None:
                return None
            if awaited is None and (other := readers.reader_of(prefix)) is not None:
                awaited, others_length = prefix, other.num_computed_tokens
        return awaited

    def first_stop(self, request: Request, start: int, end: int) -> int:
        """Return where a step must end so that a snapshot can be made, at most `end`.

        Args:
            request: The request.
            start: Its length before the step.
            end: Its length after the step, as far as everything else is concerned.
        """
        if self.blocks.serves(request):
            return end
        chunk = self._plans.of(request.request_id).chunk
        most = min(end - 1, request.num_prompt_tokens, self._num_hashed(request))
        for length in range((start // chunk + 1) * chunk, most + 1, chunk):
            if self._is_due(request, length, self._prefix(request, length)):
                return length
        return end

    def publish(
        self, rows: Mapping[str, Sequence[KVCacheBlock]]
    ) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Keep what is due, when all requests of a step are chosen.

        Args:
            rows: The block table of each request.

        Returns:
            Blocks to copy from and to before the step, each with a reference for that.
        """
        copies: list[tuple[KVCacheBlock, KVCacheBlock]] = []
        for request, length, prefix in self._readers.arrivals():
            if self._is_due(request, length, prefix):
                request_id = request.request_id
                live = self._live(request, rows[request_id], length)
                windows = [w.blocks_at(request_id, length) for w in self.windows]
                copies += self.store.publish(prefix, live, windows)
        self._found = None
        return copies + self.blocks.end_step(rows)

    def _find_snapshot(self, request: Request, max_tokens: int | None) -> Hit | None:
        places: Iterable[int] = reversed(self._hit_places(request, max_tokens))
        earlier = self._earlier.get(request.request_id, 0)
        if earlier and (max_tokens is None or earlier <= max_tokens):
            places = sorted({*places, earlier}, reverse=True)
        for length in places:
            prefix = self._prefix(request, length)
            snapshot = self.store.find(prefix)
            if snapshot is not None:
                schedule = self._plans.of(request.request_id).schedule
                resident = schedule.budget_blocks
                gap = [self._null_block] * schedule.evicted_blocks(length)
                blocks = snapshot.blocks
                row = [*blocks[:resident], *gap, *blocks[resident:]]
                windows = [
                    manager.row_at(in_window, length)
                    for manager, in_window in zip(
                        self.windows, snapshot.windows, strict=True
                    )
                ]
                return Hit(length, row, snapshot=prefix, windows=windows)
        return None

    def _earlier_end(self, request: Request) -> int:
        """Return the last length of a prompt at which a sequence was kept."""
        size = self._block_size
        plan = self._plans.of(request.request_id)
        most = (request.num_prompt_tokens - 1) // size
        hashes = request.block_hashes[:most]
        for number in range(len(hashes), plan.first_eviction // size - 1, -1):
            if self.store.may_have(BlockHash(hashes[number - 1] + plan.snapshot_key)):
                return number * size
        return 0

    def _earlier_length(self, request: Request) -> int:
        """Return at which length a request can begin behind an earlier turn, or 0."""
        length = self._earlier.get(request.request_id, 0)
        if length and self.store.find(self._prefix(request, length)) is None:
            del self._earlier[request.request_id]
            return 0
        return length

    def _is_due(self, request: Request, length: int, prefix: BlockHash) -> bool:
        """Return whether a snapshot at a place of a prompt is worth its blocks."""
        # the last place for a prompt that goes on, and for the same one once more:
        # its last token must be read to go on from
        return (
            length + self._plans.of(request.request_id).chunk
            >= request.num_prompt_tokens
            or self._shared.part_at(prefix)
            or self._readers.is_wanted(prefix)
        )

    def _live(
        self, request: Request, row: Sequence[KVCacheBlock], length: int
    ) -> Sequence[KVCacheBlock]:
        schedule = self._plans.of(request.request_id).schedule
        resident = schedule.budget_blocks
        full = length // self._block_size
        incoming = resident + schedule.evicted_blocks(length)
        return [*row[: min(resident, full)], *row[incoming:full]]

    def _places(self, request: Request, start: int) -> range:
        """Return the lengths of a prompt behind `start` where it can be cut."""
        chunk = self._plans.of(request.request_id).chunk
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
        chunk = self._plans.of(request.request_id).chunk
        return range(chunk, most + 1, chunk)

    def _num_hashed(self, request: Request) -> int:
        return len(request.block_hashes) * self._hash_size

    def _prefix(self, request: Request, length: int) -> BlockHash:
        """Return what stands for all of which depends what is kept at a place."""
        (prefix,) = self._prefixes(request, (length,))
        return prefix

    def _prefixes(self, request: Request, places: Sequence[int]) -> Sequence[BlockHash]:
        plan = self._plans.of(request.request_id)
        first, key, size = plan.first_eviction, plan.snapshot_key, self._hash_size
        # while nothing is evicted, only the tokens matter
        early_key = b"" if plan.is_measured or self.blocks.is_used else _UNMEASURED
        hashes = request.block_hashes
        return [
            BlockHash(
                hashes[length // size - 1] + (early_key if length < first else key)
            )
            for length in places
        ]
