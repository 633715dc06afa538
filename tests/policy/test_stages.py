# SPDX-License-Identifier: Apache-2.0
"""The shield and the mean, on examples worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.policy.blocks import BLOCK_SIZE, config_of, full_blocks, victims_of
from tests.rows import row_of
from vllm_roco import policy
from vllm_roco.eviction_row import SHIELD_BY_DEVIATION, EvictionRow
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.kv_cache.page import MASS_SUM, NUM_QUERIES

MEANS = [0.5, 0.1, 0.2, 0.3, 0.4]
PEAKS = [0.1, 0.9, 0.8, 0.2, 0.3]
DEVIATIONS = [0.5, 0.4, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("options", "num_victims", "expected"),
    [
        pytest.param({"shield_ratio": 0}, 1, [1], id="mean alone"),
        # blocks 1 and 2 are shielded; of 0, 3 and 4 the third has the smallest mean
        pytest.param({"shield_ratio": 0.5}, 1, [3], id="peak shields two"),
        # floor(0.7 * 4) blocks: the same two
        pytest.param({"shield_ratio": 0.7}, 1, [3], id="ratio rounds down"),
        pytest.param({"shield_ratio": 0.75}, 1, [3], id="peak shields three"),
        pytest.param({"shield_ratio": 1}, 1, [0], id="peak alone"),
        # deviation shields 0 and 1; of the rest block 2 has the smallest mean
        pytest.param(
            {"shield": "deviation", "shield_ratio": 0.5}, 1, [2], id="deviation"
        ),
    ],
)
def test_two_stages(
    options: dict[str, Any], num_victims: int, expected: list[int]
) -> None:
    blocks = full_blocks(10, MEANS, deviation=DEVIATIONS, peak=PEAKS)
    config = config_of(4, **options)
    assert victims_of(blocks, 10, num_victims, config) == expected


def test_the_shield_is_cut_so_that_victims_remain() -> None:
    # one sink, three candidates, two victims: only the highest peak can be shielded
    blocks = full_blocks(8, [0.1, 0.2, 0.3, 0.4], peak=[0.9, 0.8, 0.2, 0.3])
    config = config_of(2, sink=1, shield_ratio=1)
    assert victims_of(blocks, 8, 2, config) == [2, 3]


def test_one_head_in_one_layer_saves_a_block() -> None:
    # block 0 has the smallest mean everywhere but in the last head
    mean = [
        [[0.01, 0.3, 0.3], [0.01, 0.3, 0.3]],
        [[0.01, 0.3, 0.3], [0.80, 0.1, 0.2]],
    ]
    blocks = full_blocks(6, mean)
    assert victims_of(blocks, 6, 1, config_of(2)) == [1]


def test_heads_are_compared_by_shares_not_by_size() -> None:
    # the second head's numbers are small, but block 0 is all that it looks at
    blocks = full_blocks(6, [[0.3, 0.35, 0.35], [0.04, 0.003, 0.004]])
    assert victims_of(blocks, 6, 1, config_of(2)) == [1]


def test_shares_are_of_all_full_blocks_not_of_the_candidates() -> None:
    # the incoming block takes most of the second head: among all blocks its share of
    # block 0 is small, among the candidates alone it would be the largest
    blocks = full_blocks(6, [[0.4, 0.6, 0.0], [0.3, 0.1, 0.6]])
    assert victims_of(blocks, 6, 1, config_of(1)) == [0]


def test_blocks_behind_the_dying_range_are_no_candidates() -> None:
    blocks = full_blocks(10, [0.5, 0.4, 0.3, 0.1, 0.1])
    assert victims_of(blocks, 10, 1, config_of(2)) == [2]


def test_a_block_that_many_looked_at_may_be_the_one_to_go() -> None:
    """Its sum is the largest, its mean the smallest."""
    statistics, first_positions = full_blocks(8, [0.2, 0.3, 0.4, 0.5])
    statistics[:, :, 2, MASS_SUM] = 50 * 0.1
    statistics[:, :, 2, NUM_QUERIES] = 50
    assert victims_of((statistics, first_positions), 8, 1, config_of(3)) == [2]


def test_a_request_without_shield_has_one_stage() -> None:
    blocks = full_blocks(10, MEANS, deviation=DEVIATIONS, peak=PEAKS)
    row = EvictionRow(4, 1, NEVER, 0, 0, 2, SHIELD_BY_DEVIATION, 0)
    shielded = policy.select_victims(*blocks, 10, 1, BLOCK_SIZE, row)
    assert shielded.tolist() == [2]
    alone = row._replace(shield_blocks=0)
    victims = policy.select_victims(*blocks, 10, 1, BLOCK_SIZE, alone)
    assert victims.tolist() == [1]


@pytest.mark.parametrize("shield", ["peak", "deviation"])
@pytest.mark.parametrize("ratio", [0, 0.5, 1])
@pytest.mark.parametrize(
    ("first", "expected"),
    [
        pytest.param([0, 2, 4, 6, 8, 10], [0, 1], id="in order"),
        # the resident blocks were overwritten: the oldest are in the middle
        pytest.param([8, 0, 6, 2, 10, 12], [1, 3], id="out of order"),
    ],
)
def test_ties_go_to_the_older(
    shield: str, ratio: float, first: list[int], expected: list[int]
) -> None:
    # masses that are zero have no rounding: every statistic is the same
    blocks = full_blocks(14, [0.0] * 6, first=first)
    config = config_of(4, shield=shield, shield_ratio=ratio)
    assert victims_of(blocks, 14, 2, config) == expected


def test_a_tie_in_the_shield_leaves_the_younger_shielded() -> None:
    # equal peaks: the two youngest of four are shielded, whatever their mean
    blocks = full_blocks(8, [0.3, 0.4, 0.1, 0.2], peak=[0.5] * 4, first=[6, 0, 4, 2])
    assert victims_of(blocks, 8, 1, config_of(3, shield_ratio=0.67)) == [3]


def test_a_tie_in_the_mean_goes_to_the_older_whatever_its_shield() -> None:
    # blocks 0 to 2 are exposed with equal means; the oldest has the largest peak
    blocks = full_blocks(8, [0.0] * 4, peak=[0.3, 0.1, 0.2, 0.9])
    assert victims_of(blocks, 8, 1, config_of(3, shield_ratio=0.4)) == [0]


class TestContribution:
    """The peak times the distance of values, also of the blocks beside."""

    PEAKS = (0.1, 0.9, 0.2, 0.5, 0.6)
    CONFIG = config_of(4, shield="contribution", shield_ratio=1)

    def victims(self, distances: list[float], gap: int = 0) -> list[int]:
        """Return who goes where `gap` evicted tokens lie behind block 0."""
        statistics, first_positions = full_blocks(10, MEANS, peak=list(self.PEAKS))
        first_positions[1:] += gap
        return policy.select_victims(
            statistics,
            first_positions,
            10 + gap,
            1,
            BLOCK_SIZE,
            row_of(self.CONFIG, BLOCK_SIZE),
            torch.tensor(distances).expand(*statistics.shape[:2], -1),
        ).tolist()

    def test_values_like_all_others_are_no_loss(self) -> None:
        assert self.victims([9.0, 1.0, 1.0, 1.0, 0.1]) == [4]

    def test_blocks_beside_it_in_the_text_are_shielded(self) -> None:
        # block 1 lends 0.675 to 0 and 2, and 3 lends to nobody who has less
        assert self.victims([1.0] * 5) == [3]

    def test_blocks_beside_it_in_the_table_are_not(self) -> None:
        assert self.victims([1.0] * 5, gap=BLOCK_SIZE) == [0]

    def test_in_any_live_order(self) -> None:
        values = torch.tensor([0.1, 0.8, 0.2])
        first_positions = torch.tensor([16.0, 64.0, 48.0])
        lent = policy.with_neighbours(values, first_positions, 16)
        torch.testing.assert_close(lent, torch.tensor([0.1, 0.8, 0.6]))

    def test_distances_by_hand(self) -> None:
        """Means (1, 0), (4, 4) and (1, 2) lie round (2, 2)."""
        values = torch.tensor(
            [[[0.0, 0.0], [2.0, 0.0]], [[4.0, 3.0], [4.0, 5.0]], [[1.0, 2.0]] * 2]
        )
        torch.testing.assert_close(
            policy.value_distances(values), torch.tensor([5**0.5, 8**0.5, 1.0])
        )
