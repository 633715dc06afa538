# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler that knows of each request how it evicts, and tells the workers."""

from __future__ import annotations

import copy
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override
from vllm.logger import init_logger

from vllm_roco.adapter_scheduler import AdapterScheduler
from vllm_roco.answer_start import answer_start_token_ids
from vllm_roco.chunking import ChunkEnds, least_chunk
from vllm_roco.config import UNBOUNDED_MODES
from vllm_roco.eviction_row import ROW_KEY
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.kv_cache.other_caches import OtherCaches
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_plans import LaterTurn, RequestPlans, ResolvedPlan
from vllm_roco.request_size import RequestSizes, RequestTooLargeError
from vllm_roco.turn_ends import turn_end_token_ids
from vllm_roco.validation import request_planner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.request import Request

    from vllm_roco.eviction_row import EvictionRow


logger = init_logger(f"vllm.{__name__}")


class PlanningScheduler(AdapterScheduler):
    """Plans each request before it is taken; arguments as in the base class.

    Attributes:
        roco_config: The options.
        roco_managers: The block managers of the RoCo groups.
        request_plans: What holds for each request.
        other_caches: What sequences hold in layers that are not RoCo's.
        max_steps_in_flight: Steps that may be scheduled but not yet processed.
        turn_end_token_ids: Tokens behind which chunks of prompts may end.
        answer_start_token_ids: Tokens behind which an answer begins that is read as it
            was written; none with `prefix_hits` `longest` and beside layers of other
            kinds. Whether prefixes are cached changes nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.roco_managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, RocoManager)
        ]
        if not self.roco_managers:
            raise ValueError(
                f"roco: scheduler_cls = {type(self).__qualname__} serves layers of the "
                "ROCO attention backend, but no layer uses it. Add "
                "--attention-backend roco, or leave --scheduler-cls out."
            )
        self._check_block_sizes()
        manager = self.roco_managers[0]
        # front ends are told this, and plan with it, too. vLLM has the least of all
        # layers' sizes there, and may have enlarged the blocks of those that evict
        self.vllm_config.cache_config.block_size = manager.block_size
        self._planner = request_planner(self.vllm_config, manager.block_size)
        self.roco_config = self._planner.config
        # nobody has checked the options with these
        self.roco_config.check_block_size(manager.block_size)
        model_config = self.vllm_config.model_config
        self.turn_end_token_ids = turn_end_token_ids(self.roco_config, model_config)
        self.max_steps_in_flight = manager.max_steps_in_flight
        self._sizes = RequestSizes(
            manager.block_size, self.max_steps_in_flight, self.max_model_len
        )
        self._default_plan = self._planner.plan(None, 1)
        self.other_caches = OtherCaches(
            (
                manager
                for manager in self.kv_cache_manager.coordinator.single_type_managers
                if manager not in self.roco_managers
            ),
            self.max_steps_in_flight,
            self.scheduler_config.max_num_batched_tokens,
            self.max_model_len,
        )
        self.answer_start_token_ids: tuple[int, ...] = ()
        if self.roco_config.prefix_hits == "exact" and not self.other_caches:
            self.answer_start_token_ids = answer_start_token_ids(
                self.roco_config, model_config, self.turn_end_token_ids
            )
        if self.roco_config.answer_start_token_ids and not self.answer_start_token_ids:
            logger.warning_once(
                "roco: answer_start_token_ids = %s does nothing: answers are read like "
                "everything else with prefix_hits 'longest', beside layers of other "
                "kinds, and where no token ends a turn.",
                str(list(self.roco_config.answer_start_token_ids)),
            )
        self._check_pool()
        self.request_plans = RequestPlans(
            ResolvedPlan.of(
                self._default_plan,
                manager.block_size,
                self.max_steps_in_flight,
                self.max_model_len,
            )
        )
        for manager in self.roco_managers:
            manager.serve(self.request_plans)

    @override
    def _trouble_with(self, request: Request) -> str | None:
        """Plan a request, or return why it cannot be served."""
        trouble = super()._trouble_with(request)
        if trouble is not None:
            return trouble
        params = request.sampling_params
        extra_args = None if params is None else params.extra_args
        try:
            plan = self._planner.plan(extra_args, request.num_prompt_tokens)
            resolved = self._sizes.resolve(
                plan, request.num_prompt_tokens, request.max_tokens, self._most_blocks
            )
        except (RequestOptionError, RequestTooLargeError) as error:
            return str(error)
        resolved = self._by_turns(resolved, request, extra_args)
        if (
            plan != self._default_plan
            or resolved.ends != self.request_plans.default.ends
        ):
            self.request_plans.enter(request.request_id, resolved)
        if plan.row != self._default_plan.row:
            _tell_workers(request, plan.row)
        return None

    def _by_turns(
        self,
        plan: ResolvedPlan,
        request: Request,
        extra_args: Mapping[str, Any] | None,
    ) -> ResolvedPlan:
        """Let a prompt be read by its turns, and note what is likely to follow."""
        ends = self._chunk_ends(request, plan.chunk)
        num_tokens = request.num_prompt_tokens
        later_turn = None
        longer = ends.answers.later_prompt(num_tokens, request.max_tokens)
        if longer is not None:
            # of one that is too long for the model, the turn before it may come
            longer = min(longer, self.max_model_len - 1)
            # there is none if its prompt would be too long for the options
            with suppress(RequestOptionError):
                later_turn = LaterTurn(longer, self._planner.plan(extra_args, longer))
        return plan.read_in(ends, num_tokens, later_turn)

    def _chunk_ends(self, request: Request, chunk: int) -> ChunkEnds:
        """Return where the chunks of a request's prompt end.

        Args:
            request: The request.
            chunk: Most tokens of a chunk.
        """
        tokens = request.prompt_token_ids
        if not self.turn_end_token_ids or tokens is None:
            return ChunkEnds(chunk)
        # half the time that numpy takes for a list, and most of what is done here
        packed = struct.pack(f"{len(tokens)}q", *tokens)
        ids = np.frombuffer(packed, np.int64)
        answer_start: Sequence[int] = self.answer_start_token_ids
        if (is_token := request.prompt_is_token_ids) is not None:
            # what stands in the places of embeddings is not in a prefix's hash, nor is
            # what they are in the key of an answer's end
            ids = np.where(is_token, ids, -1)
            answer_start = ()
        if request.has_encoder_inputs:
            # which nobody begins behind
            answer_start = ()
        block_size = self._planner.block_size
        return ChunkEnds.of(
            ids,
            self.turn_end_token_ids,
            chunk,
            least_chunk(self.roco_config.chunk, block_size),
            block_size,
            answer_start,
        )

    @override
    def _free_blocks(self, request: Request) -> None:
        """Free as vLLM does, and forget the request's plan."""
        super()._free_blocks(request)
        self.request_plans.drop(request.request_id)

    def most_tokens_held(self, request: Request) -> int:
        """Return the most KV tokens that a request may hold, in whole blocks."""
        plan = self.request_plans.of(request.request_id)
        length = self._sizes.length(request.num_prompt_tokens, request.max_tokens)
        return plan.max_blocks_at(length) * plan.schedule.block_size

    @property
    def _most_blocks(self) -> int:
        """The most blocks that one sequence can hold in each group."""
        pool = self.kv_cache_manager.block_pool
        # what a sequence holds in layers of other kinds, whatever its chunk
        in_flight = self.scheduler_config.max_num_batched_tokens
        others = self.other_caches.max_blocks(self.max_steps_in_flight * in_flight)
        # all groups take from one pool, and one block is the null block
        return int(pool.num_gpu_blocks - 1 - others) // len(self.roco_managers)

    def _check_block_sizes(self) -> None:
        """Raise unless all blocks that are evicted hold as many tokens.

        vLLM gives layers with less in a page larger blocks, where there are layers with
        a window, too.
        """
        sizes = sorted({manager.block_size for manager in self.roco_managers})
        if len(sizes) > 1:
            raise NotImplementedError(
                "roco: a model whose layers of full attention have KV cache blocks of "
                f"several sizes ({sizes} tokens), because some have more KV heads or "
                "larger ones, is not supported. Use another --attention-backend."
            )

    def _check_pool(self) -> None:
        """Raise if a request that evicts could hold more than there is."""
        config = self.roco_config
        if config.mode in UNBOUNDED_MODES and config.max_budget == config.budget:
            # each request is looked at by itself
            return
        size = self._planner.block_size
        most = EvictionSchedule(size, config.max_budget, config.stride).max_blocks(
            self.max_steps_in_flight * config.chunk, self.max_model_len
        )
        if most > self._most_blocks:
            raise ValueError(
                f"roco: max_budget = {config.max_budget} lets a request hold {most} "
                f"blocks of {size} tokens, but the KV cache has {self._most_blocks}. "
                "Lower max_budget, or raise --gpu-memory-utilization or "
                "--kv-cache-memory-bytes."
            )


def _tell_workers(request: Request, row: EvictionRow) -> None:
    """Put a row where workers find it, in sampling parameters of the request's own.

    Several requests may share parameters, also with the caller of an engine.
    """
    params = request.sampling_params
    if params is None:
        return
    own = request.sampling_params = copy.copy(params)
    own.extra_args = {**(params.extra_args or {}), ROW_KEY: list(row)}
