# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from vllm_roco.attention.cache_views import BoundCache
from vllm_roco.kv_cache import page


def new_cache() -> torch.Tensor:
    """Return `[4, 2, 16, 64]` with a tail, as vLLM cuts it out of raw memory."""
    tail = page.statistics_bytes(2) // torch.float16.itemsize
    size = 2 * 16 * 64 + tail
    raw = torch.arange(4 * size, dtype=torch.int16).view(torch.float16)
    return raw.as_strided((4, 2, 16, 64), (size, 16 * 64, 64, 1))


@pytest.mark.parametrize("inference", [False, True])
def test_views_show_the_cache_that_is_bound(inference: bool) -> None:
    bound = BoundCache(measures=True)
    with torch.inference_mode(inference):
        for cache in (new_cache(), new_cache()):
            views = bound.views(cache)
            assert bound.views(cache) is views
            cache.fill_(1)
            cache[3, 1, 5, 32:] = 7
            assert views.keys.shape == views.values.shape == (4, 16, 2, 32)
            assert views.keys.eq(1).all()
            assert views.values[3, 5, 1].eq(7).all()
            assert views.statistics is not None
            assert views.statistics.data_ptr() == page.statistics_view(cache).data_ptr()


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_views_go_with_their_cache(measures: bool, inference: bool) -> None:
    """They kept vLLM's throw-away cache until the first step with the real one."""
    bound = BoundCache(measures=measures)
    # with a tail it is a view itself, which views of it would not keep alive
    cache = new_cache() if measures else torch.zeros(4, 2, 16, 64)
    with torch.inference_mode(inference):
        bound.views(cache)
        bound.views(cache)
    assert bound._views is not None
    del cache
    assert bound._views is None
