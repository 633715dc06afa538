# SPDX-License-Identifier: Apache-2.0
"""Scores, candidates and victims, against examples worked out by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from tests.oracle import Options
from tests.oracle.victims import (
    Block,
    block_number,
    choose_victims,
    find_candidates,
    score_blocks,
)

# 5 resident blocks and 1 outgoing; the shield holds floor(0.5 * 5) = 2 blocks
HAND = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.5,
    budget=20,
    stride=4,
    chunk=4,
    sink=4,
    recent=4,
    block_size=4,
)


def hand_block(
    index: int, mean: float = 0.1, deviation: float = 0.1, peak: float = 0.1
) -> Block:
    """A block of 4 tokens once 64 tokens are computed."""
    return Block(index, 64 - 4 * index, mean, deviation, peak)


BY_CONTRIBUTION = dataclasses.replace(HAND, shield="contribution", shield_ratio=1.0)


def contributors(*contributions: float) -> list[Block]:
    """Blocks 1, 2 and so on."""
    return [
        dataclasses.replace(hand_block(1 + i), contribution=contribution)
        for i, contribution in enumerate(contributions)
    ]


class TestScores:
    def test_scores_by_hand(self) -> None:
        """Two heads, two blocks seen by 4 and 2 queries.

        Means: head 0 has 1/2 and 1/4, shares 2/3 and 1/3; head 1 1/4 and 3/4, shares
        1/4 and 3/4: M = 2/3, 3/4. Variances: head 0 has 1/2 - 1/4 = 1/4 and
        1/8 - 1/16 = 1/16, deviations 1/2 and 1/4; head 1 has 1/16 - 1/16 = 0 and
        13/16 - 9/16 = 1/4, deviations 0 and 1/2: D = 2/3, 1. Peaks: head 0 has 3/5 and
        2/5 of its sum, head 1 1/9 and 8/9: P = 3/5, 8/9.
        """
        blocks = score_blocks(
            [3, 5],
            torch.tensor([4, 2]),
            torch.tensor([[2.0, 0.5], [1.0, 1.5]]),
            torch.tensor([[2.0, 0.25], [0.25, 1.625]]),
            torch.tensor([[0.6, 0.4], [0.1, 0.8]]),
        )
        assert [block.index for block in blocks] == [3, 5]
        assert [block.queries_seen for block in blocks] == [4, 2]
        assert [block.mean for block in blocks] == pytest.approx([2 / 3, 3 / 4])
        assert [block.deviation for block in blocks] == pytest.approx([2 / 3, 1])
        assert [block.peak for block in blocks] == pytest.approx([3 / 5, 8 / 9])
        # sums: head 0 has 2 and 1/2, head 1 has 1 and 3/2
        assert [block.total for block in blocks] == pytest.approx([4 / 5, 3 / 5])

    def test_a_head_without_deviation_says_nothing(self) -> None:
        blocks = score_blocks(
            [0, 1],
            torch.tensor([2, 2]),
            torch.tensor([[1.0, 1.0]]),
            torch.tensor([[0.5, 0.5]]),
            torch.tensor([[0.5, 0.5]]),
        )
        assert [block.deviation for block in blocks] == [0, 0]

    def test_a_variance_rounded_below_zero_counts_as_zero(self) -> None:
        blocks = score_blocks(
            [0, 1],
            torch.tensor([2, 2]),
            torch.tensor([[1.0, 1.0]]),
            torch.tensor([[0.4999, 0.6]]),
            torch.tensor([[0.5, 0.5]]),
        )
        assert [block.deviation for block in blocks] == [0, 1]


class TestCandidates:
    def test_sink_recent_and_incoming_blocks_may_not_go(self) -> None:
        """32 tokens: E = 3, so blocks from 5 + 3 = 8 on are incoming, none here.

        Block 0 is the sink and block 7 holds the newest 4 tokens.
        """
        blocks = [hand_block(index) for index in range(8)]
        candidates = find_candidates(blocks, 32, HAND)
        assert [block.index for block in candidates] == [1, 2, 3, 4, 5, 6]

    def test_part_of_a_block_protects_the_whole(self) -> None:
        """5 sink tokens reach into block 1; of 34 tokens the newest 7 into block 6.

        With a stride of 8, E(34) = 2: blocks from 7 on are incoming.
        """
        options = dataclasses.replace(HAND, sink=5, recent=7, stride=8)
        blocks = [hand_block(index) for index in range(8)]
        candidates = find_candidates(blocks, 34, options)
        assert [block.index for block in candidates] == [2, 3, 4, 5]

    def test_incoming_blocks_may_not_go_even_unprotected(self) -> None:
        options = dataclasses.replace(HAND, sink=0, recent=0, stride=8)
        blocks = [hand_block(index) for index in range(8)]
        candidates = find_candidates(blocks, 34, options)
        assert [block.index for block in candidates] == [0, 1, 2, 3, 4, 5, 6]


class TestVictims:
    # of blocks that do not touch each other
    # index:      2     4     6     8    10    12
    MEANS = (0.05, 0.10, 0.02, 0.30, 0.01, 0.20)
    DEVIATIONS = (0.40, 0.01, 0.02, 0.03, 0.04, 0.30)
    PEAKS = (0.10, 0.20, 0.50, 0.15, 0.60, 0.05)

    @pytest.fixture
    def candidates(self) -> list[Block]:
        columns = zip(self.MEANS, self.DEVIATIONS, self.PEAKS, strict=True)
        return [hand_block(2 + 2 * i, *column) for i, column in enumerate(columns)]

    @pytest.mark.parametrize(
        ("changes", "num_victims", "expected"),
        [
            # blocks 10 and 6 peak highest; of the others block 2 has the smallest mean
            pytest.param({}, 1, (2,), id="peak"),
            pytest.param({}, 2, (2, 4), id="peak-two"),
            # blocks 2 and 12 deviate most; of the others block 10 has the smallest mean
            pytest.param({"shield": "deviation"}, 1, (10,), id="deviation"),
            pytest.param({"shield": "deviation"}, 3, (4, 6, 10), id="deviation-three"),
            # one block is shielded at floor(0.39 * 5), and it is block 10
            pytest.param({"shield_ratio": 0.39}, 1, (6,), id="floor"),
            pytest.param({"shield_ratio": 0.0}, 2, (6, 10), id="mean-alone"),
            # the shield is cut to 5 and to 4 blocks: the smallest peaks go
            pytest.param({"shield_ratio": 1.0}, 1, (12,), id="shield-alone"),
            pytest.param({"shield_ratio": 1.0}, 2, (2, 12), id="shield-alone-two"),
            pytest.param({}, 6, (2, 4, 6, 8, 10, 12), id="all"),
            pytest.param({"policy": "recent"}, 2, (2, 4), id="recent"),
        ],
    )
    def test_by_hand(
        self,
        candidates: list[Block],
        changes: dict[str, Any],
        num_victims: int,
        expected: tuple[int, ...],
    ) -> None:
        options = dataclasses.replace(HAND, **changes)
        for order in (candidates, candidates[::-1]):
            assert choose_victims(order, num_victims, options).victims == expected

    def test_margin_by_hand(self, candidates: list[Block]) -> None:
        """Shield: 0.5 stays and 0.2 is exposed, a gap of 0.6; mean: 0.05 and 0.1."""
        assert choose_victims(candidates, 1, HAND).margin == pytest.approx(0.5)

    def test_margin_of_the_shield(self, candidates: list[Block]) -> None:
        """Both of two exposed blocks go: peaks 0.15 and 0.1 divide them."""
        options = dataclasses.replace(HAND, shield_ratio=1.0)
        choice = choose_victims(candidates, 2, options)
        assert choice.margin == pytest.approx(1 / 3)

    def test_a_contribution_shields_those_beside_it(self) -> None:
        """Block 3 lends 0.75 * 0.4 to 2 and 4; 1 and 6 keep theirs, 5 gets 0.225."""
        blocks = contributors(0.1, 0.05, 0.4, 0.2, 0.01, 0.3)
        choice = choose_victims(blocks, 2, BY_CONTRIBUTION)
        assert choice.victims == (1, 5)
        # 0.225 goes, the next that block 6 does not lend is 0.3
        assert choice.margin == pytest.approx(0.25)

    def test_a_block_that_may_not_go_lends_as_well(self) -> None:
        *blocks, newest = contributors(0.1, 0.1, 0.1, 0.8)
        choice = choose_victims(blocks, 2, BY_CONTRIBUTION, [newest])
        assert choice.victims == (1, 2)

    def test_what_one_block_lends_is_no_near_choice(self) -> None:
        """Blocks 1 and 3 have 0.75 of block 2's, and the older one goes."""
        choice = choose_victims(contributors(0.1, 0.8, 0.1), 1, BY_CONTRIBUTION)
        assert choice.victims == (1,)
        assert choice.margin == math.inf

    def test_equal_means_go_oldest_first(self) -> None:
        options = dataclasses.replace(HAND, shield_ratio=0.0)
        blocks = [hand_block(index) for index in (6, 3, 1, 2, 5, 4)]
        choice = choose_victims(blocks, 2, options)
        assert choice.victims == (1, 2)
        assert choice.margin == 0

    def test_of_equal_peaks_the_older_stays_exposed(self) -> None:
        """All peak alike: the newest two, 5 and 6, are shielded despite their means."""
        means = (0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
        blocks = [hand_block(1 + i, mean=mean) for i, mean in enumerate(means)]
        assert choose_victims(blocks, 1, HAND).victims == (4,)

    def test_sums_alone_decide_for_h2o(self) -> None:
        """Shares of sums 0.2, 0.05, 0.4, 0.1; neither mean nor peak counts."""
        options = dataclasses.replace(HAND, policy="h2o")
        totals = (0.2, 0.05, 0.4, 0.1)
        blocks = [
            dataclasses.replace(hand_block(1 + i, mean=1 - total), total=total)
            for i, total in enumerate(totals)
        ]
        choice = choose_victims(blocks, 1, options)
        assert choice.victims == (2,)
        assert choice.margin == pytest.approx(0.5)
        assert choose_victims(blocks, 2, options).victims == (2, 4)

    def test_a_number_of_its_own_decides_at_random(self) -> None:
        """Of 0, 16, 32: 5,328,424, 2,046,132 and 11,787,548 with seed 1."""
        numbers = [block_number(position, 1) for position in (0, 16, 32)]
        assert numbers == [5_328_424, 2_046_132, 11_787_548]
        options = dataclasses.replace(HAND, policy="random", seed=1)
        blocks = [hand_block(index) for index in (8, 4, 0)]
        choice = choose_victims(blocks, 1, options)
        assert choice.victims == (4,)
        assert choice.margin == math.inf

    def test_recent_has_no_near_ties(self, candidates: list[Block]) -> None:
        options = dataclasses.replace(HAND, policy="recent")
        assert choose_victims(candidates, 2, options).margin == math.inf

    def test_too_few_candidates_are_an_error(self, candidates: list[Block]) -> None:
        with pytest.raises(RuntimeError, match="7 blocks must go, but only 6 may"):
            choose_victims(candidates, 7, HAND)
