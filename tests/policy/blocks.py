# SPDX-License-Identifier: Apache-2.0
"""Blocks with given statistics, and those of them that go."""

from __future__ import annotations

from typing import Any

import torch

from tests.rows import row_of
from vllm_roco import policy
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.page import (
    MASS_PEAK,
    MASS_SQUARES,
    MASS_SUM,
    NUM_FIELDS,
    NUM_QUERIES,
)

BLOCK_SIZE = 2

Blocks = tuple[torch.Tensor, torch.Tensor]
"""Statistics `[layers, heads, blocks, fields]`, first positions `[blocks]`."""


def config_of(budget_blocks: int, **options: Any) -> RocoConfig:
    """Return options that protect and shield nothing unless they are told to."""
    defaults: dict[str, Any] = {
        "stride": BLOCK_SIZE,
        "sink": 0,
        "recent": 0,
        "shield": "peak",
    }
    return RocoConfig(
        budget=budget_blocks * BLOCK_SIZE, **{**defaults, "shield_ratio": 0, **options}
    )


def full_blocks(
    num_computed_tokens: int,
    mean: list[Any],
    *,
    deviation: list[Any] | None = None,
    peak: list[Any] | None = None,
    first: list[int] | None = None,
) -> Blocks:
    """Return full blocks whose moments are the given ones.

    Args:
        num_computed_tokens: Length after the step, whose queries alone saw the blocks.
        mean: By block, by head and block, or by layer, head and block.
        deviation: Likewise; zero if left out.
        peak: Likewise; zero if left out.
        first: Position of each block's first token; ascending if left out.
    """
    means = torch.tensor(mean, dtype=torch.float32)
    means = means.expand((1,) * (3 - means.dim()) + means.shape)

    def like_means(values: list[Any] | None) -> torch.Tensor:
        return torch.tensor(values or [0.0], dtype=torch.float32).expand_as(means)

    positions = first or [BLOCK_SIZE * block for block in range(means.shape[-1])]
    statistics = torch.empty(*means.shape, NUM_FIELDS)
    first_positions = torch.tensor(positions, dtype=torch.float32)
    count = num_computed_tokens - first_positions
    statistics[..., NUM_QUERIES] = count
    statistics[..., MASS_SUM] = means * count
    squares = like_means(deviation).square() + means.square()
    statistics[..., MASS_SQUARES] = squares * count
    statistics[..., MASS_PEAK] = like_means(peak)
    return statistics, first_positions


def victims_of(
    blocks: Blocks,
    num_computed_tokens: int,
    num_victims: int,
    config: RocoConfig,
) -> list[int]:
    """Return the places of the blocks that go, for a request without options."""
    victims = policy.select_victims(
        *blocks,
        num_computed_tokens,
        num_victims,
        BLOCK_SIZE,
        row_of(config, BLOCK_SIZE),
    )
    assert victims.dtype == torch.int64
    return victims.tolist()
