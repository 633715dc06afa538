# SPDX-License-Identifier: Apache-2.0
"""Lets the next turn of a conversation begin where an earlier answer ended.

What a sequence holds that has evicted while it was written is what the conversation
kept, not what a prompt with that answer in it would keep: see `prefix_hits: longest`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.eviction_schedule import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.prefix_keys import PrefixKeys
    from vllm_roco.kv_cache.snapshots import SnapshotStore
    from vllm_roco.request_plans import RequestPlans


class EarlierTurns:
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
        # of unfinished requests the lengths at which something was kept, in order
        self._lengths: dict[str, list[int]] = {}

    def enter(self, request: Request) -> None:
        """Look once for what has been kept along a new request's prompt."""
        size = self._block_size
        plan = self._plans.of(request.request_id)
        most = (request.num_prompt_tokens - 1) // size
        first = plan.first_eviction // size
        # as `PrefixKeys` has it, for all lengths at little cost
        may_have, key = self._store.may_have, plan.snapshot_key
        lengths = [
            number * size
            for number, found in enumerate(request.block_hashes[:most], start=1)
            if number >= first and may_have(BlockHash(found + key))
        ]
        if lengths:
            self._lengths[request.request_id] = lengths

    def lengths(self, request: Request) -> Sequence[int]:
        """Return where a request may find something, in order; some may be gone."""
        return self._lengths.get(request.request_id, ())

    def longest(self, request: Request) -> int:
        """Return the most tokens that a request can begin with, or 0.

        Each length at which nothing is left costs time once.
        """
        lengths = self._lengths.get(request.request_id)
        while lengths:
            if self._store.find(self._keys.key(request, lengths[-1])) is not None:
                return lengths[-1]
            lengths.pop()
        return 0

    def end(self, request: Request, row: Sequence[KVCacheBlock]) -> None:
        """Keep what a request holds that is done, and forget the request.

        Steps in flight may still write into its blocks, before anybody reads these.

        Args:
            request: A request that has evicted, or not.
            row: Its block table.
        """
        self._lengths.pop(request.request_id, None)
        if not row:
            return
        size = self._block_size
        schedule = self._plans.of(request.request_id).schedule
        computed = request.num_computed_tokens
        length = min(computed, self._keys.most_tokens(request)) // size * size
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
        live = self._keys.live_blocks(request, row, length)
        self._store.keep(self._keys.key(request, length), live)
