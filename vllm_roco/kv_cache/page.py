# SPDX-License-Identifier: Apache-2.0
"""Where K, V and the statistics of a block lie in memory.

A page is one block of one layer. The statistics follow K and V in the page's tail::

    | K and V of `block_size` tokens            | statistics            | padding |
    | [num_kv_heads, block_size, 2 * head_size] | [num_kv_heads + 1, 4] | to 128  |
      in the cache's dtype                        float32

The statistics are an entry for each kv head and, behind them, one of the block itself.

To vLLM a page is one cell of bytes: it binds `[num_blocks, 1, 1, page]`, plans with all
of it, and where it copies a block, the statistics go with K and V. What lies where in
the cell is this file's affair. It needs contiguous pages, that is one of vLLM's layouts
with the layer and the block as the two outer dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAGE_ALIGNMENT = 128
"""Bytes. Keeps every row of K and V aligned for vector loads and TMA."""

NUM_FIELDS = 4
"""Float32 numbers of an entry: a power of two, for kernels read whole entries."""

# places in a kv head's entry
MASS_SUM = 0
"""Sum of the attention mass that the block received, over the queries that saw it."""
MASS_SQUARES = 1
"""Sum of the squares of that mass."""
MASS_PEAK = 2
"""The largest mass that a single query gave to the block."""
NUM_QUERIES = 3
"""Queries that saw the block, of whatever sequence (exact in float32 up to 2^24)."""

# place in the block's own entry; the others are unused
FIRST_POSITION = 0
"""Position of the block's first token (exact in float32 up to 2^24)."""


def statistics_bytes(num_kv_heads: int) -> int:
    """Return the bytes of a page's tail, padding included."""
    raw = (num_kv_heads + 1) * NUM_FIELDS * torch.float32.itemsize
    return -(-raw // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


@dataclass(frozen=True)
class PageShape:
    """What a layer's pages hold, whatever the block size and the dtype.

    Attributes:
        num_kv_heads: KV heads.
        head_size: Numbers per head, of keys and values alike.
        has_statistics: Whether there is a tail of statistics.
    """

    num_kv_heads: int
    head_size: int
    has_statistics: bool

    def page_bytes(self, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of a page, its tail included."""
        content = self.num_kv_heads * block_size * 2 * self.head_size * dtype.itemsize
        return content + self._tail_bytes

    def states_view(self, bound_cache: torch.Tensor) -> torch.Tensor:
        """Return K and V of every page of a layer, as a view.

        Args:
            bound_cache: `[num_blocks, 1, 1, page_bytes / itemsize]`, the layer's cache
                as vLLM binds it. The view does not keep it alive.

        Returns:
            `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, over the same
            storage.
        """
        num_blocks, _, _, page = bound_cache.shape
        content = 2 * self.head_size
        states = page - self._tail_bytes // bound_cache.element_size()
        block_size = states // (self.num_kv_heads * content)
        # a view of the tensor itself would hold on to it
        return bound_cache.data.as_strided(
            (num_blocks, self.num_kv_heads, block_size, content),
            (bound_cache.stride(0), block_size * content, content, 1),
        )

    @property
    def _tail_bytes(self) -> int:
        return statistics_bytes(self.num_kv_heads) if self.has_statistics else 0


def statistics_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return the kv heads' statistics in every page of a layer, as a view.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, K and V of
            pages that have a tail, see `PageShape.states_view`.

    Returns:
        `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, over the same storage.
    """
    return _entries_view(kv_cache)[:, :-1]


def first_positions_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return the position of the first token of every page of a layer, as a view.

    Args:
        kv_cache: As for `statistics_view`.

    Returns:
        `[num_blocks]` float32, over the same storage.
    """
    return _entries_view(kv_cache)[:, -1, FIRST_POSITION]


def _entries_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return `[num_blocks, num_kv_heads + 1, NUM_FIELDS]` float32, whole tails."""
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    itemsize = kv_cache.element_size()
    page_bytes = kv_cache.stride(0) * itemsize
    tail_bytes = num_kv_heads * block_size * content * itemsize
    offset = kv_cache.storage_offset() * itemsize + tail_bytes
    return torch.empty(0, dtype=torch.float32, device=kv_cache.device).set_(
        kv_cache.untyped_storage(),
        offset // torch.float32.itemsize,
        (num_blocks, num_kv_heads + 1, NUM_FIELDS),
        (page_bytes // torch.float32.itemsize, NUM_FIELDS, 1),
    )


def page_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return whole pages of a layer, for moving them.

    Args:
        kv_cache: The layer's cache, as bound or as `PageShape.states_view` shows it.

    Returns:
        `[num_blocks, page_bytes / itemsize]` of the cache's dtype, K, V and tail alike.
    """
    page = kv_cache.stride(0)
    return kv_cache.as_strided((kv_cache.shape[0], page), (page, 1))
