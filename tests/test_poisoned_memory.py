# SPDX-License-Identifier: Apache-2.0
"""The guard of `conftest.poisoned_memory` itself: without it others test nothing."""

from __future__ import annotations

import torch


def test_floats_are_nan() -> None:
    made = [
        torch.empty(3, dtype=torch.bfloat16),
        torch.empty_like(torch.zeros(3)),
        torch.empty_strided((2, 2), (1, 2)),
        torch.zeros(1).new_empty(3),
        torch.zeros(1).new_empty_strided((2, 2), (1, 2)),
    ]

    assert all(tensor.isnan().all() for tensor in made)


def test_integers_are_out_of_any_range() -> None:
    assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3
