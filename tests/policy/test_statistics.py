# SPDX-License-Identifier: Apache-2.0
"""What is measured, on examples worked by hand."""

from __future__ import annotations

import pytest
import torch

from tests.policy.blocks import BLOCK_SIZE
from vllm_roco import policy
from vllm_roco.kv_cache.page import (
    MASS_PEAK,
    MASS_SQUARES,
    MASS_SUM,
    NUM_FIELDS,
    NUM_QUERIES,
)


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


@pytest.mark.parametrize("no_number", [torch.nan, torch.inf])
def test_what_is_no_number_adds_nothing(no_number: float) -> None:
    """Blocks of a prefix are shared: a model that overflowed in the prompt of one
    request left NaN in them, and who evicted behind them lost the oldest blocks."""
    statistics = torch.zeros(2, 1, NUM_FIELDS)
    statistics[:, 0] = torch.tensor([1.0, 0.5, 0.75, 4.0])
    mass = torch.tensor([[[0.5, 0.5], [no_number, 0.75]]])
    policy.accumulate(statistics, mass, torch.tensor([2, 2]))
    assert statistics[0, 0].tolist() == [1.0, 0.5, 0.75, 6.0]
    assert statistics[1, 0].tolist() == [2.25, 1.3125, 0.75, 6.0]


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


def test_a_deviation_of_rounding_errors_is_zero() -> None:
    statistics = torch.tensor([0.3, 0.3 * 0.1 - 1e-6, 0.1, 3.0])
    assert policy.deviation_of(statistics).item() == 0.0


def test_any_head_takes_the_largest_share() -> None:
    values = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[0.0, 0.0], [9.0, 1.0]]])
    torch.testing.assert_close(policy.any_head(values), torch.tensor([0.9, 0.75]))
