# SPDX-License-Identifier: Apache-2.0
"""The line that the engine logs at its start: what is in force, and what fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_roco.request_plans import most_blocks_by_default

if TYPE_CHECKING:
    from vllm_roco.prefix_scheduler import PrefixScheduler


def describe(scheduler: PrefixScheduler) -> str:
    """Return the line of a scheduler that is about to serve."""
    config, plan = scheduler.roco_config, scheduler.request_plans.default
    size = plan.schedule.block_size
    policy = config.policy
    if policy == "roco":
        policy += f" ({config.shield} shield, ratio {config.shield_ratio:g})"
    limits = ""
    if config.mode != "both":
        limits += f", mode {config.mode}"
    if config.max_budget != config.budget:
        limits += f", max_budget {config.max_budget}"
    if config.allow_full:
        limits += ", allow_full"
    caching = scheduler.describe_prefix_caching()
    return (
        f"RoCo: policy {policy}, budget {config.budget} tokens per sequence, stride "
        f"{config.stride}, chunk {config.chunk}, block size {size}{limits}. A sequence "
        f"{_bounds(scheduler)}.{_room(scheduler)}{_ranks(scheduler)} Prefix caching: "
        f"{caching}. "
        "Switched off: speculative decoding, KV connectors."
    )


def _bounds(scheduler: PrefixScheduler) -> str:
    config, plan = scheduler.roco_config, scheduler.request_plans.default
    size = plan.schedule.block_size
    steps_in_flight = scheduler.roco_managers[0].max_steps_in_flight
    held = size * most_blocks_by_default(
        config, size, steps_in_flight, scheduler.max_model_len
    )
    if config.most_kept is None:
        return f"keeps what it generates, and holds at most {held} tokens of KV cache"
    return (
        f"attends over at most {config.most_kept + config.stride - 1} tokens after a "
        f"step and holds at most {held} tokens of KV cache"
    )


def _ranks(scheduler: PrefixScheduler) -> str:
    """Return how tensor-parallel ranks choose, where that makes a difference."""
    parallel = scheduler.vllm_config.parallel_config
    size, config = parallel.tensor_parallel_size, scheduler.roco_config
    if size == 1 or not config.measures:
        return ""
    how = "by its own heads"
    if config.agree:
        how = "what one GPU would"
        # its query heads are measured apart
        if scheduler.vllm_config.model_config.get_total_num_kv_heads() < size:
            how = "what the others do, though as they share KV heads not all that one "
            how += "GPU would"
        if parallel.pipeline_parallel_size > 1:
            how += " with the layers of its stage"
    return f" Each of {size} tensor-parallel ranks chooses {how}."


def _room(scheduler: PrefixScheduler) -> str:
    """Return how many sequences fit, where vLLM's own line does not tell.

    For layers with a window that counts full batches in flight for each sequence.
    Here those that a step can read hold what they hold at most, the others what they
    hold while they are answered.
    """
    others, plan = scheduler.other_caches, scheduler.request_plans.default
    if not others:
        return ""
    groups, steps = len(scheduler.roco_managers), scheduler.max_steps_in_flight
    reading = groups * plan.max_blocks
    in_flight = others.max_in_flight_tokens(plan)
    reading += others.max_blocks(in_flight)
    answering = groups * plan.schedule.max_blocks(steps, scheduler.max_model_len)
    answering += others.max_blocks(steps)
    pool = scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    budget = steps * scheduler.scheduler_config.max_num_batched_tokens
    num_readers = min(max(1, budget // in_flight), pool // reading)
    fit = num_readers + (pool - num_readers * reading) // answering
    return (
        f" Together with what it holds in layers with a window, that is {reading} "
        f"blocks while it is read and {answering} while it is answered, so that {fit} "
        "sequences fit at once."
    )
