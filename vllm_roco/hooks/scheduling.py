# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers and requests."""

from __future__ import annotations

from vllm_roco.hook_check import Hook

_SPEC = "vllm.v1.kv_cache_interface"
_SCHEDULER = "vllm.v1.core.sched.scheduler"

SCHEDULING = (
    Hook(
        module=_SCHEDULER,
        name="Scheduler",
        why="reach the block managers and the running requests",
        members=("current_step", "kv_cache_manager", "requests", "running"),
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.__init__",
        why="read the options",
        overrides=(
            "vllm_config, kv_cache_config, structured_output_manager, block_size, "
            "hash_block_size=, mm_registry=, include_finished_set=, log_stats="
        ),
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler._reserve_prefill_lookahead",
        why="end a prompt chunk at a multiple of the option `chunk`",
        overrides="request, num_computed_tokens, num_new_tokens",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler._get_local_prefix_cache_hit",
        why="look prefixes up in snapshots",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler._handle_blocked_waiting_request",
        why="let a request wait while another one reads its prefix",
        overrides="request",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.add_request",
        why="refuse requests whose length goes back, and see which prefixes are shared",
        overrides="request",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.finish_requests",
        why="forget refused requests",
        calls=("request_ids", "finished_status"),
        overrides="request_ids, finished_status",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.schedule",
        why="publish and trace what requests hold",
        overrides="throttle_prefills=",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.update_from_output",
        why="answer refused requests",
        overrides="scheduler_output, model_runner_output",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.shutdown",
        why="remove the published numbers",
        overrides="",
    ),
    Hook(
        module="vllm.v1.core.sched.async_scheduler",
        name="AsyncScheduler",
        why="cut prompts into chunks under asynchronous scheduling",
        members=("_reserve_prefill_lookahead",),
    ),
    Hook(
        module="vllm.v1.core.kv_cache_manager",
        name="KVCacheManager",
        why="reach the block managers, and hand out a hit",
        members=(
            "coordinator",
            "create_kv_cache_blocks",
            "empty_kv_cache_blocks",
            "enable_caching",
        ),
    ),
    Hook(
        module="vllm.v1.core.kv_cache_manager",
        name="KVCacheBlocks",
        why="hand out a hit",
    ),
    Hook(
        module="vllm.v1.core.kv_cache_coordinator",
        name="KVCacheCoordinator",
        why="reach the block managers",
        members=("single_type_managers",),
    ),
    Hook(
        module=_SPEC,
        name="KVCacheConfig",
        why="hand it to vLLM's scheduler",
    ),
    Hook(
        module="vllm.v1.core.sched.output",
        name="SchedulerOutput",
        why="trace the requests of a step",
        members=("num_scheduled_tokens",),
    ),
    Hook(
        module="vllm.v1.outputs",
        name="ModelRunnerOutput",
        why="hand it to vLLM's scheduler",
    ),
    Hook(
        module="vllm.v1.request",
        name="Request",
        why="tell a decode from a prompt, and refuse what cannot be served",
        members=(
            "block_hashes",
            "client_index",
            "get_finished_reason",
            "has_encoder_inputs",
            "num_computed_tokens",
            "num_output_placeholders",
            "num_prompt_tokens",
            "num_tokens",
            "request_id",
            "resumable",
            "sampling_params",
            "skip_reading_prefix_cache",
        ),
    ),
    Hook(
        module="vllm.v1.request",
        name="RequestStatus",
        why="end a refused request",
        members=("FINISHED_ERROR",),
    ),
    Hook(
        module="vllm.v1.engine",
        name="EngineCoreOutput",
        why="answer a refused request",
        members=("finish_reason", "new_token_ids", "request_id"),
    ),
    Hook(
        module="vllm.v1.engine",
        name="EngineCoreOutputs",
        why="answer a refused request",
        members=("outputs",),
    ),
)
