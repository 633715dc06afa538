# SPDX-License-Identifier: Apache-2.0
"""Lets the next turn of a conversation begin where an earlier answer ended.

With `prefix_hits: exact` where reading the answer keeps what writing it kept:
`ExactTurns`. With `longest` wherever something was evicted: `LongestTurns`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override
from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.eviction_schedule import NEVER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.first_turns import FirstTurns
    from vllm_roco.kv_cache.prefix_keys import PrefixKeys
    from vllm_roco.kv_cache.snapshots import SnapshotStore
    from vllm_roco.request_plans import RequestPlans

MAX_ANSWERS = 64
"""Answers of a prompt, the last ones, behind which something is looked for."""
_MOST_UNREAD = 2
"""Tokens of an answer in a prompt that may not have been read when it ended.

Its end token, if it was not written but is the template's; and the last one written.
"""


class EarlierTurn(NamedTuple):
    """What was kept of a conversation when one of its answers ended.

    Attributes:
        num_tokens: What had been read and written.
        key: Under which it is in the store.
    """

    num_tokens: int
    key: BlockHash


class EarlierTurns(ABC):
    """Where answers ended, and which prompts go on from there.

    Args:
        store: The snapshots, which hold what ended sequences held.
        keys: Under which keys.
        block_size: Tokens per block.
        plans: What holds for each request.
    """

    def __init__(
        self,
        store: SnapshotStore,
        keys: PrefixKeys,
        block_size: int,
        plans: RequestPlans,
    ) -> None:
        self._store = store
        self._keys = keys
        self._block_size = block_size
        self._plans = plans
        # of unfinished requests what was kept along their prompts, in order
        self._turns: dict[str, list[EarlierTurn]] = {}

    def enter(self, request: Request) -> None:
        """Look once for what has been kept along a new request's prompt."""
        turns = [
            turn for turn in self._along(request) if self._store.may_have(turn.key)
        ]
        if turns:
            self._turns[request.request_id] = turns

    @abstractmethod
    def _along(self, request: Request) -> Iterator[EarlierTurn]:
        """Yield what may have been kept along a prompt, in order."""

    def longest(self, request: Request, most: int = NEVER) -> EarlierTurn | None:
        """Return the longest that a request can begin with, None if there is none.

        Each one of which nothing is left costs time once.

        Args:
            request: The request.
            most: A bound on the tokens.
        """
        turns = self._turns.get(request.request_id, [])
        for index in reversed(range(len(turns))):
            if turns[index].num_tokens > most:
                continue
            if self._store.find(turns[index].key) is not None:
                return turns[index]
            del turns[index]
        return None

    @abstractmethod
    def begin(self, request: Request) -> None:
        """Note that a request is let in with a snapshot, or nothing."""

    @abstractmethod
    def drop(self, request_id: str) -> None:
        """Forget that a request runs."""

    def end(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Keep what a request holds that is done, and forget the request.

        Steps in flight may still write into its blocks, before anybody reads these.

        Args:
            request: A request that has evicted, or not.
            row: Its block table.
        """
        self._turns.pop(request.request_id, None)
        if row and request.num_computed_tokens >= request.num_prompt_tokens:
            self._keep_of(request, row)

    @abstractmethod
    def _keep_of(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Keep what a request holds that has read its prompt, if a turn may use it."""

    def _keep(
        self,
        key: BlockHash,
        request: Request,
        row: Sequence[KVCacheBlock],
        length: int,
    ) -> None:
        schedule = self._plans.of(request.request_id).schedule
        # a next turn evicts on behind it
        if schedule.next_eviction(length) < NEVER:
            self._store.keep(key, self._keys.live_blocks(request, row, length))


class ExactTurns(EarlierTurns):
    """Of answers that, once they are read, keep what they kept as they were written.

    Behind prompts that have an earlier answer, or are read for later turns, and end
    where an answer begins or within it: see `answers`. What is kept may end within a
    block. Arguments as in the base class, and more.

    Args:
        turn_end_token_ids: Tokens that end an answer.
        first_turns: Are told what one has left.
    """

    def __init__(
        self,
        store: SnapshotStore,
        keys: PrefixKeys,
        block_size: int,
        plans: RequestPlans,
        turn_end_token_ids: Collection[int],
        first_turns: FirstTurns,
    ) -> None:
        super().__init__(store, keys, block_size, plans)
        self._turn_end_token_ids = frozenset(turn_end_token_ids)
        self._first_turns = first_turns
        # of those that run, who began with nothing that others have asked over
        self._untouched: set[str] = set()

    @override
    def _along(self, request: Request) -> Iterator[EarlierTurn]:
        """Yield what may have been kept where the answers in a prompt ended."""
        plan = self._plans.of(request.request_id)
        if not plan.is_measured:
            # it has this key in common with who evicts, whose rows have gaps
            return
        # another token must be read to go on from; a hash is of a whole block here
        most = request.num_prompt_tokens - 1
        most = min(most, self._keys.most_tokens(request) + self._block_size - 1)
        for end in plan.ends.answers.written_ends[-MAX_ANSWERS:]:
            for length in range(end - _MOST_UNREAD, end + 1):
                if self._block_size <= length <= most:
                    key = self._keys.turn_key(request, length)
                    yield EarlierTurn(length, key)

    @override
    def begin(self, request: Request) -> None:
        self._untouched.add(request.request_id)

    @override
    def drop(self, request_id: str) -> None:
        self._untouched.discard(request_id)

    @override
    def _keep_of(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Keep all that a request holds, if a prompt that has all of it keeps that."""
        length, size = request.num_computed_tokens, self._block_size
        if size <= length // size * size <= self._keys.most_tokens(request) and (
            self._is_as_read(request)
        ):
            key = self._keys.turn_key(request, length)
            self._keep(key, request, row, length)
            if self._plans.of(request.request_id).ends.answers.is_first_turn:
                self._first_turns.keep(key)

    def _is_as_read(self, request: Request) -> bool:
        """Return whether a request holds what a prompt would keep that has all of it.

        Only where a next turn is likely to come and to keep the same.
        """
        if (
            request.request_id not in self._untouched
            or not self._plans.of(request.request_id).keeps_for_next_turn
            # of a step in flight nobody knows what it read
            or request.num_computed_tokens > request.num_tokens
        ):
            return False
        # an answer in a prompt ends with the first of these
        written = request.all_token_ids[request.num_prompt_tokens : -1]
        return self._turn_end_token_ids.isdisjoint(written)


class LongestTurns(EarlierTurns):
    """Of all answers behind which something was evicted, up to their last whole block.

    A next turn need not keep what it would keep if it read all.
    """

    @override
    def _along(self, request: Request) -> Iterator[EarlierTurn]:
        """Yield what may have been kept in whole blocks, where something is evicted."""
        size = self._block_size
        plan = self._plans.of(request.request_id)
        most = (request.num_prompt_tokens - 1) // size
        first = plan.first_eviction // size
        lengths = [number * size for number in range(first, most + 1)]
        yield from map(EarlierTurn, lengths, self._keys.keys(request, lengths))

    @override
    def begin(self, request: Request) -> None:
        """Note nothing: it does not matter what a request began with."""

    @override
    def drop(self, request_id: str) -> None:
        """Forget nothing: see `begin`."""

    @override
    def _keep_of(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Keep what a request holds in whole blocks, if it has evicted."""
        computed, size = request.num_computed_tokens, self._block_size
        schedule = self._plans.of(request.request_id).schedule
        evicted = schedule.evicted_blocks(computed)
        length = min(computed, self._keys.most_tokens(request)) // size * size
        # who has evicted nothing leaves blocks
        if evicted and schedule.evicted_blocks(length) == evicted:
            self._keep(self._keys.key(request, length), request, row, length)
