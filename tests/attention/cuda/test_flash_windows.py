# SPDX-License-Identifier: Apache-2.0
"""Layers with a window beside RoCo's have no schedule that a captured graph misreads.

`tests/gpu/test_windows.py` serves requests that a window holds whole, on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils, flash_attn
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from tests.attention.rig import config_for
from tests.kv_cache.specs import one_group, roco_spec
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.attention.cuda import metadata
from vllm_roco.attention.cuda.metadata import RocoCudaMetadataBuilder
from vllm_roco.ops.device import H100, Device

CPU = torch.device("cpu")
OPTIONS = {"budget": 1024, "stride": 256, "chunk": 1024}
WINDOW = 64
HEADS: dict[str, Any] = dict(num_heads=4, head_size=64, scale=0.125, num_kv_heads=2)


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand for FlashAttention 3, which a build for CPUs has not.

    Returns:
        The longest sequence of each step that a schedule is worked out for.
    """
    lengths: list[int] = []

    def schedule(*, max_seqlen_k: int, **_: Any) -> torch.Tensor:
        lengths.append(max_seqlen_k)
        return torch.zeros(1, dtype=torch.int32)

    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    for name in (
        *("flash_attn_varlen_func", "get_scheduler_metadata"),
        "reshape_and_cache_flash",
    ):
        monkeypatch.setattr(fa_utils, name, None, raising=False)
    from vllm_roco.attention.cuda import impl

    monkeypatch.setattr(impl, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(RocoBackend, "get_impl_cls", lambda: impl.RocoCudaImpl)
    monkeypatch.setattr(metadata, "moved_blocks_of", lambda _: None)
    monkeypatch.setattr(Device, "of", lambda _: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return lengths


def with_graphs() -> VllmConfig:
    vllm_config = config_for(OPTIONS)
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    vllm_config.compilation_config.max_cudagraph_capture_size = 4
    return vllm_config


def window_builder(
    vllm_config: VllmConfig,
) -> flash_attn.FlashAttentionMetadataBuilder:
    """Build a layer with a window, and return who describes its steps."""
    name = "model.layers.7.self_attn.attn"
    with set_current_vllm_config(vllm_config):
        Attention(
            **HEADS,
            per_layer_sliding_window=WINDOW,
            prefix=name,
            attn_backend=flash_attn.FlashAttentionBackend,
        )
    spec = SlidingWindowSpec(
        block_size=16,
        num_kv_heads=HEADS["num_kv_heads"],
        head_size=HEADS["head_size"],
        dtype=torch.bfloat16,
        sliding_window=WINDOW,
    )
    return flash_attn.FlashAttentionMetadataBuilder(spec, [name], vllm_config, CPU)


def build_roco(vllm_config: VllmConfig) -> RocoCudaMetadataBuilder:
    """Build a layer of full attention, and return who describes its steps."""
    spec = roco_spec(
        num_kv_heads=HEADS["num_kv_heads"],
        head_size=HEADS["head_size"],
        dtype=torch.bfloat16,
        **OPTIONS,
    )
    (group,) = one_group(spec, 8, num_layers=1).kv_cache_groups
    with set_current_vllm_config(vllm_config):
        for name in group.layer_names:
            Attention(**HEADS, prefix=name)
    return RocoCudaMetadataBuilder(spec, group.layer_names, vllm_config, CPU)


def decode_at(length: int) -> CommonAttentionMetadata:
    """Return a step of one decode of a sequence that is then so long."""
    starts = torch.tensor([0, 1], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([length], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=1,
        max_query_len=1,
        max_seq_len=length,
        block_table_tensor=torch.zeros(1, 64, dtype=torch.int32),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("roco_first", [False, True])
def test_beside_rocos_layers_nothing_is_scheduled_ahead(
    scheduled: list[int], roco_first: bool
) -> None:
    """A request that a window held whole got another token than Transformers' model."""
    vllm_config = with_graphs()
    build = [build_roco, window_builder]
    builders = [each(vllm_config) for each in (build if roco_first else build[::-1])]
    builder = builders[1] if roco_first else builders[0]
    for length in (WINDOW - 3, WINDOW + 1):
        step = builder.build(0, decode_at(length))
        assert step.scheduler_metadata is None
        # the buffers of splits have the size that graphs were captured with
        assert step.max_num_splits == builder.max_num_splits > 1
    assert scheduled == []


def test_elsewhere_vllm_schedules_as_before(scheduled: list[int]) -> None:
    """Also in a process that has an engine with RoCo's layers."""
    build_roco(with_graphs())
    builder = window_builder(with_graphs())
    assert builder.build(0, decode_at(WINDOW - 3)).scheduler_metadata is not None
    assert scheduled == [WINDOW - 3]
