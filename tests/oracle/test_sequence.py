# SPDX-License-Identifier: Apache-2.0
"""Masses, counts and attention of the live set, against sums done by hand."""

import torch

from tests.oracle.sequence import LiveSequence


def test_the_masses_of_a_query_sum_to_one() -> None:
    """Also after blocks went, and with a partial last block."""
    generator = torch.Generator().manual_seed(0)
    sequence = LiveSequence(block_size=4)
    first_sum = torch.zeros(2)
    for start, end in ((0, 10), (10, 11), (11, 21)):
        sequence.begin_step(torch.arange(start, end))
        size = (4, end - start, 8)
        query = torch.randn(size, generator=generator)
        key, value = torch.randn((2, 2, *size[1:]), generator=generator)
        sequence.attend(0, query, key, value, scale=1.0)
        mass_sum, mass_square_sum, mass_peak = sequence.statistics()
        gained = mass_sum.sum(dim=1) - first_sum
        torch.testing.assert_close(gained, torch.full((2,), float(end - start)))
        assert (mass_peak <= 1 + 1e-6).all()
        assert (mass_square_sum <= mass_sum + 1e-5).all()
        if start == 10:
            sequence.drop_blocks((1,))
            mass_sum, *_ = sequence.statistics()
        first_sum = mass_sum.sum(dim=1)
    assert sequence.block_indices.tolist() == [0, 2, 3, 4, 5]
    assert sequence.positions.tolist() == [*range(4), *range(8, 21)]


def test_masses_by_hand() -> None:
    """Keys of zero: every query spreads evenly over the tokens it sees.

    Blocks of 2, tokens 0, 1, 2 in one step, then token 3. Queries see 1, 2, 3 and 4
    tokens, so block 0 receives 1, 1, 2/3 and 1/2, and block 1 0, 0, 1/3 and 1/2.
    """
    sequence = LiveSequence(block_size=2)
    for start, end in ((0, 3), (3, 4)):
        sequence.begin_step(torch.arange(start, end))
        zero = torch.zeros(1, end - start, 4)
        value = torch.arange(start, end).float()[None, :, None].expand_as(zero)
        output = sequence.attend(0, zero, zero, value, scale=1.0)

    mass_sum, mass_square_sum, mass_peak = sequence.statistics()
    torch.testing.assert_close(mass_sum, torch.tensor([[19 / 6, 5 / 6]]))
    torch.testing.assert_close(mass_square_sum, torch.tensor([[97 / 36, 13 / 36]]))
    torch.testing.assert_close(mass_peak, torch.tensor([[1.0, 1 / 2]]))
    assert sequence.queries_seen.tolist() == [4, 2]
    # the mean of the values 0, 1, 2, 3
    torch.testing.assert_close(output, torch.full((1, 1, 4), 1.5))


def test_query_heads_of_a_group_are_averaged_before_squaring() -> None:
    """Two query heads, each looking hard at another block: the mean is 1/2 each."""
    sequence = LiveSequence(block_size=1)
    sequence.begin_step(torch.arange(2))
    key = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    query = torch.tensor([[[90.0, 0.0]] * 2, [[0.0, 90.0]] * 2])

    sequence.attend(0, query, key, key, scale=1.0)

    mass_sum, mass_square_sum, mass_peak = sequence.statistics()
    torch.testing.assert_close(mass_sum, torch.tensor([[1.5, 0.5]]))
    torch.testing.assert_close(mass_square_sum, torch.tensor([[1.25, 0.25]]))
    torch.testing.assert_close(mass_peak, torch.tensor([[1.0, 0.5]]))
