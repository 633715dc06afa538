# SPDX-License-Identifier: Apache-2.0
"""Lets the next turn of a conversation begin where an earlier answer ended.

With `prefix_hits: exact` where reading the answer keeps what writing it kept, see
`answers`: in prompts with earlier answers, which end as the model's template begins
one. With `longest` wherever something was evicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.eviction_schedule import NEVER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

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


class EarlierTurns:
    """Where answers ended, and which prompts go on from there.

    Args:
        store: The snapshots, which hold what ended sequences held.
        keys: Under which keys.
        block_size: Tokens per block.
        plans: What holds for each request.
        is_exact: Whether a next turn keeps what it would keep if it read all.
        turn_end_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        store: SnapshotStore,
        keys: PrefixKeys,
        block_size: int,
        plans: RequestPlans,
        *,
        is_exact: bool,
        turn_end_token_ids: Collection[int] = (),
    ) -> None:
        self._store = store
        self._keys = keys
        self._block_size = block_size
        self._plans = plans
        self._is_exact = is_exact
        self._turn_end_token_ids = frozenset(turn_end_token_ids)
        # of unfinished requests what was kept along their prompts, in order
        self._turns: dict[str, list[EarlierTurn]] = {}
        # of those that run, who began with nothing that others have asked over
        self._untouched: set[str] = set()

    def enter(self, request: Request) -> None:
        """Look once for what has been kept along a new request's prompt."""
        found = self._as_read(request) if self._is_exact else self._in_blocks(request)
        turns = [turn for turn in found if self._store.may_have(turn.key)]
        if turns:
            self._turns[request.request_id] = turns

    def _as_read(self, request: Request) -> Iterator[EarlierTurn]:
        """Yield what may have been kept where the answers in a prompt ended."""
        # another token must be read to go on from
        most = request.num_prompt_tokens - 1
        most = min(most, self._keys.most_tokens(request) + self._block_size - 1)
        answers = self._plans.of(request.request_id).ends.answers
        for end in answers.written[-MAX_ANSWERS:]:
            for length in range(end - _MOST_UNREAD, end + 1):
                if self._block_size <= length <= most:
                    key = self._keys.turn_key(request, length)
                    yield EarlierTurn(length, key)

    def _in_blocks(self, request: Request) -> Iterator[EarlierTurn]:
        """Yield what may have been kept in whole blocks, where something is evicted."""
        size = self._block_size
        plan = self._plans.of(request.request_id)
        most = (request.num_prompt_tokens - 1) // size
        first = plan.first_eviction // size
        # as `PrefixKeys` has it, for all lengths at little cost
        for number, found in enumerate(request.block_hashes[:most], start=1):
            if number >= first:
                yield EarlierTurn(number * size, BlockHash(found + plan.snapshot_key))

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

    def begin(self, request: Request) -> None:
        """Note that a request is let in, with nothing but what reading would keep."""
        self._untouched.add(request.request_id)

    def drop(self, request_id: str) -> None:
        """Forget that a request runs."""
        self._untouched.discard(request_id)

    def end(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Keep what a request holds that is done, and forget the request.

        Steps in flight may still write into its blocks, before anybody reads these.

        Args:
            request: A request that has evicted, or not.
            row: Its block table.
        """
        self._turns.pop(request.request_id, None)
        if not row:
            return
        schedule = self._plans.of(request.request_id).schedule
        computed = request.num_computed_tokens
        length = self._kept_tokens(request)
        if (
            not length
            or computed < request.num_prompt_tokens
            or schedule.evicted_blocks(length) != schedule.evicted_blocks(computed)
            # a next turn evicts on behind it
            or schedule.next_eviction(length) == NEVER
        ):
            return
        keys = self._keys
        key = keys.turn_key if self._is_exact else keys.key
        live = keys.live_blocks(request, row, length)
        self._store.keep(key(request, length), live)

    def _kept_tokens(self, request: Request) -> int:
        """Return of how many tokens a request leaves what it holds, or 0."""
        size, computed = self._block_size, request.num_computed_tokens
        most = self._keys.most_tokens(request)
        if self._is_exact:
            is_kept = computed // size * size <= most and self._is_as_read(request)
            return computed if computed >= size and is_kept else 0
        # who has evicted nothing leaves blocks
        schedule = self._plans.of(request.request_id).schedule
        evicted = schedule.evicted_blocks(computed)
        return min(computed, most) // size * size if evicted else 0

    def _is_as_read(self, request: Request) -> bool:
        """Return whether a request holds what a prompt would keep that has all of it.

        Only of conversations that have gone on once: most prompts are asked about once.
        """
        answers = self._plans.of(request.request_id).ends.answers
        if (
            request.request_id not in self._untouched
            or not answers.is_open
            or not answers.written
            # of a step in flight nobody knows what it read
            or request.num_computed_tokens > request.num_tokens
        ):
            return False
        # an answer in a prompt ends with the first of these
        written = request.all_token_ids[request.num_prompt_tokens : -1]
        return self._turn_end_token_ids.isdisjoint(written)
