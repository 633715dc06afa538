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
from vllm_roco.attention.tensor_ranks import (
    TensorRanks,
    num_agreeing_ranks,
    tensor_ranks,
)
from vllm_roco.config import RocoConfig

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


def take_part(rank: int, store: Path) -> tuple[list[Numbers], Numbers]:
    torch.set_num_threads(1)
    with set_current_vllm_config(config_of(SIZE)):
        init_distributed_environment(SIZE, rank, f"file://{store}", rank, "gloo")
    # that of an engine's tensor ranks is another of vLLM's, of the same class
    ranks = TensorRanks(get_world_group())
    assert (len(ranks), ranks.own) == (SIZE, rank)
    numbers = torch.full((SIZE, 3, 5), torch.nan)
    numbers[rank] = told_by(rank)
    ranks.gather(numbers)
    # not as tensors, whose memory goes with this process
    return numbers.tolist(), ranks.most(told_by(rank)).tolist()


def test_every_rank_hears_all(tmp_path: Path) -> None:
    # a child that imports vLLM anew takes ten times as long
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(SIZE, context) as pool:
        heard = [*pool.map(take_part, range(SIZE), [tmp_path / "store"] * SIZE)]
    told = torch.stack([told_by(rank) for rank in range(SIZE)])
    assert heard == [(told.tolist(), told.amax(0).tolist())] * SIZE


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
