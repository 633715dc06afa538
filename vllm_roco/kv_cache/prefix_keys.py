# SPDX-License-Identifier: Apache-2.0
"""What stands for a prefix, and where its blocks lie in a row and in a snapshot."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, cast

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.config import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.request_plans import RequestPlans

_UNMEASURED = b"unmeasured"
_TURN = b"turn"


class PrefixKeys:
    """Keys of requests' prefixes, which say all of which depends what is kept there.

    Args:
        block_size: Tokens per block.
        plans: What holds for each request.
        null_block: vLLM's block in places of a row that hold none.
        hash_size: Tokens from one of a request's hashes to the next; a block has whole
            ones.
        is_of_tokens: Whether before a first eviction the key is of the tokens alone,
            statistics or none.
    """

    def __init__(
        self,
        block_size: int,
        plans: RequestPlans,
        null_block: KVCacheBlock,
        *,
        hash_size: int,
        is_of_tokens: bool,
    ) -> None:
        self._block_size = block_size
        self._plans = plans
        self._null_block = null_block
        self._hash_size = hash_size
        self._is_of_tokens = is_of_tokens

    def most_tokens(self, request: Request) -> int:
        """Return the longest length of a request that has a key."""
        return len(request.block_hashes) * self._hash_size

    def key(self, request: Request, length: int) -> BlockHash:
        """Return the key of a request's first `length` tokens, whole blocks."""
        return next(self.keys(request, (length,)))

    def keys(self, request: Request, lengths: Iterable[int]) -> Iterator[BlockHash]:
        """Yield the keys of several prefixes, tokens of whole blocks each.

        A key is made when it is asked for, at little more than the cost of its bytes:
        whoever looks for one of many prefixes asks for no more than come before it.
        """
        plan = self._plans.of(request.request_id)
        first, key, size = plan.first_eviction, plan.snapshot_key, self._hash_size
        # while nothing is evicted, only the tokens matter
        early_key = b"" if plan.is_measured or self._is_of_tokens else _UNMEASURED
        hashes = request.block_hashes
        keys = (
            hashes[length // size - 1] + (early_key if length < first else key)
            for length in lengths
        )
        # a call of the type would cost as much again
        return cast("Iterator[BlockHash]", keys)

    def turn_key(self, request: Request, length: int) -> BlockHash:
        """Return the key of what an answer leaves that ends at a length.

        Args:
            request: The request.
            length: At least a block, not whole ones perhaps.
        """
        plan = self._plans.of(request.request_id)
        start = length // self._block_size * self._block_size
        found = request.block_hashes[start // self._hash_size - 1]
        tail = array("q", request.all_token_ids[start:length]).tobytes()
        return BlockHash(found + plan.snapshot_key + _TURN + tail)

    def live_blocks(
        self, request: Request, row: Sequence[KVCacheBlock], length: int
    ) -> Sequence[KVCacheBlock]:
        """Return the blocks that a request attends to at a length.

        Args:
            request: The request.
            row: Its block table.
            length: Tokens, of which the last block may be full in part.
        """
        schedule = self._plans.of(request.request_id).schedule
        resident = schedule.budget_blocks
        end = blocks_of(length, self._block_size)
        incoming = resident + schedule.evicted_blocks(length)
        return [*row[: min(resident, end)], *row[incoming:end]]

    def row_of(
        self, request: Request, live_blocks: Sequence[KVCacheBlock], length: int
    ) -> list[KVCacheBlock]:
        """Return the row in which these are the live blocks at a length."""
        schedule = self._plans.of(request.request_id).schedule
        resident = schedule.budget_blocks
        gap = [self._null_block] * schedule.evicted_blocks(length)
        return [*live_blocks[:resident], *gap, *live_blocks[resident:]]
