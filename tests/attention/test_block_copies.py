# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks have the statistics, also where other layers' views come first."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.kv_cache_interface import (
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
    create_kv_cache_views,
)

from tests.kv_cache.specs import roco_spec
from vllm_roco.attention.block_copies import copy_whole_pages
from vllm_roco.attention.request_rows import RUNNER_V1, RUNNER_V2
from vllm_roco.kv_cache.page import first_positions_view, statistics_view

NUM_BLOCKS = 6
NUM_LAYERS = 2


def caches(layout: KVCacheLayout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return views of layers with a window, and of RoCo's, over the same memory."""
    spec = roco_spec()
    window = SlidingWindowSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=spec.dtype,
        sliding_window=32,
    )
    page = spec.page_size_bytes
    window = replace(window, page_size_padded=page)
    tensor = KVCacheTensor(
        size=NUM_LAYERS * NUM_BLOCKS * page,
        layers=[str(number) for number in range(NUM_LAYERS)],
        layer_stride=NUM_BLOCKS * page,
        block_stride=page,
    )
    memory = torch.arange(tensor.size // 4, dtype=torch.float32).view(torch.int8)
    windows, roco = (
        create_kv_cache_views(memory, each, NUM_BLOCKS, layout, tensor)
        for each in (window, spec)
    )
    return windows, roco


@pytest.mark.parametrize("name", [RUNNER_V1, RUNNER_V2])
@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
def test_statistics_are_copied_too(name: str, layout: KVCacheLayout) -> None:
    """A hit went by the statistics of whoever had had the blocks of its copies."""
    runner = importlib.import_module(name)
    copy_whole_pages()
    copy_whole_pages()
    windows, roco = caches(layout)
    # each layer with a window before the one that it shares its memory with
    both = [cache for pair in zip(windows, roco, strict=True) for cache in pair]
    before = [cache.clone() for cache in both]
    runner.copy_kv_cache_blocks_inplace(both, NUM_BLOCKS, [KVCacheBlockCopy(1, 4)])
    for cache, old in zip(both, before, strict=True):
        assert torch.equal(cache[4], old[1])
        assert torch.equal(cache[:4], old[:4])
        assert torch.equal(cache[5], old[5])
    for cache in roco:
        states = roco_spec().page_shape.states_view(cache)
        for numbers in (statistics_view(states), first_positions_view(states)):
            assert torch.equal(numbers[4], numbers[1])
            assert not torch.equal(numbers[3], numbers[1])
