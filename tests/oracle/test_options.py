# SPDX-License-Identifier: Apache-2.0
"""How many blocks go and when, against examples counted by hand."""

import dataclasses
from typing import Any

import pytest

from tests.oracle import Options

# blocks of 4, 6 resident, 2 a stride
SMALL = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.5,
    budget=24,
    stride=8,
    chunk=20,
    sink=3,
    recent=6,
    block_size=4,
)


@pytest.mark.parametrize(
    ("num_computed_tokens", "expected"),
    [(0, 0), (24, 0), (31, 0), (32, 2), (39, 2), (40, 4), (47, 4), (100, 18)],
)
def test_evicted_blocks(num_computed_tokens: int, expected: int) -> None:
    """The first two go when 8 blocks are full."""
    assert SMALL.evicted_blocks(num_computed_tokens) == expected


@pytest.mark.parametrize(
    ("until", "expected"), [(0, 0), (31, 0), (32, 2), (41, 4), (200, 18)]
)
def test_nothing_more_goes_from_a_length_on(until: int, expected: int) -> None:
    options = dataclasses.replace(SMALL, evicts_until=until)
    assert options.evicted_blocks(100) == expected
    assert options.evicted_blocks(30) == 0


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_new_tokens", "expected"),
    [
        (50, 3, [(0, 20), (20, 40), (40, 50), (50, 51), (51, 52)]),
        (40, 2, [(0, 20), (20, 40), (40, 41)]),
        (1, 1, [(0, 1)]),
    ],
)
def test_steps(
    num_prompt_tokens: int,
    max_new_tokens: int,
    expected: list[tuple[int, int]],
) -> None:
    steps = SMALL.step_ends(num_prompt_tokens, max_new_tokens)
    assert list(steps) == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("policy", "lru", "policy is 'lru'"),
        ("shield", "mean", "shield is 'mean'"),
        ("shield_ratio", 1.5, "shield_ratio is 1.5"),
        ("budget", 26, "budget is 26; allowed: a positive multiple of"),
        ("stride", 0, "stride is 0"),
        ("chunk", 2, "chunk is 2"),
        ("recent", -1, "recent is -1"),
        ("recent", 21, r"sink \+ recent is '7 blocks'"),
    ],
)
def test_bad_options_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})
