# SPDX-License-Identifier: Apache-2.0
"""Who takes the memory of steps, and who finds it.

The layers here are those of the CPU, which keep what they are given but do not use it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec

from tests.attention.rig import config_for
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.attention.cuda import step_memory
from vllm_roco.attention.cuda.step_bounds import StepBounds
from vllm_roco.attention.cuda.step_memory import HasStepMemory, StepMemory
from vllm_roco.attention.layers import LayerGroup, roco_spec
from vllm_roco.ops.device import H100

OPTIONS = {"budget": 64, "stride": 32, "chunk": 64, "sink": 16, "recent": 16}
CPU = torch.device("cpu")


@pytest.fixture
def vllm_config() -> VllmConfig:
    return config_for(OPTIONS)


def build(
    vllm_config: VllmConfig, indices: range, head_size: int = 64, **options: Any
) -> list[str]:
    names = [f"model.layers.{index}.self_attn.attn" for index in indices]
    with set_current_vllm_config(vllm_config):
        for name in names:
            Attention(4, head_size, 0.125, 2, prefix=name, **options)
    return names


def memory_of(vllm_config: VllmConfig, name: str) -> StepMemory:
    layer = vllm_config.compilation_config.static_forward_context[name]
    return layer.impl.memory


def bounds_of(vllm_config: VllmConfig, names: list[str]) -> StepBounds:
    layer = vllm_config.compilation_config.static_forward_context[names[0]]
    with set_current_vllm_config(vllm_config):
        spec = cast("AttentionSpec", layer.get_kv_cache_spec(vllm_config))
        spec = RocoBackend.customize_spec(spec)
    return StepBounds.of(
        roco_spec(spec), vllm_config, num_q_heads=4, num_layers=len(names)
    )


def reserve(vllm_config: VllmConfig) -> None:
    with set_current_vllm_config(vllm_config):
        step_memory.reserve(vllm_config, CPU, H100)


def claim(vllm_config: VllmConfig, names: list[str]) -> StepMemory:
    group = LayerGroup(names, vllm_config)
    keepers = cast("list[HasStepMemory]", group.implementations)
    bounds = bounds_of(vllm_config, names)
    return StepMemory(*step_memory.claim(keepers, bounds, CPU, H100))


def test_a_builder_finds_what_the_layers_took(vllm_config: VllmConfig) -> None:
    """Builders allocated it, after vLLM had given the memory to the KV cache."""
    names = build(vllm_config, range(3))
    reserve(vllm_config)
    reserved = memory_of(vllm_config, names[0])
    assert reserved.buffers is not None
    needed = bounds_of(vllm_config, names).memory_bytes(H100)
    parts = *vars(reserved.buffers).values(), *vars(reserved.prefill).values()
    assert reserved.scratch.nbytes + sum(x.nbytes for x in parts) == needed
    # builders are made for a throw-away cache first, then for the real one
    for _ in range(2):
        claimed = claim(vllm_config, names)
        assert claimed.buffers is reserved.buffers
        assert claimed.scratch is reserved.scratch
        assert claimed.prefill is reserved.prefill


def test_shapes_have_buffers_of_their_own_and_scratch_together(
    vllm_config: VllmConfig,
) -> None:
    small = build(vllm_config, range(2))
    large = build(vllm_config, range(2, 5), head_size=128)
    reserve(vllm_config)
    first, second = claim(vllm_config, small), claim(vllm_config, large)
    assert first.buffers is not second.buffers
    assert first.scratch is second.scratch
    assert first.prefill is second.prefill
    numbers = [
        bounds_of(vllm_config, names).scratch_numbers(H100) for names in (small, large)
    ]
    assert numbers[0] < numbers[1] == first.scratch.numel()


def test_a_second_group_of_one_shape_writes_elsewhere(
    vllm_config: VllmConfig, caplog_vllm: pytest.LogCaptureFixture
) -> None:
    """Its block table is another; only scratch may be overwritten."""
    names = build(vllm_config, range(4))
    reserve(vllm_config)
    first = claim(vllm_config, names[:2])
    assert caplog_vllm.text == ""
    second = claim(vllm_config, names[2:])
    assert first.buffers is memory_of(vllm_config, names[0]).buffers
    assert second.buffers is not first.buffers
    assert second.scratch is first.scratch
    assert second.prefill is first.prefill
    assert "of step buffers are allocated after vLLM has planned" in caplog_vllm.text


def test_layers_of_another_backend_take_nothing(vllm_config: VllmConfig) -> None:
    names = build(vllm_config, range(1))
    stock = AttentionBackendEnum.CPU_ATTN.get_class()
    (other,) = build(vllm_config, range(1, 2), attn_backend=stock)
    reserve(vllm_config)
    assert claim(vllm_config, names).buffers is not None
    context = vllm_config.compilation_config.static_forward_context
    assert not hasattr(context[other].impl, "memory")


def test_larger_blocks_than_profiled_still_find_room(
    vllm_config: VllmConfig, caplog_vllm: pytest.LogCaptureFixture
) -> None:
    """vLLM may scale blocks once it has seen all kinds of layers."""
    names = build(vllm_config, range(2))
    reserve(vllm_config)
    reserved = memory_of(vllm_config, names[0])
    vllm_config.cache_config.block_size *= 2
    try:
        claimed = claim(vllm_config, names)
    finally:
        vllm_config.cache_config.block_size //= 2
    assert claimed.buffers is reserved.buffers
    assert claimed.scratch is reserved.scratch
    assert caplog_vllm.text == ""


def test_what_was_not_profiled_is_said(
    vllm_config: VllmConfig, caplog_vllm: pytest.LogCaptureFixture
) -> None:
    names = build(vllm_config, range(2))
    reserve(vllm_config)
    scheduler = vllm_config.scheduler_config
    rows, scheduler.max_num_seqs = scheduler.max_num_seqs, 64
    try:
        claimed = claim(vllm_config, names)
    finally:
        scheduler.max_num_seqs = rows
    assert claimed.buffers is not None
    assert claimed.buffers.live_table.shape[0] == 64
    assert "MiB of scratch are allocated after" in caplog_vllm.text


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture,
) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged; vLLM's loggers do not propagate."""
    logger = logging.getLogger("vllm_roco.attention.cuda.step_memory")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
