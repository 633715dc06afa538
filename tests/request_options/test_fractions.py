# SPDX-License-Identifier: Apache-2.0
"""A budget may be a fraction of the prompt."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.request_options.planning import refusal, row


@pytest.mark.parametrize(
    ("fraction", "prompt", "blocks"),
    [
        *[(0.5, 320, 10), (0.5, 321, 11), (0.999, 512, 32), (0.25, 1000, 16)],
        # 112 tokens; in binary a little more, which was a block more
        (0.07, 1600, 7),
        # a float that spells itself in another way: "Invalid literal for Fraction"
        (np.float64(0.25), 1000, 16),
    ],
)
def test_a_fraction_is_of_the_prompt(fraction: float, prompt: int, blocks: int) -> None:
    for mode in ("both", "prompt", "auto"):
        assert row({"budget": fraction, "mode": mode}, prompt).resident_blocks == blocks


@given(
    st.one_of(
        st.tuples(st.just("both"), st.integers(513, 200_000)),
        st.tuples(st.just("generation"), st.integers(260, 500)),
    )
)
def test_the_fraction_that_is_told_can_be_had(request: tuple[str, int]) -> None:
    mode, prompt = request
    asked = {"budget": 0.999, "mode": mode}
    told = re.search(r"or (0\.\d+) of this prompt", str(refusal(asked, prompt)))
    if told is not None:
        row({**asked, "budget": float(told[1])}, prompt)


@pytest.mark.parametrize("fraction", [1e-300, 0.001, 0.01])
def test_a_fraction_leaves_a_block_beside_the_protected(fraction: float) -> None:
    assert row({"budget": fraction}).resident_blocks == 1 + 2 + 1
    assert row({"budget": fraction, "sink": 0, "recent": 0}).resident_blocks == 1


def test_a_fraction_comes_on_top_of_a_prompt_that_is_kept() -> None:
    planned = row({"budget": 0.5, "mode": "generation"}, 320)
    assert planned.resident_blocks == 20 + 10
