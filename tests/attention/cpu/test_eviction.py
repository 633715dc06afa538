# SPDX-License-Identifier: Apache-2.0
"""Closing a step of one sequence, on pages whose numbers are chosen by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kv_cache.specs import bind_states, one_group, roco_spec
from tests.rows import row_of
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.attention.cpu.eviction import evict
from vllm_roco.attention.cpu.metadata import sequences_of
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.page import (
    MASS_PEAK,
    MASS_SUM,
    NUM_QUERIES,
    first_positions_view,
    page_view,
    statistics_view,
)

SIZE = 16
# block ids of the logical blocks 0 to 6; the pool has 10
ROW = [7, 2, 9, 4, 1, 8, 3]


def caches_of(
    mean: list[list[float]], num_tokens: int, layout: Any, **options: Any
) -> tuple[list[torch.Tensor], RocoConfig]:
    """Return caches whose page of block `b` holds `b`, with the given mean masses.

    Args:
        mean: By layer and logical block; the same for both kv heads.
        num_tokens: Length of the sequence.
        layout: Of the cache.
        **options: Options of RoCo.
    """
    spec = roco_spec(budget=4 * SIZE, stride=SIZE, **options)
    caches = bind_states(one_group(spec, 10, len(mean)), layout)
    for cache, means in zip(caches, mean, strict=True):
        for logical, mass in enumerate(means):
            page = ROW[logical]
            cache[page] = page
            if not spec.has_statistics:
                continue
            statistics = statistics_view(cache)[page]
            statistics.zero_()
            first_positions_view(cache)[page] = logical * SIZE
            num_queries = num_tokens - logical * SIZE
            statistics[:, NUM_QUERIES] = num_queries
            statistics[:, MASS_SUM] = mass * num_queries
            statistics[:, MASS_PEAK] = mass
    defaults = {"budget": 4 * SIZE, "stride": SIZE, "sink": 0, "recent": 0}
    no_shield = {"shield": "peak", "shield_ratio": 0}
    return caches, RocoConfig(**{**defaults, **no_shield, **options})


def close(
    caches: list[torch.Tensor], config: RocoConfig, num_queries: int, num_tokens: int
) -> list[list[float]]:
    """Evict, and return by layer what the pages of the row hold."""
    (sequence,) = sequences_of(
        [0, num_queries],
        [num_tokens],
        torch.tensor([ROW]),
        [row_of(config, SIZE)],
        SIZE,
    )
    evict(sequence, caches, SIZE, measured=config.measures)
    held = []
    for cache in caches:
        pages = [cache[page] for page in ROW[: -(-num_tokens // SIZE)]]
        assert all((page == page[0, 0, 0]).all() for page in pages)
        held.append([page[0, 0, 0].item() for page in pages])
    return held


layouts = pytest.mark.parametrize(
    "layout", RocoBackend.supported_kv_cache_layouts(), ids=lambda layout: layout.name
)


@layouts
def test_a_survivor_of_the_dying_range_goes_over_the_victim(layout: Any) -> None:
    """Block 1 is weak in every layer; the outgoing block 4 takes its page."""
    mean = [[0.3, 0.1, 0.3, 0.2, 0.4], [0.2, 0.1, 0.3, 0.3, 0.3]]
    caches, config = caches_of(mean, 80, layout)
    held = close(caches, config, num_queries=1, num_tokens=80)
    assert held == [[7, 1, 9, 4, 1]] * 2
    for cache in caches:
        statistics = statistics_view(cache)
        assert torch.equal(statistics[2], statistics[1])
        assert (statistics[2, :, NUM_QUERIES] == 80 - 64).all()
        assert first_positions_view(cache)[2] == 64


@layouts
def test_nothing_moves_when_the_dying_range_is_the_weakest(layout: Any) -> None:
    mean = [[0.3, 0.2, 0.3, 0.2, 0.1]]
    caches, config = caches_of(mean, 80, layout)
    before = page_view(caches[0])[ROW[:5]].clone()
    close(caches, config, num_queries=1, num_tokens=80)
    after = page_view(caches[0])[ROW[:5]]
    assert torch.equal(before.view(torch.int32), after.view(torch.int32))


@layouts
def test_one_layer_is_enough_to_keep_a_block(layout: Any) -> None:
    """The layers decide together: none keeps a block that another gave up."""
    mean = [[0.3, 0.01, 0.3, 0.2, 0.2], [0.1, 0.8, 0.05, 0.3, 0.3]]
    caches, config = caches_of(mean, 80, layout)
    assert close(caches, config, num_queries=1, num_tokens=80) == [[7, 2, 9, 1, 1]] * 2


@layouts
def test_several_blocks_move_in_one_step(layout: Any) -> None:
    mean = [[0.3, 0.01, 0.02, 0.4, 0.5, 0.03, 0.6]]
    caches, config = caches_of(mean, 112, layout)
    held = close(caches, config, num_queries=40, num_tokens=112)
    # blocks 4 and 6 of the outgoing blocks go over 1 and 2; 5 is the third victim
    assert held == [[7, 1, 3, 4, 1, 8, 3]]


@layouts
def test_a_block_in_part_filled_is_no_candidate(layout: Any) -> None:
    """Its statistics say little; it is not even read."""
    mean = [[0.3, 0.2, 0.3, 0.2, 0.4]]
    caches, config = caches_of(mean, 85, layout)
    caches[0][ROW[5]] = 8.0
    statistics_view(caches[0])[ROW[5]] = torch.nan
    first_positions_view(caches[0])[ROW[5]] = torch.nan
    assert close(caches, config, num_queries=10, num_tokens=85) == [[7, 1, 9, 4, 1, 8]]


@layouts
def test_recent_needs_no_statistics(layout: Any) -> None:
    caches, config = caches_of([[0.0] * 5] * 2, 80, layout, policy="recent", sink=16)
    assert close(caches, config, num_queries=1, num_tokens=80) == [[7, 1, 9, 4, 1]] * 2
