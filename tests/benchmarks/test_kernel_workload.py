# SPDX-License-Identifier: Apache-2.0
"""The rows over which kernels are timed."""

from __future__ import annotations

import pytest

from benchmarks.kernels.sweep_decode import plans
from benchmarks.kernels.workload import SHAPES, UNEVEN, Shape
from vllm_roco.kv_cache import page
from vllm_roco.ops.device import H100


def test_rows_of_different_lengths_are_spread_over_octaves_in_no_order() -> None:
    lengths = Shape(64, 3200, 28, 4, 128, shortest=200).lengths
    assert (min(lengths), max(lengths), len(lengths)) == (200, 3200, 64)
    octaves = [sum(low <= x < 2 * low for x in lengths) for low in (200, 400, 800)]
    assert max(octaves) - min(octaves) <= 1
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))


def test_rows_are_alike_unless_the_shortest_is_told() -> None:
    shape = Shape(8, 2048, 32, 8, 128)
    assert shape.lengths == [2048] * 8
    assert shape.kv_bytes == 8 * 2048 * 8 * 2 * 128 * 2


@pytest.mark.parametrize("shape", [SHAPES[1], UNEVEN[0], UNEVEN[-1]], ids=str)
@pytest.mark.parametrize("block_size", [16, 256])
def test_a_layer_has_room_for_the_pages_of_every_row(
    shape: Shape, block_size: int
) -> None:
    """Tables are as wide as the longest row."""
    pages = shape.batch * -(-shape.context // block_size)
    numbers = shape.kv_heads * block_size * 2 * shape.head_size
    statistics = page.statistics_bytes(shape.kv_heads) // 2
    assert pages * (numbers + statistics) <= shape.layer_numel


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sweep_has_plans_for_every_shape(shape: Shape) -> None:
    swept = plans(shape, H100.num_multiprocessors)
    assert swept
    for plan in swept:
        assert plan.shares == shape.batch * plan.splits
        assert plan.least_tokens == (2 if plan.merged_apart else 4) * plan.tile
