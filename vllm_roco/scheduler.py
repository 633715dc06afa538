# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, with prompt chunks that end where RoCo needs them to.

`vllm_roco.scheduler_choice` puts the right one in place; a scheduler of
your own takes part by deriving from `RocoSchedulerMixin` as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from vllm_roco.chunking import next_step_ends
from vllm_roco.kv_cache.page_padding import padding_trouble
from vllm_roco.observability.observer import Observer
from vllm_roco.prefix_scheduler import PrefixScheduler
from vllm_roco.start_up_line import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from vllm_roco.request_plans import ResolvedPlan

logger = init_logger(f"vllm.{__name__}")

MAX_PASSED_OVER = 64
"""Requests that a step passes over until it is their turn to be read.

vLLM takes each out of its queue and puts it back.
"""

# looked up once: an enum's members are looked up slowly
_RUNNING = RequestStatus.RUNNING
_READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class RocoSchedulerMixin(PrefixScheduler):
    """What RoCo adds to a vLLM scheduler; put it before the scheduler class.

    Attributes:
        ends_roco_chunks: Tells the start-up check that a class has this mixin.
    """

    ends_roco_chunks = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # a running prompt waits for tokens that others left too few of
        self._is_held_back = False
        # of the step that is being scheduled
        self._num_prompt_tokens = 0
        self._passed_over: list[Request] = []
        self._observer = Observer(
            self.vllm_config, self.roco_config.budget, self.roco_config.trace
        )
        logger.info_once("%s", describe(self))
        if (trouble := padding_trouble(self.kv_cache_config)) is not None:
            logger.warning_once("%s", trouble)

    @override
    def add_request(self, request: Request) -> None:
        """Take a request, or refuse it, and show how much it may come to hold."""
        super().add_request(request)
        if request.request_id in self.requests:
            self._observer.count_request(self.most_tokens_held(request))

    @override
    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a prefill step where it may end, or wait: for room, or for others.

        Prompts that are read in chunks take turns in the order in which they run. Once
        the step's prompts fill the GPU, another chunk would only make it longer for
        those ahead. Who is read to the end in it may always join.

        Both scheduling loops of vLLM ask here how many of the `num_new_tokens` that
        they could schedule they may. On 0 the loop of running requests goes on to the
        next one. What the loop of waiting requests does differs between releases, and
        one that goes on would let later requests overtake and walk the whole queue in
        each step. So a waiting request is refused memory instead, which ends that loop
        on all of them.
        """
        # what is asked of every decode comes first, and is little
        is_running = request.status == _RUNNING
        if is_running:
            if not request.is_prefill_chunk:
                return num_new_tokens
        elif self._is_held_back:
            return self._refuse_memory(request, num_new_tokens)
        known = request.num_tokens + request.num_output_placeholders
        if num_computed_tokens + 1 >= known:
            # a decode is never held back, and has no prefill to look ahead in
            return num_new_tokens
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        plan = self.request_plans.of(request.request_id)
        least, most = _step_ends(request, num_computed_tokens, plan)
        if self._is_filled and most < request.num_tokens:
            if is_running:
                return 0
            return self._refuse_memory(request, num_new_tokens)
        most = self._end_of_step(request, num_computed_tokens, most)
        allowed = min(num_new_tokens, most - num_computed_tokens)
        # an input item may end a chunk early for good; waiting would be for ever
        if request.has_encoder_inputs or allowed >= least - num_computed_tokens:
            allowed = max(0, allowed)
            self._num_prompt_tokens += allowed
            self._note_end_of_step(request, num_computed_tokens + allowed)
            return allowed
        if is_running:
            # others leave room for the chunk of the server's default, no larger one
            self._is_held_back |= plan.chunk > self.request_plans.default.chunk
            return 0
        return self._refuse_memory(request, num_new_tokens)

    @property
    def _is_filled(self) -> bool:
        """Whether the step has all the prompt tokens that it needs."""
        return self._num_prompt_tokens >= self.roco_config.prefill_tokens

    @override
    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Return whether a request may be let in: not before its turn to be read.

        Those behind it that are read to their end in this step go ahead.
        """
        if (
            self._is_filled
            # others wait for more than their turn, and vLLM looks after them
            and request.status in _READY
            and len(self._passed_over) < MAX_PASSED_OVER
            and self._is_read_in_turns(request)
        ):
            # or else who reads its prefix may go past without leaving a snapshot
            self._ask_for_prefix(request)
            self._passed_over.append(request)
            return False
        return super()._handle_blocked_waiting_request(request)

    def _is_read_in_turns(self, request: Request) -> bool:
        """Return whether a waiting request has more to read than a step's share."""
        start = request.num_computed_tokens
        if not start and self.prefix_cache is not None:
            start = self.prefix_cache.last_length(request)
        plan = self.request_plans.of(request.request_id)
        _, most = _step_ends(request, start, plan)
        return most < request.num_tokens

    def _refuse_memory(self, request: Request, num_new_tokens: int) -> int:
        # without tokens, vLLM never comes to ask for blocks
        if num_new_tokens:
            for manager in self.roco_managers:
                manager.refuse(request.request_id)
        return num_new_tokens

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, and show what is held."""
        self._is_held_back = False
        self._num_prompt_tokens = 0
        for manager in self.roco_managers:
            manager.begin_step()
        output = super().schedule(*args, **kwargs)
        if self._passed_over:
            # they wait for capacity, not for something that is yet to come
            self.deferred_waiting.difference_update(self._passed_over)
            self.prefill_capacity_bound = True
            self._passed_over.clear()
        self._publish()
        self._publish_prefixes()
        self._observer.record(self.current_step, self._traced(output))
        return output

    @override
    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset as vLLM does, and show what is left."""
        done = super().reset_prefix_cache(*args, **kwargs)
        if done and self.prefix_cache is not None:
            self.prefix_cache.reset()
        self._publish()
        self._publish_prefixes()
        return done

    @override
    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Update as vLLM does, and show what is held."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._publish()
        return outputs

    @override
    def shutdown(self) -> None:
        """Remove the metrics and close the trace."""
        self._observer.close()
        super().shutdown()

    def _publish(self) -> None:
        most = max(manager.held.largest for manager in self.roco_managers)
        self._observer.publish(
            sum(manager.num_freed_blocks for manager in self.roco_managers),
            most * self.roco_managers[0].block_size,
        )

    def _publish_prefixes(self) -> None:
        if self.prefix_cache is not None:
            self._observer.publish_prefixes(self.prefix_cache.counts())

    def _traced(
        self, output: SchedulerOutput
    ) -> Iterator[tuple[str, int, int, int | None]]:
        begun = _begun_in(output)
        for request_id in output.num_scheduled_tokens:
            yield (
                request_id,
                self.requests[request_id].num_computed_tokens,
                max(manager.held_blocks(request_id) for manager in self.roco_managers),
                begun.get(request_id),
            )


class RocoScheduler(RocoSchedulerMixin):
    """vLLM's scheduler with RoCo's chunks."""


class RocoAsyncScheduler(RocoSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with RoCo's chunks."""


def _step_ends(
    request: Request, num_computed_tokens: int, plan: ResolvedPlan
) -> tuple[int, int]:
    return next_step_ends(
        num_computed_tokens,
        request.num_prompt_tokens,
        request.num_tokens,
        plan.ends,
        plan.schedule,
    )


def _begun_in(output: SchedulerOutput) -> dict[str, int]:
    """Return the requests that a step lets in, and the lengths that they begin with."""
    cached = output.scheduled_cached_reqs
    begun = {
        request_id: length
        for request_id, length in zip(
            cached.req_ids, cached.num_computed_tokens, strict=True
        )
        if request_id in cached.resumed_req_ids
    }
    for request in output.scheduled_new_reqs:
        begun[request.req_id] = request.num_computed_tokens
    return begun
