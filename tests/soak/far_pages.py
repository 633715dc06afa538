# SPDX-License-Identifier: Apache-2.0
"""The pages of a cache, spread over more than 2^31 numbers.

On a CPU that is memory which the kernel promises; only pages that are used take any.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

import torch

from tests.ops.paged_case import PagedCase
from tests.ops.test_select_victims import Group
from vllm_roco.kv_cache import page

FAR = 2**31 + 2**20
"""Numbers of a cache."""
_MAP_NORESERVE = 0x4000
"""Linux's, which Python's `mmap` does not name."""


def pages_of(cache: torch.Tensor) -> torch.Tensor:
    """Return `[num_blocks, page_bytes]` uint8, whole pages, as a view."""
    return page.page_view(cache).view(torch.uint8)


def spread(cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return a cache with the same pages, so far apart, and by how many."""
    numbers = cache.stride(0)
    apart = FAR // (numbers * (len(cache) - 1)) + 1 if len(cache) > 1 else 1
    num_blocks = (len(cache) - 1) * apart + 1
    memory = _memory(num_blocks * numbers, cache.dtype, cache.device)
    far = memory.as_strided((num_blocks, *cache.shape[1:]), cache.stride())
    page.page_view(far)[::apart] = page.page_view(cache)
    return far, apart


def _memory(numbers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        promised = mmap.mmap(-1, numbers * dtype.itemsize, flags=flags)
        return torch.frombuffer(promised, dtype=dtype)
    return torch.empty(numbers, dtype=dtype, device=device)


@dataclass(frozen=True)
class FarCase:
    """A batch whose pages lie far apart.

    Attributes:
        case: The batch.
        apart: What block ids were multiplied by.
    """

    case: PagedCase
    apart: int

    def pages(self) -> torch.Tensor:
        """Return the pages as those of the batch that this was made of."""
        return page.page_view(self.case.kv_cache)[:: self.apart].view(torch.uint8)


def far_case(case: PagedCase) -> FarCase:
    """Spread a batch's pages."""
    far, apart = spread(case.kv_cache)
    return FarCase(
        replace(case, kv_cache=far, live_table=case.live_table * apart), apart
    )


@dataclass(frozen=True)
class FarGroup:
    """Layers whose pages lie far apart.

    Attributes:
        group: The layers.
        apart: What block ids were multiplied by.
    """

    group: Group
    apart: int

    def near(self, moves: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return moves in the ids of the group that this was made of."""
        assert not any(block % self.apart for move in moves for block in move)
        return [(s // self.apart, t // self.apart) for s, t in moves]


def far_group(group: Group) -> FarGroup:
    """Spread the pages of a group's layers."""
    spreads = [spread(cache) for cache in group.caches]
    caches = [far for far, _ in spreads]
    (apart,) = {each for _, each in spreads}
    return FarGroup(
        replace(group, caches=caches, live_table=group.live_table * apart), apart
    )
