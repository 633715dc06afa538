# SPDX-License-Identifier: Apache-2.0
"""The first and the newest tokens are never candidates."""

from __future__ import annotations

import pytest

from tests.policy.blocks import config_of, full_blocks, victims_of


@pytest.mark.parametrize(
    ("sink", "recent", "num_tokens", "expected"),
    [
        pytest.param(0, 0, 12, [0], id="nothing protected"),
        pytest.param(1, 0, 12, [1], id="a sink takes its whole block"),
        pytest.param(2, 0, 12, [1], id="a sink of one block"),
        pytest.param(3, 0, 12, [2], id="a sink of a block and a token"),
        pytest.param(0, 1, 12, [0], id="recent does not reach the smallest"),
    ],
)
def test_sinks_are_protected(
    sink: int, recent: int, num_tokens: int, expected: list[int]
) -> None:
    blocks = full_blocks(num_tokens, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    config = config_of(5, sink=sink, recent=recent)
    assert victims_of(blocks, num_tokens, 1, config) == expected


@pytest.mark.parametrize(
    ("recent", "num_tokens", "expected"),
    [
        pytest.param(0, 12, [5], id="nothing protected"),
        pytest.param(1, 12, [4], id="the newest token protects its block"),
        pytest.param(2, 12, [4], id="a whole block"),
        pytest.param(3, 12, [3], id="a block and a token"),
        # the newest token lies in a block that is not full
        pytest.param(1, 13, [5], id="an incoming token"),
        pytest.param(2, 13, [4], id="an incoming token and one before"),
    ],
)
def test_the_newest_tokens_are_protected(
    recent: int, num_tokens: int, expected: list[int]
) -> None:
    blocks = full_blocks(num_tokens, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    config = config_of(5, recent=recent)
    assert victims_of(blocks, num_tokens, 1, config) == expected


def test_protection_follows_the_token_not_the_place() -> None:
    # the first token's block lies last, the newest first
    blocks = full_blocks(8, [0.1, 0.4, 0.3, 0.1], first=[6, 2, 4, 0])
    assert victims_of(blocks, 8, 1, config_of(3, sink=1, recent=1)) == [2]


def test_everything_but_the_victims_may_be_protected() -> None:
    blocks = full_blocks(8, [0.1, 0.9, 0.8, 0.2])
    config = config_of(2, sink=2, recent=2, shield_ratio=1)
    assert victims_of(blocks, 8, 2, config) == [1, 2]
