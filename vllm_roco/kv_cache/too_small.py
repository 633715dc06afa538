# SPDX-License-Identifier: Apache-2.0
"""What helps where the KV cache has no room for one sequence: vLLM knows no budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_roco.config import RocoConfig
from vllm_roco.eviction_schedule import EvictionSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_BATCH = "--max-num-batched-tokens"
_MEMORY = (
    "give the cache more memory (--gpu-memory-utilization, on a CPU "
    "VLLM_CPU_KVCACHE_SPACE)"
)


def too_small(vllm_config: VllmConfig, block_size: int, steps_in_flight: int) -> str:
    """Return what one sequence may hold, and which options to lower.

    Layers with a window may need more than those that evict, and vLLM does not tell
    which of them did not fit.

    Args:
        vllm_config: Of the engine.
        block_size: Tokens of a block in the layers that evict.
        steps_in_flight: Steps that may be scheduled but not yet processed.
    """
    config = RocoConfig.from_additional_config(vllm_config.additional_config)
    in_windows = _most_in_windows(vllm_config, steps_in_flight)
    beside = ""
    if in_windows:
        beside = (
            f"; in layers with a window it may hold up to {in_windows} tokens: the "
            f"window, and {_BATCH} for each of {steps_in_flight} steps in flight"
        )
    kept = config.most_kept
    if kept is None:
        also = f", {_BATCH}" if in_windows else ""
        return (
            "roco: the KV cache is too small for one sequence, which keeps all that it "
            f"generates in mode = {config.mode!r}{beside}. Lower --max-model-len{also}"
            f", use mode 'both', or {_MEMORY}."
        )
    schedule = EvictionSchedule(block_size, kept, config.stride)
    held = block_size * schedule.max_blocks(steps_in_flight * config.chunk)
    which = "max_budget" if config.mode == "generation" else "budget"
    # what holds more comes first
    needs = [(held, f"{which}, chunk or stride"), (in_windows, _BATCH)]
    needs.sort(key=lambda need: need[0], reverse=True)
    lower = ", then ".join(options for tokens, options in needs if tokens)
    return (
        "roco: the KV cache is too small for one sequence, which may hold up to "
        f"{held} tokens: {which} = {kept}, stride = {config.stride}, chunk = "
        f"{config.chunk} for each of {steps_in_flight} steps in flight, and one block "
        f"of {block_size}{beside}. Lower {lower}, or {_MEMORY}; --max-model-len helps "
        f"only below {max(held, in_windows)} tokens."
    )


def _most_in_windows(vllm_config: VllmConfig, steps_in_flight: int) -> int:
    """Return the most tokens that vLLM plans a window with, 0 if there is none."""
    window = vllm_config.model_config.get_sliding_window()
    if window is None:
        return 0
    tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
    return window - 1 + steps_in_flight * tokens
