# SPDX-License-Identifier: Apache-2.0
"""Takes blocks from vLLM's block pool, and gives evicted ones back.

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
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec


class BudgetedSpec(Protocol):
    """What the manager needs of a group's KV cache spec, see `spec.RocoSpec`."""

    @property
    def plan(self) -> ResolvedPlan:
        """What holds for a request of which nothing else is known."""

    @property
    def max_steps_in_flight(self) -> int:
        """Steps that may be scheduled but not yet processed."""


class BudgetedManager(FullAttentionManager):
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
        num_freed_blocks: Blocks given back by eviction since the start.
        quiet_until: Lengths up to which requests that hold blocks take and lose none,
            which is all that most steps ask; shorter while nobody has worked it out.
    """

    def __init__(self, kv_cache_spec: BudgetedSpec, **kwargs: Any) -> None:
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
        self._refused_id: str | None = None
        self.num_freed_blocks = 0
        # processed lengths at which requests that hold blocks lose the next ones
        self._next_evictions: dict[str, int] = {}
        self.quiet_until: dict[str, int] = {}

    def serve(self, plans: RequestPlans) -> None:
        """Go by the plans of a scheduler that ends steps where RoCo needs it."""
        self.plans = plans
        self.scheduler_ends_chunks = True

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
        if new_computed_blocks:
            blocks += self._more_for_hit(
                request_id,
                new_computed_blocks,
                num_local_computed_tokens,
                holds_all=apply_admission_cap,
            )
        if apply_admission_cap:
            self._asked = (request_id, num_tokens)
            free = self.block_pool.get_num_free_blocks()
            # either is looked for where a request would be let in without it
            if blocks <= free:
                blocks += self.foreseen_blocks()
            if blocks <= free:
                blocks += self._blocks_in_demand(request_id, blocks)
        return blocks

    def _more_for_hit(
        self,
        request_id: str,
        hit: Sequence[KVCacheBlock],
        num_tokens: int,
        *,
        holds_all: bool,
    ) -> int:
        """Return the blocks that a request needs more because it begins with others'.

        None here, where nobody is offered a hit.

        Args:
            request_id: The request.
            hit: What it begins with, null in the gap.
            num_tokens: Of the hit.
            holds_all: Whether all of it is asked about, which the most that it holds
                bounds; else its row up to a step's end.
        """
        return 0

    def _blocks_in_demand(self, request_id: str, num_taken: int) -> int:
        """Return the free blocks on which a request is not let in if others run.

        Those of its own hit are among the blocks that it needs. None here, where
        nothing is kept for others.

        Args:
            request_id: The request.
            num_taken: Free blocks that it and those that run will take.
        """
        return 0

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
        if num_tokens <= self.quiet_until.get(request_id, 0):
            return []
        blocks = self._grow(request_id, num_tokens, num_tokens_main_model)
        self._note_quiet(request_id)
        return blocks

    def _grow(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Return the blocks that a row gets to have as many tokens."""
        blocks = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        if blocks:
            self._take(request_id, len(blocks))
        return blocks

    def _take(self, request_id: str, num_blocks: int) -> None:
        """Note that a row has more blocks than before."""
        if not self.held.of(request_id):
            self._admit(request_id)
        self._count(request_id, num_blocks)

    def _note_quiet(self, request_id: str) -> None:
        self.quiet_until[request_id] = min(
            len(self.req_to_blocks[request_id]) * self.block_size,
            self._next_evictions.get(request_id, NEVER) - 1,
            self._tokens_to_read.get(request_id, NEVER) - 1,
        )

    def _admit(self, request_id: str) -> None:
        """Note that a request gets its first blocks."""
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
        return super().pop_blocks_for_free(request_id)

    def held_blocks(self, request_id: str) -> int:
        """Return the blocks a request holds, counted in its row.

        Proportional to the row: for traces and tests, not for the scheduler's path.
        """
        row = self.req_to_blocks.get(request_id, ())
        return sum(not block.is_null for block in row)
