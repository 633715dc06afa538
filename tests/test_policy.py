# SPDX-License-Identifier: Apache-2.0
"""The policy on examples worked by hand, and against its definition in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rows import row_of
from vllm_roco import policy
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_row import (
    SCORE_MEAN,
    SCORE_NONE,
    SCORE_RANDOM,
    SCORE_SUM,
    SHIELD_BY_DEVIATION,
    EvictionRow,
)
from vllm_roco.eviction_schedule import NEVER, EvictionSchedule
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
    defaults: dict[str, Any] = {"stride": BLOCK_SIZE, "sink": 0, "recent": 0}
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
    victims = policy.select_victims(
        *blocks,
        num_computed_tokens,
        num_victims,
        BLOCK_SIZE,
        row_of(config, BLOCK_SIZE),
    )
    assert victims.dtype == torch.int64
    return victims.tolist()


def test_block_mass_sums_tokens_and_averages_the_group() -> None:
    # [kv heads 1, group 2, queries 1, tokens 4]
    probabilities = torch.tensor([[[[0.5, 0.1, 0.3, 0.1]], [[0.2, 0.2, 0.0, 0.6]]]])
    mass = policy.block_mass(probabilities, BLOCK_SIZE)
    torch.testing.assert_close(mass, torch.tensor([[[0.5, 0.5]]]))


def test_the_group_is_averaged_before_anything_is_squared() -> None:
    # one head looks at the first block only, its partner never
    probabilities = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])
    statistics = torch.zeros(2, 1, NUM_FIELDS)
    mass = policy.block_mass(probabilities, BLOCK_SIZE)
    policy.accumulate(statistics, mass, torch.tensor([1, 1]))
    assert statistics[:, 0, MASS_SQUARES].tolist() == [0.25, 0.25]
    assert statistics[:, 0, MASS_PEAK].tolist() == [0.5, 0.5]


def test_accumulate_adds_a_step() -> None:
    statistics = torch.zeros(2, 1, NUM_FIELDS)
    statistics[0, 0] = torch.tensor([1.0, 0.5, 0.75, 4.0])
    # [kv heads 1, queries 2, blocks 2]
    mass = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    policy.accumulate(statistics, mass, torch.tensor([2, 1]))
    expected = torch.tensor([[[1.75, 0.8125, 0.75, 6.0]], [[1.25, 0.8125, 0.75, 1.0]]])
    torch.testing.assert_close(statistics, expected, rtol=0, atol=0)


def test_accumulate_in_two_steps_equals_one() -> None:
    mass = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0))
    at_once = torch.zeros(5, 3, NUM_FIELDS)
    first_tokens = 2 * torch.arange(5)
    policy.accumulate(at_once, mass, policy.queries_that_see(first_tokens, 10, 7))
    in_steps = torch.zeros(5, 3, NUM_FIELDS)
    for end, step in (7, mass[:, :4]), (10, mass[:, 4:]):
        count = policy.queries_that_see(first_tokens, end, step.shape[1])
        policy.accumulate(in_steps, step, count)
    torch.testing.assert_close(in_steps, at_once)


def test_the_mass_of_a_query_sums_to_one() -> None:
    scores = torch.randn(2, 3, 4, 11, 6, generator=torch.Generator().manual_seed(1))
    probabilities = scores.softmax(-1)
    statistics = torch.zeros(2, 3, 3, NUM_FIELDS)
    mass = policy.block_mass(probabilities, BLOCK_SIZE)
    policy.accumulate(statistics, mass, torch.full((2, 3), 11))
    total = statistics[..., MASS_SUM].sum(1)
    torch.testing.assert_close(total, torch.full((2, 3), 11.0))


def test_a_block_is_seen_from_its_first_token_on() -> None:
    # of 5 queries at places 6 to 10
    first_tokens = torch.tensor([0, 6, 7, 10, 12])
    seen = policy.queries_that_see(first_tokens, 11, 5)
    assert seen.tolist() == [5, 5, 4, 1, 0]
    # a batch's rows have lengths of their own
    rows = policy.queries_that_see(first_tokens, torch.tensor([[11], [7]]), 1)
    assert rows.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_moments_are_over_the_queries_that_saw_the_block() -> None:
    statistics = torch.zeros(NUM_FIELDS)
    # masses 0.5, 0.25, 0.25 and 1.0
    statistics[MASS_SUM] = 2.0
    statistics[MASS_SQUARES] = 1.375
    statistics[NUM_QUERIES] = 4
    assert policy.mean_of(statistics).item() == 0.5
    deviation = policy.deviation_of(statistics).item()
    assert deviation == pytest.approx(0.09375**0.5)


def test_a_block_that_sequences_share_has_the_mean_over_all_of_them() -> None:
    """Not over the queries of the one that evicts."""
    mass = torch.rand(3, 12, 1, generator=torch.Generator().manual_seed(0))
    statistics = torch.zeros(1, 3, NUM_FIELDS)
    # a prompt whose third token begins the block, then two others by turns
    mass[:, :2] = 0
    steps = [(5, 0, 5), (4, 5, 9), (1, 9, 10), (2, 10, 12)]
    lengths = [5, 20, 6, 22]
    for (num_queries, begin, end), length in zip(steps, lengths, strict=True):
        count = policy.queries_that_see(torch.tensor([2]), length, num_queries)
        policy.accumulate(statistics, mass[:, begin:end], count)
    seen = mass[:, 2:, 0]
    torch.testing.assert_close(policy.mean_of(statistics)[0], seen.mean(1))
    torch.testing.assert_close(
        policy.deviation_of(statistics)[0], seen.std(1, correction=0)
    )


def test_a_block_that_many_looked_at_may_be_the_one_to_go() -> None:
    """Its sum is the largest, its mean the smallest."""
    statistics, first_positions = full_blocks(8, [0.2, 0.3, 0.4, 0.5])
    statistics[:, :, 2, MASS_SUM] = 50 * 0.1
    statistics[:, :, 2, NUM_QUERIES] = 50
    assert victims_of((statistics, first_positions), 8, 1, config_of(3)) == [2]


def test_a_deviation_of_rounding_errors_is_zero() -> None:
    statistics = torch.tensor([0.3, 0.3 * 0.1 - 1e-6, 0.1, 3.0])
    assert policy.deviation_of(statistics).item() == 0.0


def test_any_head_takes_the_largest_share() -> None:
    values = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[0.0, 0.0], [9.0, 1.0]]])
    torch.testing.assert_close(policy.any_head(values), torch.tensor([0.9, 0.75]))


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


@pytest.mark.parametrize(
    ("victims", "moves"),
    [
        pytest.param([4, 5], [], id="the outgoing blocks go as they are"),
        pytest.param([0, 2], [(4, 0), (5, 2)], id="all of it survives"),
        pytest.param([1, 4], [(5, 1)], id="one survives"),
        pytest.param([3, 5], [(4, 3)], id="the other survives"),
        pytest.param([], [], id="nothing goes"),
    ],
)
def test_moves_by_hand(victims: list[int], moves: list[tuple[int, int]]) -> None:
    planned = policy.plan_moves(torch.tensor(victims, dtype=torch.int64), 4)
    assert planned == moves


@given(
    st.integers(1, 12).flatmap(
        lambda budget: st.integers(1, 12).flatmap(
            lambda victims: st.tuples(
                st.just(budget),
                st.permutations(range(budget + victims)).map(
                    lambda order: sorted(order[:victims])
                ),
            )
        )
    )
)
def test_moves_leave_nothing_needed_in_the_dying_range(
    example: tuple[int, list[int]],
) -> None:
    budget, victims = example
    places = list(range(budget + len(victims)))
    survivors = set(places) - set(victims)
    moves = policy.plan_moves(torch.tensor(victims), budget)
    for source, destination in moves:
        places[destination] = source
    assert set(places[:budget]) == survivors
    assert len(moves) == sum(place < budget for place in victims)


@given(
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(0, 8),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_recent_drops_the_oldest(
    budget_blocks: int, stride_blocks: int, sink_blocks: int, steps: list[int]
) -> None:
    """Over many steps, some of them larger than all resident blocks."""
    sink_blocks = min(sink_blocks, budget_blocks)
    schedule = EvictionSchedule(
        block_size=1, budget=budget_blocks, stride=stride_blocks
    )
    # logical index of the block at every place of the row
    row: list[int] = []
    kept: list[int] = []
    for blocks in steps:
        before = schedule.evicted_blocks(len(row))
        arrived = range(len(row), len(row) + blocks)
        row += arrived
        kept += arrived
        after = schedule.evicted_blocks(len(row))
        oldest_first = [block for block in kept if block >= sink_blocks]
        for block in oldest_first[: after - before]:
            kept.remove(block)

        live = [*range(budget_blocks), *range(budget_blocks + before, len(row))]
        for source, destination in policy.plan_recent_moves(
            before, after, budget_blocks, sink_blocks
        ):
            assert source >= budget_blocks
            assert sink_blocks <= destination < budget_blocks
            row[live[destination]] = row[live[source]]
        live = [*range(budget_blocks), *range(budget_blocks + after, len(row))]
        assert sorted(row[place] for place in live[: len(row) - after]) == kept


def test_recent_moves_no_block_twice_in_a_large_step() -> None:
    # a step of 20 blocks through a ring of 3: only the last 3 are worth a copy
    moves = policy.plan_recent_moves(0, 20, 4, 1)
    assert moves == [(21, 3), (22, 1), (23, 2)]


def test_recent_with_sinks_alone_moves_nothing() -> None:
    assert policy.plan_recent_moves(0, 20, 4, 4) == []


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


def test_a_request_without_shield_has_one_stage() -> None:
    blocks = full_blocks(10, MEANS, deviation=DEVIATIONS, peak=PEAKS)
    row = EvictionRow(4, 1, NEVER, 0, 0, 2, SHIELD_BY_DEVIATION, 0)
    shielded = policy.select_victims(*blocks, 10, 1, BLOCK_SIZE, row)
    assert shielded.tolist() == [2]
    alone = row._replace(shield_blocks=0)
    victims = policy.select_victims(*blocks, 10, 1, BLOCK_SIZE, alone)
    assert victims.tolist() == [1]
