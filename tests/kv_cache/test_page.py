# SPDX-License-Identifier: Apache-2.0
"""Pages in memory that vLLM lays out, in every layout that RoCo accepts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vllm.utils import torch_utils
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from tests.kv_cache.specs import bind_caches, bind_states, one_group, roco_spec
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.kv_cache.page import (
    NUM_FIELDS,
    NUM_QUERIES,
    PAGE_ALIGNMENT,
    first_positions_view,
    page_view,
    statistics_bytes,
    statistics_view,
)
from vllm_roco.kv_cache.spec import RocoSpec

NUM_BLOCKS = 5
NUM_LAYERS = 3

layouts = pytest.mark.parametrize(
    "layout", RocoBackend.supported_kv_cache_layouts(), ids=lambda layout: layout.name
)


def spec_of(
    num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype
) -> RocoSpec:
    return roco_spec(
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
    )


specs = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec_of(2, 16, 16, torch.float32), id="float32"),
        pytest.param(spec_of(3, 80, 16, torch.bfloat16), id="bfloat16-3x80"),
        pytest.param(spec_of(1, 64, 32, torch.float16), id="float16-1x64"),
        pytest.param(spec_of(9, 128, 128, torch.bfloat16), id="bfloat16-9x128"),
        pytest.param(spec_of(3, 80, 16, torch.uint8), id="fp8-3x80"),
    ],
)


@pytest.mark.parametrize(
    ("num_kv_heads", "expected"),
    [(1, 128), (2, 128), (7, 128), (8, 256), (15, 256), (16, 384)],
)
def test_the_tail_is_padded_to_the_alignment(num_kv_heads: int, expected: int) -> None:
    assert statistics_bytes(num_kv_heads) == expected
    assert expected % PAGE_ALIGNMENT == 0
    assert expected >= (num_kv_heads + 1) * NUM_FIELDS * 4
    # Triton has no other ranges
    assert NUM_FIELDS.bit_count() == 1


@layouts
@specs
def test_the_tail_lies_in_the_page_behind_keys_and_values(
    layout: KVCacheLayout, spec: RocoSpec
) -> None:
    caches = bind_states(one_group(spec, NUM_BLOCKS, NUM_LAYERS), layout)
    memory = caches[0].untyped_storage().data_ptr()
    for layer, cache in enumerate(caches):
        statistics = statistics_view(cache)
        first_positions = first_positions_view(cache)
        assert first_positions.shape == (NUM_BLOCKS,)
        assert first_positions.dtype == torch.float32
        assert statistics.shape == (NUM_BLOCKS, spec.num_kv_heads, NUM_FIELDS)
        assert statistics.dtype == torch.float32
        for block in range(NUM_BLOCKS):
            page = memory + (layer * NUM_BLOCKS + block) * spec.page_size_bytes
            tail = statistics[block].data_ptr() - page
            assert cache[block].data_ptr() == page
            assert tail == cache[block].numel() * cache.element_size()
            assert tail + statistics_bytes(spec.num_kv_heads) == spec.page_size_bytes
            assert statistics[block].is_contiguous()
            # the block's own entry is behind those of its heads
            behind = statistics[block].data_ptr() + statistics[block].numel() * 4
            assert first_positions[block].data_ptr() == behind


@layouts
@specs
def test_every_byte_has_one_owner(layout: KVCacheLayout, spec: RocoSpec) -> None:
    """Tails do not overlap keys and values, nor another layer or block."""
    caches = bind_states(one_group(spec, NUM_BLOCKS, NUM_LAYERS), layout)
    for number, cache in enumerate(caches):
        for block in range(NUM_BLOCKS):
            cache[block] = number * NUM_BLOCKS + block
            statistics_view(cache)[block] = -(number * NUM_BLOCKS + block)
            first_positions_view(cache)[block] = number * NUM_BLOCKS + block + 0.5
    for number, cache in enumerate(caches):
        for block in range(NUM_BLOCKS):
            value = number * NUM_BLOCKS + block
            assert (cache[block] == value).all()
            assert (statistics_view(cache)[block] == -value).all()
            assert first_positions_view(cache)[block] == value + 0.5


@layouts
@specs
def test_a_moved_page_carries_keys_values_and_tail(
    layout: KVCacheLayout, spec: RocoSpec
) -> None:
    generator = torch.Generator().manual_seed(0)
    caches = bind_states(one_group(spec, NUM_BLOCKS, NUM_LAYERS), layout)
    for cache in caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
        statistics = statistics_view(cache)
        statistics.copy_(torch.rand(statistics.shape, generator=generator))
        statistics[..., NUM_QUERIES] = torch.arange(NUM_BLOCKS)[:, None] + 1
        first_positions_view(cache).copy_(torch.arange(NUM_BLOCKS) * spec.block_size)

    def contents(cache: torch.Tensor) -> list[torch.Tensor]:
        views = cache, statistics_view(cache), first_positions_view(cache)
        return [view.clone() for view in views]

    before = [contents(cache) for cache in caches]

    # the last block of the second layer goes over its first one
    pages = page_view(caches[1])
    assert pages.shape == (NUM_BLOCKS, spec.page_size_bytes // spec.dtype.itemsize)
    pages[torch.tensor([0])] = pages[torch.tensor([NUM_BLOCKS - 1])]

    source = [0, 1, 2, 3, 4], [4, 1, 2, 3, 4], [0, 1, 2, 3, 4]
    for cache, old, places in zip(caches, before, source, strict=True):
        for found, expected in zip(contents(cache), old, strict=True):
            assert torch.equal(found, expected[places])


@layouts
def test_a_page_without_statistics_has_no_tail(layout: KVCacheLayout) -> None:
    spec = roco_spec(policy="recent")
    (cache,) = bind_states(one_group(spec, NUM_BLOCKS), layout)
    assert page_view(cache).shape[1] == cache[0].numel()


@layouts
def test_pages_that_vllm_padded_further_keep_their_tail(layout: KVCacheLayout) -> None:
    """vLLM pads pages that share memory with larger ones of other layers."""
    spec = roco_spec()
    spec = replace(spec, page_size_padded=spec.page_size_bytes + 512)
    (cache,) = bind_states(one_group(spec, NUM_BLOCKS), layout)
    statistics = statistics_view(cache)
    cache.fill_(1)
    statistics.fill_(2)
    first_positions_view(cache).fill_(3)
    assert (cache == 1).all()
    page = page_view(cache)
    assert page.shape[1] * 4 == spec.page_size_bytes
    assert int((page == 2).sum()) == statistics.numel()
    assert int((page == 3).sum()) == NUM_BLOCKS


@layouts
@pytest.mark.parametrize("policy", ["roco", "recent"])
@pytest.mark.parametrize("padding", [0, 384])
def test_what_vllm_sees_of_a_page_is_all_of_it(
    policy: str,
    layout: KVCacheLayout,
    padding: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It copies blocks by its view, and once left the statistics of the tail behind."""
    # decided by the platform, which Python files without a build do not have
    monkeypatch.setattr(torch_utils, "PIN_MEMORY", False)
    spec = roco_spec(policy=policy)
    content = spec.page_size_bytes
    if padding:
        spec = replace(spec, page_size_padded=content + padding)
    assert (spec.num_heads, spec.num_states) == (1, 1)
    assert spec.state_content_size_bytes == spec.unpadded_page_size_bytes == content
    caches = bind_caches(one_group(spec, 5, 2), layout)
    for cache in caches:
        assert cache.shape == (5, 1, 1, content // 4)
        pages = page_view(cache)
        assert pages.shape[1] * 4 == content + padding
        pages.copy_(torch.arange(5)[:, None])
        if spec.has_statistics:
            statistics = statistics_view(spec.page_shape.states_view(cache))
            statistics.add_(100)
    copy_kv_cache_blocks_inplace(caches, 5, [KVCacheBlockCopy(3, 1)])
    for cache in caches:
        states = spec.page_shape.states_view(cache)
        assert states[:, 0, 0, 0].tolist() == [0, 3, 2, 3, 4]
        if spec.has_statistics:
            tail = statistics_view(states)[:, 1, NUM_QUERIES]
            assert tail.tolist() == [100, 103, 102, 103, 104]
            assert first_positions_view(states).tolist() == [0, 3, 2, 3, 4]
