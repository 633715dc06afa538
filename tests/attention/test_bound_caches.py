# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial

import pytest
import torch

from vllm_roco.attention.bound_caches import CacheViews, WhileBound
from vllm_roco.kv_cache import page


def new_cache() -> torch.Tensor:
    """Return `[4, 2, 16, 64]` with a tail, as vLLM cuts it out of raw memory."""
    tail = page.statistics_bytes(2) // torch.float16.itemsize
    size = 2 * 16 * 64 + tail
    raw = torch.arange(4 * size, dtype=torch.int16).view(torch.float16)
    return raw.as_strided((4, 2, 16, 64), (size, 16 * 64, 64, 1))


@pytest.mark.parametrize("inference", [False, True])
def test_views_show_the_cache_that_is_bound(inference: bool) -> None:
    bound = WhileBound(partial(CacheViews.of, measures=True))
    with torch.inference_mode(inference):
        for cache in (new_cache(), new_cache()):
            views = bound.of(cache)
            assert bound.of(cache) is views
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
    bound = WhileBound(partial(CacheViews.of, measures=measures))
    # with a tail it is a view itself, which views of it would not keep alive
    cache = new_cache() if measures else torch.zeros(4, 2, 16, 64)
    with torch.inference_mode(inference):
        bound.of(cache)
        bound.of(cache)
    assert bound._made is not None
    del cache
    assert bound._made is None


def test_what_was_made_of_several_goes_with_any_of_them() -> None:
    bound = WhileBound(lambda *caches: [cache.data_ptr() for cache in caches])
    first, second, third = new_cache(), new_cache(), new_cache()
    made = bound.of(first, second)
    assert bound.of(first, second) is made
    assert bound.of(first, third) == [first.data_ptr(), third.data_ptr()]
    assert bound.of(first) == [first.data_ptr()]
    bound.of(first, third)
    del second
    assert bound._made is not None
    del third
    assert bound._made is None
