# SPDX-License-Identifier: Apache-2.0
"""What is made of layers' caches once and kept as long as vLLM has them bound.

vLLM binds throw-away caches while it profiles, and wants their memory back before it
makes the real ones. So what was made of caches goes with the first of them that goes,
and is made anew when others are bound.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from vllm_roco.kv_cache.page import (
    PageShape,
    first_positions_view,
    statistics_view,
)

T = TypeVar("T")


class WhileBound(Generic[T]):
    """Keeps what `make` returned for the caches that are bound at the moment.

    Args:
        make: Gets the caches. What it returns must not hold the tensors themselves, or
            they would never go.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._caches: tuple[weakref.ref[torch.Tensor], ...] = ()
        self._made: T | None = None

    def of(self, *caches: torch.Tensor) -> T:
        """Return what belongs to these caches, the same object while they are bound.

        Args:
            caches: As vLLM binds them, see `PageShape.states_view`.
        """
        made = self._made
        if made is None or not self._are_bound(caches):
            made = self._made = self._make(*caches)
            # older references and their callbacks go here
            self._caches = tuple(weakref.ref(cache, self._drop) for cache in caches)
        return made

    def _are_bound(self, caches: tuple[torch.Tensor, ...]) -> bool:
        return len(caches) == len(self._caches) and all(
            reference() is cache
            for reference, cache in zip(self._caches, caches, strict=True)
        )

    def _drop(self, _: weakref.ref[torch.Tensor]) -> None:
        self._made = None


@dataclass(frozen=True)
class CacheViews:
    """Views of one layer's cache; making them takes its time.

    Attributes:
        states: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
        keys: `[num_blocks, block_size, num_kv_heads, head_size]`.
        values: Likewise.
        statistics: `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, None where nothing
            is measured.
        first_positions: `[num_blocks]` float32, None likewise.
    """

    states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    statistics: torch.Tensor | None
    first_positions: torch.Tensor | None

    @classmethod
    def of(cls, kv_cache: torch.Tensor, *, shape: PageShape) -> CacheViews:
        """Return the views of a layer's cache.

        Args:
            kv_cache: As vLLM binds it, see `PageShape.states_view`.
            shape: What its pages hold.
        """
        states = shape.states_view(kv_cache)
        keys, values = states.transpose(1, 2).chunk(2, dim=-1)
        statistics = first_positions = None
        if shape.has_statistics:
            statistics = statistics_view(states)
            first_positions = first_positions_view(states)
        return cls(states, keys, values, statistics, first_positions)
