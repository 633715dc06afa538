# SPDX-License-Identifier: Apache-2.0
"""What the steps read of a layer's cache, made once: making views takes its time."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from vllm_roco.kv_cache.page import statistics_view


@dataclass(frozen=True)
class CacheViews:
    """Views of one layer's cache.

    Attributes:
        keys: `[num_blocks, block_size, num_kv_heads, head_size]`.
        values: Likewise.
        statistics: `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, None where nothing
            is measured.
    """

    keys: torch.Tensor
    values: torch.Tensor
    statistics: torch.Tensor | None


class BoundCache:
    """The views of the cache that vLLM has bound to a layer at the moment.

    vLLM binds throw-away caches while it profiles, and wants their memory back before
    it makes the real one: the views go with the tensor that they were made of.

    Args:
        measures: Whether pages have a tail of statistics.
    """

    def __init__(self, *, measures: bool) -> None:
        self._measures = measures
        self._cache: weakref.ref[torch.Tensor] | None = None
        self._views: CacheViews | None = None

    def views(self, kv_cache: torch.Tensor) -> CacheViews:
        """Return the views of a layer's cache.

        Args:
            kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
        """
        if self._views is None or self._cache is None or self._cache() is not kv_cache:
            # a view of the tensor itself would keep it alive
            keys, values = kv_cache.data.transpose(1, 2).chunk(2, dim=-1)
            statistics = statistics_view(kv_cache) if self._measures else None
            self._views = CacheViews(keys, values, statistics)
            self._cache = weakref.ref(kv_cache, self._drop)
        return self._views

    def _drop(self, _: weakref.ref[torch.Tensor]) -> None:
        # only the newest cache's reference is kept, and so is its callback alone
        self._views = None
