# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from vllm_roco.attention.bound_caches import CacheViews, WhileBound
from vllm_roco.kv_cache import page

SHAPE = page.PageShape(num_kv_heads=2, head_size=32, has_statistics=True)


def new_cache() -> torch.Tensor:
    """Return four pages of 16 tokens, as vLLM cuts them out of raw memory."""
    size = SHAPE.page_bytes(16, torch.float16) // torch.float16.itemsize
    raw = torch.arange(4 * size, dtype=torch.int16).view(torch.float16)
    return raw.as_strided((4, 1, 1, size), (size, size, size, 1))


@pytest.mark.parametrize("inference", [False, True])
def test_views_show_the_cache_that_is_bound(inference: bool) -> None:
    bound = WhileBound(partial(CacheViews.of, shape=SHAPE))
    with torch.inference_mode(inference):
        for cache in (new_cache(), new_cache()):
            views = bound.of(cache)
            assert bound.of(cache) is views
            cache.fill_(1)
            views.states[3, 1, 5, 32:] = 7
            assert views.states.shape == (4, 2, 16, 64)
            assert views.states.data_ptr() == cache.data_ptr()
            assert views.keys.shape == views.values.shape == (4, 16, 2, 32)
            assert views.keys.eq(1).all()
            assert views.values[3, 5, 1].eq(7).all()
            assert views.statistics is not None
            tail = page.statistics_view(views.states)
            assert views.statistics.data_ptr() == tail.data_ptr()
            assert views.first_positions is not None
            positions = page.first_positions_view(views.states)
            assert views.first_positions.data_ptr() == positions.data_ptr()
            assert cache[3, 0, 0].eq(7).sum() == 32


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_views_go_with_their_cache(measures: bool, inference: bool) -> None:
    """They kept vLLM's throw-away cache until the first step with the real one."""
    shape = replace(SHAPE, has_statistics=measures)
    bound = WhileBound(partial(CacheViews.of, shape=shape))
    # with a tail it is a view itself, which views of it would not keep alive
    cache = new_cache() if measures else torch.zeros(4, 1, 1, 2 * 16 * 64)
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
