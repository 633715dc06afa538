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

from vllm_roco.config import blocks_of
from vllm_roco.kv_cache.admission_forecast import AdmissionForecast
from vllm_roco.kv_cache.held_blocks import HeldBlocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

    from vllm_roco.eviction_schedule import EvictionSchedule


class BudgetedSpec(Protocol):
    """What the manager needs of a group's KV cache spec, see `spec.RocoSpec`."""

    @property
    def schedule(self) -> EvictionSchedule:
        """The eviction arithmetic."""

    @property
    def max_blocks_per_sequence(self) -> int:
        """The most blocks ever held for one sequence."""

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
        schedule: The eviction arithmetic.
        max_blocks_per_sequence: The most blocks ever held for one sequence.
        held: Blocks held per request, kept up to date by allocation and freeing.
        scheduler_ends_chunks: Whether the scheduler has said that it ends steps where
            RoCo needs it; nothing is allocated before.
        num_freed_blocks: Blocks given back by eviction since the start.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: BudgetedSpec, **kwargs: Any) -> None:
        # a resident block may be overwritten after it was hashed, so none is cached
        kwargs["enable_caching"] = False
        # a protocol cannot say that the spec is one of vLLM's as well
        super().__init__(cast("KVCacheSpec", kv_cache_spec), **kwargs)
        self.schedule = kv_cache_spec.schedule
        self.max_blocks_per_sequence = kv_cache_spec.max_blocks_per_sequence
        # vLLM hands the cap only to its own recycling specs
        self.max_admission_blocks_per_request = self.max_blocks_per_sequence
        self.held = HeldBlocks()
        self.scheduler_ends_chunks = False
        self._forecast = AdmissionForecast(self.schedule)
        self._max_steps_in_flight = kv_cache_spec.max_steps_in_flight
        # whom vLLM would let in next, and the tokens that it has to read
        self._asked = ("", 0)
        # of requests that are being read
        self._tokens_to_read: dict[str, int] = {}
        self._refused_id: str | None = None
        self.num_freed_blocks = 0
        self._budget_blocks = self.schedule.budget_blocks
        self._first_eviction = self.schedule.next_eviction(0)
        # processed lengths at which requests that lost blocks lose the next ones
        self._next_evictions: dict[str, int] = {}

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
        (`scheduler_reserve_full_isl`).
        """
        if request_id == self._refused_id:
            self._refused_id = None
            return self.block_pool.num_gpu_blocks + 1
        blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        if apply_admission_cap:
            self._asked = (request_id, num_tokens)
            # the look ahead is for requests that would be let in without it
            if blocks <= self.block_pool.get_num_free_blocks():
                blocks += self.foreseen_blocks()
        return blocks

    def refuse(self, request_id: str) -> None:
        """Let vLLM find no room for a waiting request when it asks next.

        It then leaves that request and all behind it where they are until the next
        step, on every release: what a scheduler's hook can say instead is read as
        "skip this one" by some.
        """
        self._refused_id = request_id

    def foreseen_blocks(self) -> int:
        """Return by how many blocks more than now running requests will hold."""
        return self._forecast.blocks()

    @override
    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate as the base class does, and count.

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
        blocks = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        if blocks:
            asked_id, num_known_tokens = self._asked
            if asked_id == request_id and not self.held.of(request_id):
                self._admit(request_id, num_known_tokens)
            self._count(request_id, len(blocks))
        return blocks

    def _admit(self, request_id: str, num_tokens: int) -> None:
        # decodes that are scheduled before the last step of reading is processed
        ahead = self._max_steps_in_flight - 1
        most = min(
            blocks_of(num_tokens + ahead, self.block_size), self.max_blocks_per_sequence
        )
        self._tokens_to_read[request_id] = num_tokens
        self._forecast.admit(request_id, most)

    def _count(self, request_id: str, change: int) -> None:
        held = self.held.add(request_id, change)
        if held > self.max_blocks_per_sequence:
            raise RuntimeError(
                f"roco: request {request_id} would hold {held} blocks, but vLLM has "
                f"planned with at most {self.max_blocks_per_sequence} for a sequence: "
                "this release of vLLM does not end steps where RoCo asks it to. Run "
                "`python -m vllm_roco.verify`, and use a release that it passes."
            )
        self._forecast.update(
            request_id, held, evicts=request_id in self._next_evictions
        )

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
        if self._tokens_to_read:
            to_read = self._tokens_to_read.get(request_id)
            if to_read is not None and processed_computed_tokens >= to_read:
                self._finish_reading(request_id)
        due = self._next_evictions.get(request_id, self._first_eviction)
        if processed_computed_tokens < due:
            return
        row = self.req_to_blocks.get(request_id)
        if row is None:
            return
        evicted = self.schedule.evicted_blocks(processed_computed_tokens)
        self._next_evictions[request_id] = self.schedule.next_eviction(
            processed_computed_tokens
        )
        null_block = self._null_block
        freed: list[KVCacheBlock] = []
        end = min(self._budget_blocks + evicted, len(row))
        # the gap grows at its end, so the first null from there ends the work
        for index in range(end - 1, self._budget_blocks - 1, -1):
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
        return super().pop_blocks_for_free(request_id)

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
        """Never hit: a prefix that lost blocks cannot be shared."""
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
        """Never hash a block, see `find_longest_cache_hit`."""

    def held_blocks(self, request_id: str) -> int:
        """Return the blocks a request holds, counted in its row.

        Proportional to the row: for traces and tests, not for the scheduler's path.
        """
        row = self.req_to_blocks.get(request_id, ())
        return sum(not block.is_null for block in row)

    def check_integrity(self) -> None:
        """Raise if the books do not agree with the block tables.

        Raises:
            RuntimeError: A block stands in two places or is free, a gap is not where it
                must be, or the running counts differ from the rows.
        """
        for request_id in self.held.requests - self.req_to_blocks.keys():
            raise RuntimeError(
                f"request {request_id} has no row, but {self.held.of(request_id)} "
                "blocks are on the books"
            )
        seen: dict[int, str] = {}
        for request_id, row in self.req_to_blocks.items():
            held = self.held_blocks(request_id)
            if held != self.held.of(request_id):
                raise RuntimeError(
                    f"request {request_id} holds {held} blocks, but "
                    f"{self.held.of(request_id)} are on the books"
                )
            nulls = [index for index, block in enumerate(row) if block.is_null]
            gap = list(range(self._budget_blocks, self._budget_blocks + len(nulls)))
            if nulls != gap:
                raise RuntimeError(
                    f"request {request_id} has null blocks at {nulls}, but eviction "
                    f"leaves a gap at {gap}"
                )
            for block in row:
                if block.is_null:
                    continue
                if block.block_id in seen:
                    raise RuntimeError(
                        f"block {block.block_id} is held by request {request_id} and "
                        f"by request {seen[block.block_id]}"
                    )
                seen[block.block_id] = request_id
                if block.ref_cnt != 1:
                    raise RuntimeError(
                        f"block {block.block_id} of request {request_id} has "
                        f"{block.ref_cnt} references, but blocks are never shared"
                    )
