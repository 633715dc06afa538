# SPDX-License-Identifier: Apache-2.0
"""Each option changes what it is for, in the row or in the chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.request_options.planning import PLANNER, plan, row
from vllm_roco.eviction_row import (
    SCORE_MEAN,
    SCORE_NONE,
    SCORE_RANDOM,
    SCORE_SUM,
    SHIELD_BY_CONTRIBUTION,
    SHIELD_BY_DEVIATION,
)
from vllm_roco.request_options.error import RequestOptionError


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"budget": 128}, {"resident_blocks": 8, "shield_blocks": 4}),
        ({"budget": 512}, {"resident_blocks": 32, "shield_blocks": 16}),
        ({"stride": 16}, {"stride_blocks": 1}),
        ({"stride": 320}, {"stride_blocks": 20}),
        ({"sink": 0}, {"sink": 0}),
        ({"recent": 100}, {"recent": 100}),
        ({"shield": "deviation"}, {"flags": SCORE_MEAN | SHIELD_BY_DEVIATION}),
        ({"shield": "contribution"}, {"flags": SCORE_MEAN | SHIELD_BY_CONTRIBUTION}),
        ({"shield_ratio": 0.7}, {"shield_blocks": 11}),
        ({"shield_ratio": 1}, {"shield_blocks": 16}),
        ({"policy": "h2o"}, {"flags": SCORE_SUM, "shield_blocks": 0}),
        ({"policy": "recent"}, {"flags": SCORE_NONE, "shield_blocks": 0}),
        (
            {"policy": "random", "seed": 7},
            {"flags": SCORE_RANDOM, "shield_blocks": 0, "seed": 7},
        ),
        ({"chunk": 64}, {}),
        ({"budget": 32, "sink": 0}, {"resident_blocks": 2, "stride_blocks": 2}),
    ],
    ids=repr,
)
def test_an_option_changes_what_it_is_for(
    options: dict[str, Any], changes: dict[str, int]
) -> None:
    expected = row()._replace(**changes)
    if options.get("budget") == 32:
        expected = expected._replace(sink=0, shield_blocks=1)
    assert row(options) == expected


@pytest.mark.parametrize(
    ("options", "chunk"),
    [
        ({}, 128),
        ({"chunk": 288}, 288),
        # no step of a prompt sees more text than the budget, unless it is asked to
        ({"budget": 64, "sink": 0}, 64),
        ({"budget": 64, "sink": 0, "chunk": 128}, 128),
        ({"budget": 0.5}, 64),
    ],
    ids=repr,
)
def test_chunks(options: dict[str, Any], chunk: int) -> None:
    assert plan(options).chunk == chunk


def test_the_servers_own_chunk_is_always_allowed() -> None:
    """Where no prompt is as long as a chunk, steps may be shorter than one."""
    short = dataclasses.replace(PLANNER, chunk_limits={"--one": 100})
    assert short.plan({"roco_chunk": 128}, 50).chunk == 128
    with pytest.raises(RequestOptionError, match="Use at most 128, or"):
        short.plan({"roco_chunk": 144}, 50)


@pytest.mark.parametrize("policy", ["h2o", "random", "recent"])
def test_what_a_policy_does_not_read_makes_no_other_row(policy: str) -> None:
    """Requests with other seeds had snapshots of their own."""
    server = {"shield": "deviation", "shield_ratio": 0.9}
    assert row({"policy": policy}, **server) == row({"policy": policy})
