# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other, between two processes."""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import get_world_group, init_distributed_environment

from tests.attention.rig import config_for
from tests.rows import row_of
from vllm_roco import policy
from vllm_roco.attention.tensor_ranks import (
    TensorRanks,
    num_agreeing_ranks,
    tensor_ranks,
)
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.kv_cache.page import NUM_FIELDS

SIZE = 2


def config_of(size: int, **options: Any) -> Any:
    config = config_for(options)
    config.parallel_config = copy.copy(config.parallel_config)
    config.parallel_config.tensor_parallel_size = size
    return config


def told_by(rank: int) -> torch.Tensor:
    """Return `[3, 5]`, of which each rank has some of the largest."""
    return torch.rand(3, 5, generator=torch.Generator().manual_seed(rank))


Numbers = list[list[float]]
ROWS = [
    row_of(
        RocoConfig(budget=256, stride=64, recent=16, shield=shield, shield_ratio=ratio),
        16,
    )
    for shield in ("contribution", "peak", "deviation")
    for ratio in (0.5, 1.0)
]


def victims_of(
    row: EvictionRow, heads: slice, any_rank: Any = policy.of_one_rank
) -> list[int]:
    """Return who goes of twenty blocks, as seen by some of four heads."""
    generator = torch.Generator().manual_seed(5)
    statistics = torch.rand(3, 4, 20, NUM_FIELDS, generator=generator)
    distances = torch.rand(3, 4, 20, generator=generator)
    first = torch.arange(20.0) * 16
    return policy.select_victims(
        *(statistics[:, heads], first, 20 * 16, 4, 16, row, distances[:, heads]),
        any_rank,
    ).tolist()


def take_part(rank: int, store: Path) -> tuple[list[Numbers], Numbers, list[list[int]]]:
    torch.set_num_threads(1)
    with set_current_vllm_config(config_of(SIZE)):
        init_distributed_environment(SIZE, rank, f"file://{store}", rank, "gloo")
    # that of an engine's tensor ranks is another of vLLM's, of the same class
    ranks = TensorRanks(get_world_group())
    assert (len(ranks), ranks.own) == (SIZE, rank)
    numbers = torch.full((SIZE, 3, 5), torch.nan)
    numbers[rank] = told_by(rank)
    ranks.gather(numbers)
    heads = slice(2 * rank, 2 * rank + 2)
    victims = [victims_of(row, heads, ranks.most) for row in ROWS]
    # not as tensors, whose memory goes with this process
    return numbers.tolist(), ranks.most(told_by(rank)).tolist(), victims


def test_every_rank_hears_all(tmp_path: Path) -> None:
    # a child that imports vLLM anew takes ten times as long
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(SIZE, context) as pool:
        heard = [*pool.map(take_part, range(SIZE), [tmp_path / "store"] * SIZE)]
    told = torch.stack([told_by(rank) for rank in range(SIZE)])
    victims = [victims_of(row, slice(4)) for row in ROWS]
    # by its own heads a rank chooses otherwise
    assert victims != [victims_of(row, slice(2)) for row in ROWS]
    assert heard == [(told.tolist(), told.amax(0).tolist(), victims)] * SIZE


@pytest.mark.parametrize(
    ("size", "options", "agreeing"),
    [
        (1, {}, 1),
        (4, {}, 4),
        (4, {"agree": False}, 1),
        # nothing is measured
        (4, {"policy": "recent"}, 1),
    ],
)
def test_who_chooses_together(
    size: int, options: dict[str, Any], agreeing: int
) -> None:
    config = config_of(size, **options)
    assert num_agreeing_ranks(config, RocoConfig(**options)) == agreeing
    if agreeing == 1:
        assert tensor_ranks(config, RocoConfig(**options)) is None
