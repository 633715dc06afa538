# SPDX-License-Identifier: Apache-2.0
"""Block tables that may begin with the blocks of others, see `prefix_cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_roco.eviction_schedule import NEVER
from vllm_roco.kv_cache.budgeted_manager import BudgetedManager, BudgetedSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.prefix_cache import PrefixCache
    from vllm_roco.kv_cache.prefix_finder import Hit


class RocoManager(BudgetedManager):
    """Lets requests begin behind prefixes; arguments as in the base class.

    Attributes:
        prefix_cache: Prefixes that requests may begin with, None for no hits; see
            `share_prefixes`.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: BudgetedSpec, **kwargs: Any) -> None:
        # nothing is hashed before somebody looks after what is
        kwargs["enable_caching"] = False
        super().__init__(kv_cache_spec, **kwargs)
        self.prefix_cache: PrefixCache | None = None
        # requests let in with a hit whose blocks are not yet replaced by copies, and
        # how many they may hold themselves
        self._adopted: dict[str, int] = {}

    def share_prefixes(self, prefix_cache: PrefixCache) -> None:
        """Let requests begin behind prefixes, and vLLM ask for blocks to be hashed."""
        self.prefix_cache = prefix_cache
        self.enable_caching = True

    @override
    def _more_for_hit(
        self,
        request_id: str,
        hit: Sequence[KVCacheBlock],
        num_tokens: int,
        *,
        holds_all: bool,
    ) -> int:
        """Return the blocks of a hit, for the copies, less what a request shares.

        What it shares it need not take, nor blocks for the gap of its row.
        """
        blocks = self._get_num_evictable_blocks(hit) - self._num_shared(request_id)
        if not holds_all:
            blocks -= self.plans.of(request_id).schedule.evicted_blocks(num_tokens)
        return int(blocks)

    @override
    def _blocks_in_demand(self, request_id: str, num_taken: int) -> int:
        if self.prefix_cache is None or not self.held.requests:
            return 0
        hit = self.prefix_cache.offered_to(request_id)
        return self.prefix_cache.store.num_blocks_in_demand(
            None if hit is None else hit.snapshot, num_taken
        )

    def has_room_for(self, request: Request, hit: Hit) -> bool:
        """Return whether a request fits into free memory together with its hit.

        Args:
            request: The request.
            hit: What it would begin with.
        """
        assert self.prefix_cache is not None
        plan = self.plans.of(request.request_id)
        blocks = plan.max_blocks_at(request.num_tokens)
        blocks += self._get_num_evictable_blocks(hit.row) - hit.num_shared
        for manager, row in zip(self.prefix_cache.windows, hit.windows, strict=True):
            blocks += manager.get_num_blocks_to_allocate(
                request.request_id,
                request.num_tokens,
                row,
                hit.num_tokens,
                hit.num_tokens,
                request.num_tokens,
                apply_admission_cap=True,
            )
        return bool(blocks <= self.block_pool.get_num_free_blocks())

    def _num_shared(self, request_id: str) -> int:
        """Return how many blocks of its hit a request may hold itself."""
        assert self.prefix_cache is not None
        hit = self.prefix_cache.offered_to(request_id)
        assert hit is not None
        return hit.num_shared

    @override
    def begin_step(self) -> None:
        """Begin as the base class does; what is hashed from now on a step will fill."""
        super().begin_step()
        if self.prefix_cache is not None:
            self.prefix_cache.blocks.begin_step()

    @override
    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Hold the blocks of a hit until they are copied, see `allocate_new_blocks`."""
        row = self.req_to_blocks[request_id]
        assert not row and not num_external_computed_tokens
        # of a block that is copied, vLLM drops this reference when the copy has run
        self.block_pool.touch(_without_null(new_computed_blocks))
        row.extend(new_computed_blocks)
        num_shared = 0
        if row:
            num_shared = self._adopted[request_id] = self._num_shared(request_id)
        # the others have no hash yet
        self.num_cached_block[request_id] = num_shared

    @override
    def _grow(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Return the blocks that a row gets to have as many tokens.

        Blocks of a hit that are not shared are another's: the request gets copies in
        their places.
        """
        copies: list[KVCacheBlock] = []
        if request_id in self._adopted:
            num_shared = self._adopted.pop(request_id)
            copies = self._replace_by_copies(request_id, num_shared)
            self._take(request_id, num_shared + len(copies))
        blocks = super()._grow(request_id, num_tokens, num_tokens_main_model)
        if (
            # of one that has evicted nothing, the first
            num_tokens >= self._next_evictions.get(request_id, NEVER)
            and self.prefix_cache is not None
            and self.prefix_cache.blocks.is_owner(request_id)
        ):
            self.prefix_cache.blocks.withdraw(request_id)
        return copies + blocks

    @override
    def _admit(self, request_id: str) -> None:
        """Note that a request gets its first blocks, and with what it begins."""
        if self.prefix_cache is not None:
            self.prefix_cache.admit(request_id)
        super()._admit(request_id)

    def _replace_by_copies(
        self, request_id: str, num_shared: int
    ) -> list[KVCacheBlock]:
        row = self.req_to_blocks[request_id]
        places = [
            place for place in range(num_shared, len(row)) if not row[place].is_null
        ]
        copies = self.block_pool.get_new_blocks(len(places))
        # the last of the others' blocks is free first, as it is in vLLM: without the
        # first one nobody finds the others
        for place, copy in reversed([*zip(places, copies, strict=True)]):
            self._apply_cow(request_id, place, row[place], copy)
        return copies

    @override
    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Return the copies to be made before the step, those of snapshots last.

        vLLM asks once in a step, when all requests are chosen: snapshots take what is
        left, and nothing that is read in this step is written in it.
        """
        copies = super().take_pending_cow_copies()
        if self.prefix_cache is not None:
            copies += self.prefix_cache.publish()
        return copies

    @override
    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Give up a row, and forget who reads what it was to hold."""
        row = super().pop_blocks_for_free(request_id)
        if self.prefix_cache is not None:
            self.prefix_cache.drop(request_id, row)
        return row

    @classmethod
    @override
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find nothing: what hits is up to `prefix_cache`, which knows who asks."""
        return tuple([] for _ in kv_cache_group_ids), 0

    @override
    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int] = (),
    ) -> None:
        """Hash the full blocks of a request that has evicted nothing."""
        cache, request_id = self.prefix_cache, request.request_id
        if cache is None or not cache.blocks.is_owner(request_id):
            return
        num_hashed = self.num_cached_block.get(request_id, 0)
        if num_tokens // self.block_size <= num_hashed:
            return
        group_id = self.kv_cache_group_id
        # vLLM's method names no other, and all but the hashes is the same
        self.kv_cache_group_id = cache.blocks.group_of(request)
        try:
            super().cache_blocks(
                request,
                num_tokens,
                retention_interval,
                replay_boundaries=replay_boundaries,
            )
        finally:
            self.kv_cache_group_id = group_id
        row, end = self.req_to_blocks[request_id], self.num_cached_block[request_id]
        cache.blocks.add(request_id, row[num_hashed:end])


def _without_null(blocks: Iterable[KVCacheBlock]) -> list[KVCacheBlock]:
    return [block for block in blocks if not block.is_null]
