# SPDX-License-Identifier: Apache-2.0
"""Finds what requests may begin with, and what others are reading of their prompts.

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

from typing import TYPE_CHECKING, NamedTuple

from vllm_roco.eviction_schedule import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.block_cache import BlockCache, Found
    from vllm_roco.kv_cache.earlier_turns import EarlierTurns
    from vllm_roco.kv_cache.prefix_keys import PrefixKeys
    from vllm_roco.kv_cache.prefix_places import PrefixPlaces
    from vllm_roco.kv_cache.prefix_readers import PrefixReaders
    from vllm_roco.kv_cache.snapshot_publisher import SnapshotPublisher
    from vllm_roco.kv_cache.snapshots import SnapshotStore
    from vllm_roco.kv_cache.window_manager import WindowManager


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


class PrefixFinder:
    """Looks for the prefixes of requests that wait.

    Args:
        store: The snapshots.
        blocks: The blocks of sequences that have evicted nothing.
        earlier: What answers have left, None for nothing.
        keys: Under which keys snapshots are.
        places: At which lengths of prompts.
        readers: Who is reading which prefixes.
        publisher: Makes one at once that a request would wait for.
        windows: Managers of the groups of layers with a window, with the same blocks.
        block_size: Tokens per block.

    Attributes:
        store: Likewise, with their counters.
        blocks: Likewise, with theirs.
        windows: Likewise.
        num_waits: Requests that have waited for a prefix that another one was reading.
    """

    def __init__(
        self,
        *,
        store: SnapshotStore,
        blocks: BlockCache,
        earlier: EarlierTurns | None,
        keys: PrefixKeys,
        places: PrefixPlaces,
        readers: PrefixReaders,
        publisher: SnapshotPublisher,
        windows: Sequence[WindowManager],
        block_size: int,
    ) -> None:
        self.store = store
        self.blocks = blocks
        self.windows = windows
        self.num_waits = 0
        self._earlier = earlier
        self._keys = keys
        self._places = places
        self._readers = readers
        self._publisher = publisher
        self._block_size = block_size
        # about whom vLLM has asked last, in what state, and what that came to: a bound
        # on the snapshots of the prompt as long as the state is the same
        self._looked: tuple[Request, int, int] | None = None
        self._longest = 0
        # what blocks there are for whom vLLM asks about next, from `must_wait`
        self._found: tuple[Request, Found] | None = None
        # for what waiting requests wait; None for blocks of the step being chosen
        self._waits: dict[str, _Prefix | None] = {}
        # of waiting requests, the readers' changes that they have seen
        self._asked: dict[str, int] = {}

    def _find(self, request: Request, max_tokens: int | None) -> Hit | None:
        """Return what a request may begin with, None for nothing.

        Args:
            request: A request that is about to be let in.
            max_tokens: A bound on the length of the prefix, of vLLM's own.
        """
        hit = self._find_snapshot(request, max_tokens)
        if self.blocks.can_begin_with_blocks(request):
            found = self._blocks_for(request, max_tokens)
            num_tokens = len(found.blocks) * self._block_size
            if num_tokens > (hit.num_tokens if hit else 0):
                hit = Hit(num_tokens, found.blocks, found.num_shared)
        return hit

    def _find_snapshot(self, request: Request, max_tokens: int | None) -> Hit | None:
        most = NEVER if max_tokens is None else max_tokens
        earlier = None
        if self._earlier is not None:
            earlier = self._earlier.longest(request, most)
        most = min(most, self._places.most_of_a_hit(request))
        # vLLM asks in each step about the first one for which there is no room
        looked = request, most, self.store.num_published
        if looked == self._looked:
            most = self._longest
        hit = None
        for length, prefix in self._places.from_longest(request, most):
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
        blocks = self._publisher.sources.get(prefix, snapshot.blocks)
        row = self._keys.row_of(request, blocks, length)
        windows = [
            manager.row_at(in_window, length)
            for manager, in_window in zip(self.windows, snapshot.windows, strict=True)
        ]
        return Hit(length, row, snapshot=prefix, windows=windows)

    def _blocks_for(self, request: Request, max_tokens: int | None) -> Found:
        known, self._found = self._found, None
        if max_tokens is None and known is not None and known[0] is request:
            return known[1]
        return self.blocks.find(request, max_tokens)

    def _longest_earlier(self, request: Request) -> int:
        """Return how much of a conversation is there where an answer ended, or 0."""
        if self._earlier is None:
            return 0
        earlier = self._earlier.longest(request)
        return 0 if earlier is None else earlier.num_tokens

    def last_length(self, request: Request) -> int:
        """Return a length at which a request can begin, 0 if none of the last ones.

        Constant time: shorter prefixes are not looked for.
        """
        length = self._places.ends(request).within(self._places.most_of_a_hit(request))
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
        for length, prefix in self._places.from_longest(request, most):
            if length <= earlier:
                break
            if self.store.has(prefix):
                return length
        return earlier

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

    def _stop_waiting(self, request_id: str) -> None:
        """Forget what a request waits for that is let in, or gone."""
        self._waits.pop(request_id, None)
        self._asked.pop(request_id, None)

    def _wait(self, request: Request, awaited: _Prefix | None) -> bool:
        self.num_waits += request.request_id not in self._waits
        self._waits[request.request_id] = awaited
        return True

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

    def _awaited(self, request: Request, start: int) -> _Prefix | None:
        """Return the prefix longer than `start` that another request is reading."""
        if not self._is_being_read(request):
            return None
        store, readers = self.store, self._readers
        start = max(start, self._longest_earlier(request))
        most = self._places.most_of_a_hit(request)
        awaited = None
        others_length = 0
        for length, prefix in self._places.from_longest(request, most):
            if length <= max(start, others_length):
                break
            # a request that can begin here is no further from the end than the other
            if store.find(prefix) is not None:
                return None
            if awaited is not None:
                continue
            if (other := readers.reader_of(prefix, length)) is not None:
                others_length = other.num_computed_tokens
                if others_length == length and self._publisher.publish(
                    other, length, prefix, is_wanted=True
                ):
                    return None
                awaited = _Prefix(length, prefix)
        return awaited

    def _is_being_read(self, request: Request) -> bool:
        """Return whether others read a prefix of a request's prompt, of any length.

        Without a look at each of its places: most prompts have nothing in common.
        """
        most = self._places.most_of_a_hit(request)
        ahead = [place for place in self._readers.next_places() if place[0] <= most]
        keys = self._keys.keys(request, (length for length, _ in ahead))
        return any(key == prefix for key, (_, prefix) in zip(keys, ahead, strict=True))
