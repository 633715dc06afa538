# SPDX-License-Identifier: Apache-2.0
"""The prefixes of one block manager, as vLLM's scheduler sees them.

What a request may begin with, or wait for, is up to `prefix_finder`; what is kept of
it, to `snapshot_publisher`, `block_cache` and `earlier_turns`. Here all of them are put
together, and told what becomes of requests.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vllm_roco.config import blocks_of
from vllm_roco.kv_cache.block_cache import BlockCache
from vllm_roco.kv_cache.earlier_turns import EarlierTurns, ExactTurns, LongestTurns
from vllm_roco.kv_cache.prefix_finder import Hit, PrefixFinder
from vllm_roco.kv_cache.prefix_keys import PrefixKeys
from vllm_roco.kv_cache.prefix_places import PrefixPlaces
from vllm_roco.kv_cache.prefix_readers import PrefixReaders
from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes
from vllm_roco.kv_cache.snapshot_publisher import SnapshotPublisher
from vllm_roco.kv_cache.snapshots import SnapshotStore
from vllm_roco.observability.families import PrefixCounts
from vllm_roco.request_plans import SHARE_OF_FIRST_TURNS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
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
        earlier: EarlierTurns | None = None
        if not windows:
            common = store, keys, block_size, plans
            earlier = (
                ExactTurns(*common, turn_end_token_ids)
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
        self._is_exact = is_exact
        self._plans = plans
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
        # the second one to come behind a header begins with blocks, as in stock vLLM
        is_worth = self._is_worth_later_turns(request, places, prefixes)
        if places:
            self._shared.enter(prefixes)
        # with `longest`, turns begin behind what began with blocks, too
        if self._is_exact and (
            is_worth
            or self._longest_earlier(request)
            or self._is_worth_its_next_turn(request, places, prefixes)
        ):
            self.blocks.read_for_next_turn(request)

    def _is_worth_later_turns(
        self, request: Request, places: Sequence[int], prefixes: Sequence[BlockHash]
    ) -> bool:
        """Return whether a first turn is to begin with a snapshot, for later ones.

        Where it has the header of others before it, and nothing else of them: it then
        reads no more than behind blocks, but holds the header for itself alone.

        Arguments as of `_is_worth_its_next_turn`.
        """
        plan = self._plans.of(request.request_id)
        if not plan.is_read_for_later_turns:
            return False
        start = self._start_of_snapshots(places, prefixes)
        num_tokens = request.num_prompt_tokens
        if not start or not plan.pays_in_next_turn(num_tokens, start):
            return False
        further = start + int(SHARE_OF_FIRST_TURNS * (num_tokens - start))
        further = blocks_of(further, self._block_size) * self._block_size
        return (
            not self.blocks.has(request, further)
            and self._earlier is not None
            and self._earlier.first_turns_go_on()
        )

    def _is_worth_its_next_turn(
        self, request: Request, places: Sequence[int], prefixes: Sequence[BlockHash]
    ) -> bool:
        """Return whether a turn is to begin with a snapshot, so that the next one can.

        The next one evicts while it is read, and can begin behind this one if that
        began with no blocks.

        Args:
            request: The turn.
            places: Where a snapshot of its prompt can be.
            prefixes: What stands for the prompt up to there.
        """
        plan = self._plans.of(request.request_id)
        if not plan.evicts_in_next_turn or plan.ends.answers.is_first_turn:
            return False
        start = self._start_of_snapshots(places, prefixes)
        return plan.pays_in_next_turn(request.num_prompt_tokens, start)

    def _start_of_snapshots(
        self, places: Sequence[int], prefixes: Sequence[BlockHash]
    ) -> int:
        """Return where a prompt begins that begins with a snapshot of one of these."""
        return max(
            (
                place
                for place, prefix in zip(places, prefixes, strict=True)
                # there is a snapshot, or the first one that comes leaves one
                if self._shared.part_at(prefix) or self.store.has(prefix)
            ),
            default=0,
        )

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
        if self.blocks.serves(request):
            has_copies = hit is not None and hit.num_shared < len(hit.row)
            self.blocks.begin(request, has_copies=has_copies)
            return
        if self._earlier is not None:
            self._earlier.begin(request, None if hit is None else hit.snapshot)
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
        if self._earlier is not None:
            self._earlier.end(request, row)

    def drop(self, request_id: str, row: Sequence[KVCacheBlock]) -> None:
        """Forget a request that is preempted or done, and lets go of its row."""
        self._readers.drop(request_id)
        if self._earlier is not None:
            self._earlier.drop(request_id)
        self._stop_waiting(request_id)
        self.blocks.drop(request_id, row)
