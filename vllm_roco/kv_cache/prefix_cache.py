# SPDX-License-Identifier: Apache-2.0
"""Lets requests begin behind a prefix that others have read, or wait for one.

A prompt that evicts while it is read begins with a snapshot: at the ends of its chunks,
or where an earlier answer ended (see `earlier_turns`), what a sequence keeps is a
function of its tokens alone. One that does not may also begin with blocks, see
`block_cache`.

That is `prefix_hits: exact`. With `longest` all prompts may begin with blocks, and
behind more answers.

Where other layers have a sliding window, a snapshot holds their blocks as well, and all
prompts begin with snapshots: of one that evicts nothing it is a function of its tokens,
too, but blocks that are found one by one would have to be there for all layers.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vllm_roco.chunking import ChunkEnds, least_chunk
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.kv_cache.block_cache import BlockCache, Found
from vllm_roco.kv_cache.earlier_turns import EarlierTurns
from vllm_roco.kv_cache.prefix_keys import PrefixKeys
from vllm_roco.kv_cache.prefix_readers import PrefixReaders
from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes
from vllm_roco.kv_cache.snapshots import SnapshotStore
from vllm_roco.observability.families import PrefixCounts

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.window_manager import WindowManager
    from vllm_roco.request_plans import RequestPlans


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


class _Prefix(NamedTuple):
    """A prefix that a request waits for: its tokens, and their hash."""

    length: int
    hash: BlockHash


class PrefixCache:
    """The prefixes of one block manager.

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
        rows: Mapping[str, Sequence[KVCacheBlock]],
        windows: Sequence[WindowManager] = (),
        *,
        is_exact: bool = True,
        turn_end_token_ids: Collection[int] = (),
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
        self._is_exact = is_exact
        self._block_size = block_size
        self._plans = plans
        self._rows = rows
        self._keys = PrefixKeys(
            block_size,
            plans,
            block_pool.null_block,
            # beside windows, --prefix-match-unit may make it less than a block
            hash_size=block_pool.hash_block_size,
            is_of_tokens=self.blocks.is_used,
        )
        self._earlier: EarlierTurns | None = None
        if not windows:
            self._earlier = EarlierTurns(
                self.store,
                self._keys,
                block_size,
                plans,
                is_exact=is_exact,
                turn_end_token_ids=turn_end_token_ids,
            )
        self._shared = SharedPrefixes()
        self._readers = PrefixReaders()
        # of snapshots that the step being scheduled makes, and of what; who begins
        # with one in the same step copies that
        self._copies: list[tuple[KVCacheBlock, KVCacheBlock]] = []
        self._sources: dict[BlockHash, Sequence[KVCacheBlock]] = {}
        # about whom vLLM has asked last, in what state, and what that came to: a bound
        # on the snapshots of the prompt as long as the state is the same
        self._looked: tuple[Request, int, int] | None = None
        self._longest = 0
        # what blocks there are for whom vLLM asks about next, from `must_wait`
        self._found: tuple[Request, Found] | None = None
        # whom vLLM is about to let in, and what it was offered
        self._offered: tuple[Request, Hit | None] | None = None
        # for what waiting requests wait; None for blocks of the step being chosen
        self._waits: dict[str, _Prefix | None] = {}
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
        if self._earlier is not None:
            self._earlier.enter(request)
        places = self._places(request, 0)
        prefixes = [*self._keys.keys(request, places)]
        if places:
            self._shared.enter(prefixes)
        # with `longest`, turns begin behind what began with blocks, too
        if self._is_exact and (
            self._longest_earlier(request)
            or self._is_worth_its_next_turn(request, places, prefixes)
        ):
            self.blocks.read_for_next_turn(request)

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
        if not plan.evicts_in_next_turn:
            return False
        start = max(
            (
                place
                for place, prefix in zip(places, prefixes, strict=True)
                # there is a snapshot, or the first one that comes leaves one
                if self._shared.part_at(prefix) or self.store.has(prefix)
            ),
            default=0,
        )
        return plan.pays_in_next_turn(request.num_prompt_tokens, start)

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
        self._offered = self._looked = None
        self._waits.pop(request_id, None)
        self._asked.pop(request_id, None)
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
            self._earlier.begin(request)
        places = self._places(request, start)
        if places:
            prefixes = [*self._keys.keys(request, places)]
            self._readers.begin(request, places, prefixes)

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
        self._waits.pop(request_id, None)
        self._asked.pop(request_id, None)
        self.blocks.drop(request_id, row)

    def must_wait(self, request: Request) -> bool:
        """Return whether another request is reading more of this one's prompt.

        Not one that has read what both share, and no more: of that a snapshot is made
        at once, if there is room for it. Constant time for one that waits already, as
        long as what it waits for is not there, whoever leaves it.
        """
        self._found = None
        if request.skip_reading_prefix_cache:
            return False
        awaited = self._waits.get(request.request_id)
        if awaited is not None and self._is_yet_to_come(request, awaited):
            return True
        start = 0
        if self.blocks.can_begin_with_blocks(request) and (
            self.blocks.writes or self._readers
        ):
            if self.blocks.is_known_to_grow(request):
                return self._wait(request, None)
            found = self.blocks.find(request)
            if found.grows:
                return self._wait(request, None)
            self._found = request, found
            start = len(found.blocks) * self._block_size
        awaited = self._awaited(request, start)
        if awaited is None:
            return False
        self._readers.want(awaited.hash)
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
        length = self._ends(request).within(self._most_of_a_hit(request))
        if not length or request.skip_reading_prefix_cache:
            return 0
        earlier = self._longest_earlier(request)
        if earlier > length:
            return earlier
        if self.store.find(self._keys.key(request, length)) is not None:
            return length
        if earlier:
            return earlier
        blocks = self.blocks
        if blocks.can_begin_with_blocks(request) and blocks.has(request, length):
            return length
        return 0

    def longest_snapshot(self, request: Request) -> int:
        """Return how many tokens of a request's prompt a snapshot is there of, or 0."""
        earlier = self._longest_earlier(request)
        most = min(request.num_prompt_tokens, self._keys.most_tokens(request))
        for length, prefix in self._from_longest(request, most):
            if length <= earlier:
                break
            if self.store.has(prefix):
                return length
        return earlier

    def _is_yet_to_come(self, request: Request, awaited: _Prefix) -> bool:
        """Return whether what a request waits for is on its way, and not there."""
        length, prefix = awaited
        reader = self._readers.reader_of(prefix, length)
        return not (
            reader is None
            or reader.num_computed_tokens == length
            or self.store.may_have(prefix)
            or (
                self.blocks.can_begin_with_blocks(request)
                and self.blocks.has(request, length)
            )
        )

    def _wait(self, request: Request, awaited: _Prefix | None) -> bool:
        self.num_waits += request.request_id not in self._waits
        self._waits[request.request_id] = awaited
        return True

    def _awaited(self, request: Request, start: int) -> _Prefix | None:
        """Return the prefix longer than `start` that another request is reading."""
        if not self._is_being_read(request):
            return None
        store, readers = self.store, self._readers
        start = max(start, self._longest_earlier(request))
        most = self._most_of_a_hit(request)
        awaited = None
        others_length = 0
        for length, prefix in self._from_longest(request, most):
            if length <= max(start, others_length):
                break
            # a request that can begin here is no further from the end than the other
            if store.find(prefix) is not None:
                return None
            if awaited is not None:
                continue
            if (other := readers.reader_of(prefix, length)) is not None:
                others_length = other.num_computed_tokens
                if others_length == length and self._publish(
                    other, length, prefix, is_wanted=True
                ):
                    return None
                awaited = _Prefix(length, prefix)
        return awaited

    def _is_being_read(self, request: Request) -> bool:
        """Return whether others read a prefix of a request's prompt, of any length.

        Without a look at each of its places: most prompts have nothing in common.
        """
        most = self._most_of_a_hit(request)
        ahead = [place for place in self._readers.next_places() if place[0] <= most]
        keys = self._keys.keys(request, (length for length, _ in ahead))
        return any(key == prefix for key, (_, prefix) in zip(keys, ahead, strict=True))

    def first_stop(self, request: Request, start: int, end: int) -> int:
        """Return where a step must end so that a snapshot can be made, at most `end`.

        Args:
            request: The request.
            start: Its length before the step.
            end: Its length after the step, as far as everything else is concerned.
        """
        if self.blocks.serves(request):
            return end
        for length in self._places(request, start, end - 1):
            if self._is_due(request, length, self._keys.key(request, length)):
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
        # their copies become free now, behind the blocks of snapshots that were hit
        for prefix in self._sources:
            self.store.renew(prefix)
        for request, length, prefix in self._readers.arrivals():
            if self._is_due(request, length, prefix):
                is_wanted = self._readers.is_wanted(prefix)
                self._publish(request, length, prefix, is_wanted=is_wanted)
        copies, self._copies = self._copies, []
        self._sources.clear()
        self._found = None
        in_demand = partial(self.store.num_blocks_in_demand, None)
        return copies + self.blocks.end_step(self._rows, in_demand)

    def _publish(
        self, request: Request, length: int, prefix: BlockHash, *, is_wanted: bool
    ) -> bool:
        """Make a snapshot of what a request holds, and return whether one was made."""
        request_id = request.request_id
        live = self._keys.live_blocks(request, self._rows[request_id], length)
        windows = [w.blocks_at(request_id, length) for w in self.windows]
        copies = self.store.publish(prefix, live, windows, is_wanted=is_wanted)
        if not copies:
            return False
        self._copies += copies
        self._sources[prefix] = live
        return True

    def _longest_earlier(self, request: Request) -> int:
        """Return how much of a conversation is there where an answer ended, or 0."""
        if self._earlier is None:
            return 0
        earlier = self._earlier.longest(request)
        return 0 if earlier is None else earlier.num_tokens

    def _find_snapshot(self, request: Request, max_tokens: int | None) -> Hit | None:
        most = NEVER if max_tokens is None else max_tokens
        earlier = None
        if self._earlier is not None:
            earlier = self._earlier.longest(request, most)
        most = min(most, self._most_of_a_hit(request))
        # vLLM asks in each step about the first one for which there is no room
        looked = request, most, self.store.num_published
        if looked == self._looked:
            most = self._longest
        hit = None
        for length, prefix in self._from_longest(request, most):
            if earlier is not None and length <= earlier.num_tokens:
                break
            if (hit := self._hit(request, length, prefix)) is not None:
                break
        if hit is None and earlier is not None:
            hit = self._hit(request, *earlier)
        self._looked, self._longest = looked, hit.num_tokens if hit else 0
        return hit

    def _hit(self, request: Request, length: int, prefix: BlockHash) -> Hit | None:
        """Return a hit of the snapshot of a prefix, None if there is none."""
        snapshot = self.store.find(prefix)
        if snapshot is None:
            return None
        blocks = self._sources.get(prefix, snapshot.blocks)
        row = self._keys.row_of(request, blocks, length)
        windows = [
            manager.row_at(in_window, length)
            for manager, in_window in zip(self.windows, snapshot.windows, strict=True)
        ]
        return Hit(length, row, snapshot=prefix, windows=windows)

    def _is_due(self, request: Request, length: int, prefix: BlockHash) -> bool:
        """Return whether a snapshot at a place of a prompt is worth its blocks."""
        # the last place for a prompt that goes on, and for the same one once more:
        # its last token must be read to go on from
        return (
            self._ends(request).following(length) >= request.num_prompt_tokens
            or self._shared.part_at(prefix)
            or self._readers.is_wanted(prefix)
        )

    def _places(self, request: Request, start: int, most: int = NEVER) -> Sequence[int]:
        """Return the lengths of a prompt behind `start` where it can be cut."""
        most = min(most, request.num_prompt_tokens, self._keys.most_tokens(request))
        return self._ends(request).between(start, most)

    def _most_of_a_hit(self, request: Request) -> int:
        # generated tokens were read one by one, the first time
        return min(
            request.num_prompt_tokens,
            request.num_tokens - 1,
            self._keys.most_tokens(request),
        )

    def _from_longest(
        self, request: Request, most: int
    ) -> Iterator[tuple[int, BlockHash]]:
        """Yield the places of a prompt up to `most`, and the keys of its prefixes."""
        places = self._ends(request).between(0, most)[::-1]
        return zip(places, self._keys.keys(request, places), strict=True)

    def _ends(self, request: Request) -> ChunkEnds:
        """Return the places of a prompt: ends of its chunks, not too many of them.

        Each look-up goes through them. However small its own chunk, a prompt has no
        more than one can have whose chunk is the server's.
        """
        plan = self._plans.of(request.request_id)
        least = least_chunk(self._plans.default.chunk, self._block_size)
        if plan.chunk >= least:
            return plan.ends
        # no turn ends such a small one
        return ChunkEnds(plan.chunk * -(-least // plan.chunk))
