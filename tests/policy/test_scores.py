# SPDX-License-Identifier: Apache-2.0
"""What counts as small in the second stage is the row's choice."""

from __future__ import annotations

import pytest
import torch

from tests.policy.blocks import BLOCK_SIZE, full_blocks
from vllm_roco import policy
from vllm_roco.eviction_row import (
    SCORE_MEAN,
    SCORE_NONE,
    SCORE_RANDOM,
    SCORE_SUM,
    EvictionRow,
)
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.kv_cache.page import MASS_SUM, NUM_FIELDS


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        pytest.param(SCORE_MEAN, [3], id="mean"),
        # the older a block is, the more queries its sum is of
        pytest.param(SCORE_SUM, [4], id="sum"),
        pytest.param(SCORE_NONE, [0], id="none"),
        # 5328424, 906929, 15203534, 7162006, 7992783
        pytest.param(SCORE_RANDOM, [1], id="random"),
    ],
)
def test_the_second_stage_is_the_row_s_choice(score: int, expected: list[int]) -> None:
    blocks = full_blocks(10, [0.3, 0.4, 0.5, 0.15, 0.2])
    row = EvictionRow(4, 1, NEVER, 0, 0, 0, score, 1)
    victims = policy.select_victims(*blocks, 10, 1, BLOCK_SIZE, row)
    assert victims.tolist() == expected


def test_the_sum_has_its_share_of_each_head() -> None:
    statistics, first_positions = full_blocks(6, [[0.3, 0.3, 0.3], [0.3, 0.3, 0.3]])
    statistics[0, :, :, MASS_SUM] = torch.tensor([[5.0, 6.0, 4.0], [0.1, 0.1, 0.3]])
    row = EvictionRow(2, 1, NEVER, 0, 0, 0, SCORE_SUM, 0)
    victims = policy.select_victims(statistics, first_positions, 6, 1, BLOCK_SIZE, row)
    assert victims.tolist() == [0]


# by the definition in Python's whole numbers
GOLDEN = {
    0: [0.0, 14252943.0, 14297142.0, 12100501.0],
    1: [5328424.0, 2046132.0, 11787548.0, 15958839.0],
    2147483647: [16370702.0, 7710495.0, 3973814.0, 7312461.0],
}


def test_random_order_by_values_worked_out_elsewhere() -> None:
    first = torch.tensor([0.0, 16.0, 32.0, 131072.0])
    for seed, expected in GOLDEN.items():
        order = policy.random_order(first, seed)
        assert order.dtype == torch.float32
        assert order.tolist() == expected


def test_random_keeps_a_sample_that_does_not_depend_on_the_steps() -> None:
    """A block has its number for ever, so who is left has the largest of all."""
    row = EvictionRow(8, 1, NEVER, 0, 0, 0, SCORE_RANDOM, 5)
    kept: list[int] = []
    for arrived in ([*range(8)], [*range(8, 9)], [*range(9, 30)], [*range(30, 200)]):
        kept += arrived
        first = torch.tensor(kept, dtype=torch.float32) * BLOCK_SIZE
        count = len(kept) - 8
        statistics = torch.zeros(1, 1, len(kept), NUM_FIELDS)
        victims = policy.select_victims(
            statistics, first, 400, count, BLOCK_SIZE, row
        ).tolist()
        kept = [block for place, block in enumerate(kept) if place not in victims]
    order = policy.random_order(torch.arange(200) * float(BLOCK_SIZE), 5)
    assert sorted(kept) == sorted(order.argsort()[-8:].tolist())
