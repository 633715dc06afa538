# SPDX-License-Identifier: Apache-2.0
"""Gives evicted blocks back to vLLM's block pool.

Runs in the engine core, on the scheduler's path: `remove_skipped_blocks` is called for
every request in every step, so it does constant work when nothing is due and touches
only the blocks that go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from typing_extensions import override
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_roco.eviction_schedule import NEVER
from vllm_roco.kv_cache.admission_forecast import AdmissionForecast
from vllm_roco.kv_cache.held_blocks import HeldBlocks
from vllm_roco.request_plans import RequestPlans, ResolvedPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.prefix_cache import Hit, PrefixCache


class BudgetedSpec(Protocol):
    """What the manager needs of a group's KV cache spec, see `spec.RocoSpec`."""

    @property
    def plan(self) -> ResolvedPlan:
        """What holds for a request of which nothing else is known."""

    @property
    def max_steps_in_flight(self) -> int:
        """Steps that may be scheduled but not yet processed."""


class RocoManager(FullAttentionManager):
    """Block tables with a gap: `row[B : B+E]` has been freed and holds null blocks.

    ::

        row index   0 ........ B-1 | B ......... B+E-1 | B+E ..... last
                    resident       | freed (null)      | incoming blocks

    The contract: a block of the gap is freed once the step that evicted it has been
    processed (`num_in_flight_tokens` no longer covers it). A step that is still in
    flight started at a later length, so its live table starts behind the gap.

    Attributes:
        plans: What holds for each request.
        max_steps_in_flight: Steps that may be scheduled but not yet processed.
        held: Blocks held per request, kept up to date by allocation and freeing.
        scheduler_ends_chunks: Whether the scheduler has said that it ends steps where
            RoCo needs it, see `serve`; nothing is allocated before.
        prefix_cache: Prefixes that requests may begin with, None for no hits; see
            `share_prefixes`.
        num_freed_blocks: Blocks given back by eviction since the start.
        quiet_until: Lengths up to which requests that hold blocks take and lose none,
            which is all that most steps ask; shorter while nobody has worked it out.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: BudgetedSpec, **kwargs: Any) -> None:
        # nothing is hashed before somebody looks after what is
        kwargs["enable_caching"] = False
        # a protocol cannot say that the spec is one of vLLM's as well
        super().__init__(cast("KVCacheSpec", kv_cache_spec), **kwargs)
        self.plans = RequestPlans(kv_cache_spec.plan)
        self.max_steps_in_flight = kv_cache_spec.max_steps_in_flight
        self.held = HeldBlocks()
        self.scheduler_ends_chunks = False
        self._forecast = AdmissionForecast()
        # whom vLLM would let in next, and its known tokens
        self._asked = ("", 0)
        # of requests that are being read
        self._tokens_to_read: dict[str, int] = {}
        self.prefix_cache: PrefixCache | None = None
        # requests let in with a hit whose blocks are not yet replaced by copies, and
        # how many they may hold themselves
        self._adopted: dict[str, int] = {}
        self._refused_id: str | None = None
        self.num_freed_blocks = 0
        # processed lengths at which requests that hold blocks lose the next ones
        self._next_evictions: dict[str, int] = {}
        self.quiet_until: dict[str, int] = {}

    def serve(self, plans: RequestPlans) -> None:
        """Go by the plans of a scheduler that ends steps where RoCo needs it."""
        self.plans = plans
        self.scheduler_ends_chunks = True

    def share_prefixes(self, prefix_cache: PrefixCache) -> None:
        """Let requests begin behind prefixes, and vLLM ask for blocks to be hashed."""
        self.prefix_cache = prefix_cache
        self.enable_caching = True

    @property
    @override
    def has_positionally_stable_blocks(self) -> bool:
        """Resident blocks are overwritten by tokens of other positions."""
        return False

    @override
    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Return the blocks that a request needs, and on admission what others need.

        vLLM asks with `apply_admission_cap` only whether all of a waiting request fits
        (`scheduler_reserve_full_isl`). A request that begins with a hit needs what it
        will hold but does not share, and for the copies the blocks of the hit as well.
        """
        # a running request asks in each step
        if self._refused_id is not None and request_id == self._refused_id:
            self._refused_id = None
            return self.block_pool.num_gpu_blocks + 1
        if num_tokens <= self.quiet_until.get(request_id, 0) and (
            not apply_admission_cap
        ):
            return 0
        if apply_admission_cap:
            plan = self.plans.of(request_id)
            self.max_admission_blocks_per_request = plan.max_blocks_at(num_tokens)
        blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            (),
            0,
            0,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        of_hit = 0
        if new_computed_blocks:
            of_hit = self._get_num_evictable_blocks(new_computed_blocks)
            of_hit -= self._num_shared(request_id)
            if not apply_admission_cap:
                schedule = self.plans.of(request_id).schedule
                blocks -= schedule.evicted_blocks(num_local_computed_tokens)
        if apply_admission_cap:
            self._asked = (request_id, num_tokens)
            # the look ahead is for requests that would be let in without it
            if blocks + of_hit <= self.block_pool.get_num_free_blocks():
                blocks += self.foreseen_blocks() + self._blocks_in_demand(request_id)
        return blocks + of_hit

    def _blocks_in_demand(self, request_id: str) -> int:
        """Return the free blocks on which a request is not let in if others run.

        Those of its own hit are among the blocks that it needs.
        """
        if self.prefix_cache is None or not self.held.requests:
            return 0
        hit = self.prefix_cache.offered_to(request_id)
        return self.prefix_cache.store.num_blocks_in_demand(
            None if hit is None else hit.snapshot
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

    def refuse(self, request_id: str) -> None:
        """Let vLLM find no room for a waiting request when it asks next.

        It then leaves that request and all behind it where they are until the next
        step, on every release: what a scheduler's hook can say instead is read as
        "skip this one" by some.
        """
        self._refused_id = request_id

    def begin_step(self) -> None:
        """Refuse nobody whom vLLM has not asked about in the last step, after all."""
        self._refused_id = None

    def foreseen_blocks(self) -> int:
        """Return by how many blocks more than now running requests will hold."""
        return self._forecast.blocks()

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
    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate as the base class does, and count.

        Blocks of a hit that are not shared are another's: the request gets copies in
        their places.

        Raises:
            RuntimeError: The scheduler does not end steps where RoCo needs it, so that
                the request would hold more than vLLM has planned with.
        """
        if not self.scheduler_ends_chunks:
            raise RuntimeError(
                "roco: the scheduler that runs is not RoCo's, and would let a sequence "
                "hold more than its bound. Leave --scheduler-cls out, or derive your "
                "class from vllm_roco.scheduler.RocoSchedulerMixin."
            )
        if num_tokens <= self.quiet_until.get(request_id, 0):
            return []
        copies: list[KVCacheBlock] = []
        num_shared = 0
        if request_id in self._adopted:
            num_shared = self._adopted.pop(request_id)
            copies = self._replace_by_copies(request_id, num_shared)
        blocks = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        if copies:
            blocks = copies + blocks
        if blocks:
            if not self.held.of(request_id):
                self._admit(request_id)
            self._count(request_id, len(blocks) + num_shared)
        if (
            # of one that has evicted nothing, the first
            num_tokens >= self._next_evictions.get(request_id, NEVER)
            and self.prefix_cache is not None
            and self.prefix_cache.blocks.is_owner(request_id)
        ):
            self.prefix_cache.blocks.withdraw(request_id)
        self._note_quiet(request_id)
        return blocks

    def _note_quiet(self, request_id: str) -> None:
        self.quiet_until[request_id] = min(
            len(self.req_to_blocks[request_id]) * self.block_size,
            self._next_evictions.get(request_id, NEVER) - 1,
            self._tokens_to_read.get(request_id, NEVER) - 1,
        )

    def _admit(self, request_id: str) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.admit(request_id)
        plan = self.plans.of(request_id)
        self._next_evictions[request_id] = plan.first_eviction
        asked_id, num_tokens = self._asked
        if asked_id != request_id:
            return
        # decodes that are scheduled before the last step of reading is processed
        ahead = self.max_steps_in_flight - 1
        most = plan.max_blocks_at(num_tokens + ahead)
        self._tokens_to_read[request_id] = num_tokens
        self._forecast.admit(request_id, most)

    def _count(self, request_id: str, change: int) -> None:
        held = self.held.add(request_id, change)
        most = self.plans.of(request_id).max_blocks
        if held > most:
            raise RuntimeError(
                f"roco: request {request_id} would hold {held} blocks, but was planned "
                f"with at most {most}: this release of vLLM does not end steps where "
                "RoCo asks it to. Run `python -m vllm_roco.verify`, and use a release "
                "that it passes."
            )
        self._forecast.update(request_id, held)

    def _replace_by_copies(
        self, request_id: str, num_shared: int
    ) -> list[KVCacheBlock]:
        row = self.req_to_blocks[request_id]
        places = [
            place for place in range(num_shared, len(row)) if not row[place].is_null
        ]
        copies = self.block_pool.get_new_blocks(len(places))
        for place, copy in zip(places, copies, strict=True):
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
    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the blocks that processed steps have evicted.

        Args:
            request_id: The request; unknown ones are ignored.
            processed_computed_tokens: Tokens computed by steps whose output the
                scheduler has handled.
            num_prompt_tokens: Not needed: eviction depends on the length alone.
        """
        if processed_computed_tokens <= self.quiet_until.get(request_id, NEVER):
            return
        to_read = self._tokens_to_read.get(request_id, NEVER)
        if processed_computed_tokens >= to_read:
            self._finish_reading(request_id)
        if processed_computed_tokens >= self._next_evictions.get(request_id, NEVER):
            self._free_evicted(request_id, processed_computed_tokens)
        self._note_quiet(request_id)

    def _free_evicted(self, request_id: str, processed_computed_tokens: int) -> None:
        row = self.req_to_blocks[request_id]
        schedule = self.plans.of(request_id).schedule
        evicted = schedule.evicted_blocks(processed_computed_tokens)
        due = schedule.next_eviction(processed_computed_tokens)
        self._next_evictions[request_id] = due
        self._forecast.evict(request_id, schedule if due < NEVER else None)
        null_block = self._null_block
        freed: list[KVCacheBlock] = []
        resident = schedule.budget_blocks
        end = min(resident + evicted, len(row))
        # the gap grows at its end, so the first null from there ends the work
        for index in range(end - 1, resident - 1, -1):
            block = row[index]
            if block is null_block:
                break
            freed.append(block)
            row[index] = null_block
        if freed:
            self.block_pool.free_blocks(freed)
            self.num_freed_blocks += len(freed)
        self._count(request_id, -len(freed))

    def _finish_reading(self, request_id: str) -> None:
        del self._tokens_to_read[request_id]
        self._forecast.finish_reading(request_id)
        self._count(request_id, 0)

    @override
    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Give up the whole row of a finished, aborted or preempted request."""
        self.held.drop(request_id)
        self._forecast.drop(request_id)
        self._tokens_to_read.pop(request_id, None)
        self._next_evictions.pop(request_id, None)
        self.quiet_until.pop(request_id, None)
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

    def held_blocks(self, request_id: str) -> int:
        """Return the blocks a request holds, counted in its row.

        Proportional to the row: for traces and tests, not for the scheduler's path.
        """
        row = self.req_to_blocks.get(request_id, ())
        return sum(not block.is_null for block in row)


def _without_null(blocks: Iterable[KVCacheBlock]) -> list[KVCacheBlock]:
    return [block for block in blocks if not block.is_null]
