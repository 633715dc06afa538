# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks have the statistics, also where other layers' views come first."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.kv_cache_interface import (
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
    create_kv_cache_views,
)

from tests.kv_cache.specs import roco_spec
from vllm_roco.attention import block_copies
from vllm_roco.attention.block_copies import copy_whole_pages
from vllm_roco.attention.request_rows import RUNNER_V1, RUNNER_V2
from vllm_roco.kv_cache.page import first_positions_view, statistics_view

NUM_BLOCKS = 6
NUM_LAYERS = 2


class Elements(TorchDispatchMode):
    """Counts the elements that are put in place one by one."""

    count = 0
    most_at_once = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "index_put" in str(func):
            self.count += args[2].numel()
            self.most_at_once = max(self.most_at_once, args[2].nbytes)
        return result


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


@pytest.mark.parametrize("name", [RUNNER_V1, RUNNER_V2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_pages_are_copied_in_wide_words(name: str, dtype: torch.dtype) -> None:
    """A hit took as long as reading many tokens: its bytes were put one by one."""
    runner = importlib.import_module(name)
    copy_whole_pages()
    layers = [
        torch.randint(100, (NUM_BLOCKS, 1, 1, 96)).to(dtype) for _ in range(NUM_LAYERS)
    ]
    before = [layer.clone() for layer in layers]
    with Elements() as elements:
        runner.copy_kv_cache_blocks_inplace(
            layers, NUM_BLOCKS, [KVCacheBlockCopy(1, 4), KVCacheBlockCopy(0, 2)]
        )
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer, old[[0, 1, 0, 3, 1, 5]])
    assert elements.count == NUM_LAYERS * 2 * layers[0][0].nbytes // 8


def test_many_copies_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages of a step lay in memory once more, in a whole that nobody planned."""
    runner = importlib.import_module(RUNNER_V2)
    copy_whole_pages()
    layer = torch.randn(20, 1, 1, 96)
    old = layer.clone()
    monkeypatch.setattr(block_copies, "MAX_BYTES", 3 * layer[0].nbytes)
    pairs = [KVCacheBlockCopy(number, 10 + number) for number in range(10)]
    with Elements() as elements:
        runner.copy_kv_cache_blocks_inplace([layer], 20, pairs)
    assert torch.equal(layer, torch.cat([old[:10], old[:10]]))
    assert elements.most_at_once == 3 * layer[0].nbytes


def test_pages_of_other_kinds_are_left_to_vllm() -> None:
    """Blocks of no whole words, of several kernel blocks, or with heads outside."""
    runner = importlib.import_module(RUNNER_V2)
    copy_whole_pages()
    odd = torch.randint(100, (NUM_BLOCKS, 1, 1, 97)).to(torch.bfloat16)
    halves = torch.randn(2 * NUM_BLOCKS, 2, 4, 8)
    heads_outside = torch.randn(2, NUM_BLOCKS, 4, 8).transpose(0, 1)
    layers = [odd, halves, heads_outside]
    before = [layer.clone() for layer in layers]
    runner.copy_kv_cache_blocks_inplace(layers, NUM_BLOCKS, [KVCacheBlockCopy(1, 4)])
    old_odd, old_halves, old_heads = before
    assert torch.equal(odd, old_odd[[0, 1, 2, 3, 1, 5]])
    assert torch.equal(heads_outside, old_heads[[0, 1, 2, 3, 1, 5]])
    assert torch.equal(halves, old_halves[[*range(8), 2, 3, 10, 11]])
