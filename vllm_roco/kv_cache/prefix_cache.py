# SPDX-License-Identifier: Apache-2.0
"""The prefixes of one block manager, as vLLM's scheduler sees them.

What a request may begin with, or wait for, is up to `prefix_finder`; what is kept of
it, to `snapshot_publisher`, `block_cache` and `earlier_turns`. Here all of them are put
together, and told what becomes of requests.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vllm_roco.kv_cache.block_cache import BlockCache
from vllm_roco.kv_cache.earlier_turns import EarlierTurns, ExactTurns, LongestTurns
from vllm_roco.kv_cache.first_turns import FirstTurns
from vllm_roco.kv_cache.later_turns import LaterTurns
from vllm_roco.kv_cache.prefix_finder import Hit, PrefixFinder
from vllm_roco.kv_cache.prefix_keys import PrefixKeys
from vllm_roco.kv_cache.prefix_places import PrefixPlaces
from vllm_roco.kv_cache.prefix_readers import PrefixReaders
from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes
from vllm_roco.kv_cache.snapshot_publisher import SnapshotPublisher
from vllm_roco.kv_cache.snapshots import SnapshotStore
from vllm_roco.observability.families import PrefixCounts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.window_manager import WindowManager
    from vllm_roco.request_plans import RequestPlans


class PrefixCache(PrefixFinder):
    """Finds what requests may begin with, and is told what becomes of them.

    Attributes as in the base class.

    Args:
        block_pool: vLLM's blocks.
        group_id: vLLM's number of the manager's KV cache group.
        block_size: Tokens per block.
        plans: What holds for each request.
        rows: The block table of each request.
        windows: Managers of the groups of layers with a window, with the same blocks.
        is_exact: Whether who evicts while it is read keeps what it would keep alone;
            otherwise there are no windows.
        turn_end_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        group_id: int,
        block_size: int,
        plans: RequestPlans,
        rows: Mapping[str, Sequence[KVCacheBlock]],
        windows: Sequence[WindowManager] = (),
        *,
        is_exact: bool = True,
        turn_end_token_ids: Collection[int] = (),
    ) -> None:
        store = SnapshotStore(block_pool)
        keys = PrefixKeys(
            block_size,
            plans,
            block_pool.null_block,
            # beside windows, --prefix-match-unit may make it less than a block
            hash_size=block_pool.hash_block_size,
            is_of_tokens=not windows,
        )
        first_turns = FirstTurns(store)
        earlier: EarlierTurns | None = None
        if not windows:
            common = store, keys, block_size, plans
            earlier = (
                ExactTurns(*common, turn_end_token_ids, first_turns)
                if is_exact
                else LongestTurns(*common)
            )
        places = PrefixPlaces(keys, block_size, plans)
        readers, shared = PrefixReaders(), SharedPrefixes()
        super().__init__(
            store=store,
            blocks=BlockCache(
                block_pool,
                group_id,
                block_size,
                plans,
                is_used=not windows,
                serves_all=not is_exact,
            ),
            earlier=earlier,
            keys=keys,
            places=places,
            readers=readers,
            publisher=SnapshotPublisher(
                store, keys, places, readers, shared, plans, rows, windows
            ),
            windows=windows,
            block_size=block_size,
        )
        self._later: LaterTurns | None = None
        # with `longest`, turns begin behind what began with blocks, too
        if isinstance(earlier, ExactTurns):
            self._later = LaterTurns(
                store,
                shared,
                self.blocks,
                block_pool.num_gpu_blocks,
                block_size,
                plans,
                first_turns,
            )
        self._first_turns = first_turns
        self._rows = rows
        self._shared = shared
        # whom vLLM is about to let in, and what it was offered
        self._offered: tuple[Request, Hit | None] | None = None

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
        if self._earlier is not None:
            self._earlier.enter(request)
        places = self._places.between(request, 0)
        prefixes = [*self._keys.keys(request, places)]
        later = self._later
        if later is None:
            self._shared.enter(prefixes)
            return
        # this one shows where prompts part to those that come after it
        is_read = later.reads_first_turn(request, places, prefixes)
        self._shared.enter(prefixes)
        if (
            is_read
            or self._longest_earlier(request)
            or later.reads_turn(request, places, prefixes)
        ):
            self.blocks.read_for_next_turn(request)
        else:
            self.blocks.read_as_sample(request)

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
        # nobody asks about it again, and both would hold on to it
        self._offered = self._looked = None
        self._stop_waiting(request_id)
        start = 0
        if hit is not None:
            start = hit.num_tokens
            if hit.snapshot is None:
                self.blocks.count_hit(start)
            else:
                is_again = request.num_preemptions > 0
                self.store.count_hit(hit.snapshot, start, is_again=is_again)
                self._first_turns.hit(hit.snapshot)
        if self.blocks.serves(request):
            has_copies = hit is not None and hit.num_shared < len(hit.row)
            self.blocks.begin(request, has_copies=has_copies)
            return
        if self._earlier is not None:
            self._earlier.begin(request)
        places = self._places.between(request, start)
        if places:
            prefixes = [*self._keys.keys(request, places)]
            self._readers.begin(request, places, prefixes)

    def first_stop(self, request: Request, start: int, end: int) -> int:
        """Return where a step must end so that a snapshot can be made, at most `end`.

        Args:
            request: The request.
            start: Its length before the step.
            end: Its length after the step, as far as everything else is concerned.
        """
        if self.blocks.serves(request):
            return end
        for length in self._places.between(request, start, end - 1):
            if self._publisher.is_due(request, length, self._keys.key(request, length)):
                return length
        return end

    def choose(self, request: Request, end: int) -> None:
        """Note where the step being scheduled ends for a request."""
        self._readers.choose(request.request_id, end)

    def publish(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Keep what is due, when all requests of a step are chosen.

        Returns:
            Blocks to copy from and to before the step, each with a reference for that.
        """
        copies = self._publisher.publish_due()
        self._found = None
        in_demand = partial(self.store.num_blocks_in_demand, None)
        return copies + self.blocks.end_step(self._rows, in_demand)

    def end(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Take note that a request is done, before it lets go of its row."""
        self.blocks.forget(request)
        if self._later is not None:
            self._later.end(request)
        if self._earlier is not None:
            self._earlier.end(request, row)

    def reset(self) -> None:
        """Take note that vLLM has emptied its cache: nothing was pushed out."""
        self._first_turns.forget()

    def drop(self, request_id: str, row: Sequence[KVCacheBlock]) -> None:
        """Forget a request that is preempted or done, and lets go of its row."""
        self._readers.drop(request_id)
        if self._earlier is not None:
            self._earlier.drop(request_id)
        self._stop_waiting(request_id)
        self.blocks.drop(request_id, row)
