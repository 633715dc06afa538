# SPDX-License-Identifier: Apache-2.0
"""Victims of any statistics, against the definition in words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.policy.blocks import (
    BLOCK_SIZE,
    Blocks,
    config_of,
    full_blocks,
    victims_of,
)
from vllm_roco.config import RocoConfig


@st.composite
def selections(draw: st.DrawFn) -> tuple[Blocks, int, int, RocoConfig]:
    budget = draw(st.integers(1, 6))
    num_victims = draw(st.integers(1, 8))
    num_full = budget + num_victims + draw(st.integers(0, 2))
    num_tokens = 100 + draw(st.integers(0, 1))
    # the oldest blocks are gone, and the survivors lie in any order; the newest do not
    ages = draw(st.permutations(range(50 - num_full, 50)))
    sink = draw(st.integers(0, budget))
    recent = draw(st.integers(0, budget - sink))
    config = config_of(
        budget,
        sink=sink * BLOCK_SIZE,
        recent=recent * BLOCK_SIZE,
        shield=draw(st.sampled_from(["peak", "deviation"])),
        shield_ratio=draw(st.sampled_from([0, 0.3, 0.7, 1])),
    )
    # few values, so that ties are common
    mass = st.lists(
        st.sampled_from([0.0, 0.25, 0.5]), min_size=num_full, max_size=num_full
    )
    blocks = full_blocks(
        num_tokens,
        [draw(mass), draw(mass)],
        deviation=[draw(mass), draw(mass)],
        peak=[draw(mass), draw(mass)],
        first=[BLOCK_SIZE * age for age in ages],
    )
    return blocks, num_tokens, num_victims, config


@given(selections())
def test_victims_are_distinct_candidates_that_nothing_protects(
    selection: tuple[Blocks, int, int, RocoConfig],
) -> None:
    blocks, num_tokens, num_victims, config = selection
    victims = victims_of(blocks, num_tokens, num_victims, config)
    _, first = blocks
    assert victims == sorted(set(victims))
    assert len(victims) == num_victims
    assert victims[-1] < config.budget // BLOCK_SIZE + num_victims
    for victim in victims:
        assert first[victim] >= config.sink
        assert first[victim] + BLOCK_SIZE <= num_tokens - config.recent


@given(selections())
def test_selection_does_not_depend_on_where_candidates_lie(
    selection: tuple[Blocks, int, int, RocoConfig],
) -> None:
    blocks, num_tokens, num_victims, config = selection
    victims = victims_of(blocks, num_tokens, num_victims, config)
    num_candidates = config.budget // BLOCK_SIZE + num_victims
    reversed_places = [
        *range(num_candidates - 1, -1, -1),
        *range(num_candidates, len(blocks[1])),
    ]
    statistics, first_positions = blocks
    mirrored = victims_of(
        (statistics[:, :, reversed_places], first_positions[reversed_places]),
        num_tokens,
        num_victims,
        config,
    )
    assert sorted(num_candidates - 1 - place for place in mirrored) == victims
