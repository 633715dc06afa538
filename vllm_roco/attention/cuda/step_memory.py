# SPDX-License-Identifier: Apache-2.0
"""The device memory of steps, taken while vLLM profiles.

vLLM gives the KV cache what its profiling run leaves over, and makes metadata builders
afterwards. What a builder allocated would be missing from that plan, so the layers take
it in the profiling run and the builders find it there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from vllm.logger import init_logger

from vllm_roco.attention.cuda.step_bounds import StepBounds
from vllm_roco.attention.cuda.step_buffers import StepBuffers
from vllm_roco.attention.layers import roco_layers, roco_spec
from vllm_roco.ops.prefill_plan import PrefillScratch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_roco.kv_cache.spec import RocoSpec
    from vllm_roco.ops.device import Device

logger = init_logger(__name__)


@dataclass(frozen=True)
class StepMemory:
    """What the steps of a group of layers write to; never moves, never grows.

    Attributes:
        buffers: What the live-table kernel writes, for all layers of the group. None in
            layers behind the first of those that probably become one group.
        scratch: Flat float32, which each kernel overwrites; shared by all groups.
        prefill: What the programs that measure prompts leave for each other; shared
            likewise.
    """

    buffers: StepBuffers | None
    scratch: torch.Tensor
    prefill: PrefillScratch


class HasStepMemory(Protocol):
    """A layer's implementation, as far as it keeps the memory."""

    memory: StepMemory | None


def reserve(vllm_config: VllmConfig, device: torch.device, hardware: Device) -> None:
    """Take the memory of steps and leave it with the layers; in the profiling run.

    Layers of one spec become one group as a rule. If vLLM makes several groups of them,
    every further one needs buffers of its own, which its builder allocates.

    Args:
        vllm_config: The worker's configuration.
        device: Where the caches will lie.
        hardware: What kernels are laid out for.
    """
    groups: dict[RocoSpec, list[Attention]] = defaultdict(list)
    for layer in roco_layers(vllm_config):
        spec = cast("AttentionSpec", layer.get_kv_cache_spec(vllm_config))
        groups[roco_spec(layer.attn_backend.customize_spec(spec))].append(layer)
    bounds = {
        spec: StepBounds.of(
            spec,
            vllm_config,
            num_q_heads=layers[0].num_heads,
            num_layers=len(layers),
        )
        for spec, layers in groups.items()
    }
    needed = max(bound.scratch_numbers(hardware) for bound in bounds.values())
    scratch, prefill = _scratch(needed, device), PrefillScratch.allocate(device)
    for spec, layers in groups.items():
        buffers = _buffers(bounds[spec], device)
        for place, layer in enumerate(layers):
            keeper = cast("HasStepMemory", layer.impl)
            keeper.memory = StepMemory(None if place else buffers, scratch, prefill)


def claim(
    keepers: Sequence[HasStepMemory],
    bounds: StepBounds,
    device: torch.device,
    hardware: Device,
) -> tuple[StepBuffers, torch.Tensor, PrefillScratch]:
    """Return the buffers and both kinds of scratch of a group; for its builder.

    Args:
        keepers: The implementations of the group's layers.
        bounds: The largest step.
        device: Where the caches lie.
        hardware: What kernels are laid out for.
    """
    kept = [keeper.memory for keeper in keepers if keeper.memory is not None]
    buffers = next((x.buffers for x in kept if x.buffers is not None), None)
    if buffers is None or not buffers.hold(bounds.rows, bounds.live_blocks):
        buffers = _buffers(bounds, device)
        _tell("step buffers", StepBuffers.num_bytes(bounds.rows, bounds.live_blocks))
    needed = bounds.scratch_numbers(hardware)
    scratch = next((x.scratch for x in kept if x.scratch.numel() >= needed), None)
    if scratch is None:
        scratch = _scratch(needed, device)
        _tell("scratch", needed * torch.float32.itemsize)
    prefill = kept[0].prefill if kept else PrefillScratch.allocate(device)
    return buffers, scratch, prefill


def _buffers(bounds: StepBounds, device: torch.device) -> StepBuffers:
    return StepBuffers.allocate(bounds.rows, bounds.live_blocks, device)


def _scratch(numbers: int, device: torch.device) -> torch.Tensor:
    return torch.empty(numbers, dtype=torch.float32, device=device)


def _tell(what: str, num_bytes: int) -> None:
    logger.warning(
        "roco: %.1f MiB of %s are allocated after vLLM has planned its memory: it has "
        "other groups of layers, or other blocks, than when it profiled. Should memory "
        "run out, lower --gpu-memory-utilization by as much.",
        num_bytes / 2**20,
        what,
    )
