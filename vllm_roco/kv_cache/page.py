# SPDX-License-Identifier: Apache-2.0
"""Where K, V and the statistics of a block lie in memory.

A page is one block of one layer. The statistics follow K and V in the page's tail, so
they move with it and are part of the page size that vLLM plans with::

    | K and V of `block_size` tokens           | statistics          | padding |
    | [num_kv_heads, block_size, 2 * head_size] | [num_kv_heads, 4]   | to 128  |
      in the cache's dtype and layout             float32

The tail needs a cache whose pages are contiguous, that is one of vLLM's layouts with
the layer and the block as the two outer dimensions.
"""

from __future__ import annotations

import torch

PAGE_ALIGNMENT = 128
"""Bytes. Keeps every row of K and V aligned for vector loads and TMA."""

NUM_FIELDS = 4
"""Float32 numbers that each kv head of a page holds; their places follow."""

MASS_SUM = 0
"""Sum of the attention mass that the block received, over the queries that saw it."""
MASS_SQUARES = 1
"""Sum of the squares of that mass."""
MASS_PEAK = 2
"""The largest mass that a single query gave to the block."""
FIRST_POSITION = 3
"""Position of the block's first token (exact in float32 up to 2^24)."""


def statistics_bytes(num_kv_heads: int) -> int:
    """Return the bytes of a page's tail, padding included."""
    raw = num_kv_heads * NUM_FIELDS * torch.float32.itemsize
    return -(-raw // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def statistics_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return the statistics of every page of a layer, as a view.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, the layer's
            cache as vLLM binds it, with pages that have a tail.

    Returns:
        `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, over the same storage.
    """
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    itemsize = kv_cache.element_size()
    page_bytes = kv_cache.stride(0) * itemsize
    tail_bytes = num_kv_heads * block_size * content * itemsize
    offset = kv_cache.storage_offset() * itemsize + tail_bytes
    return torch.empty(0, dtype=torch.float32, device=kv_cache.device).set_(
        kv_cache.untyped_storage(),
        offset // torch.float32.itemsize,
        (num_blocks, num_kv_heads, NUM_FIELDS),
        (page_bytes // torch.float32.itemsize, NUM_FIELDS, 1),
    )


def page_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return whole pages of a layer, for moving them.

    Args:
        kv_cache: The layer's cache, see `statistics_view`.

    Returns:
        `[num_blocks, page_bytes / itemsize]` of the cache's dtype, K, V and tail alike.
    """
    page = kv_cache.stride(0)
    return kv_cache.as_strided((kv_cache.shape[0], page), (page, 1))
