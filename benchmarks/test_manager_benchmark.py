# SPDX-License-Identifier: Apache-2.0
"""What eviction costs the scheduler, which asks for every request in every step.

    python -m pytest benchmarks/test_manager_benchmark.py

Nothing due: the same however long the row. Something due: proportional to the blocks
that go. Both are asserted on medians.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial
from statistics import median

from vllm.v1.core.block_pool import BlockPool

from benchmarks.specs import BLOCK_SIZE, layer_specs, shape_of
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.manager import RocoManager

BUDGET_BLOCKS = 64
ROWS = (1, 10, 100, 1_000, 10_000)
STRIDES = (8, 512)
MAX_ROW = 10_000


def manager_with_row(num_blocks: int, stride_blocks: int) -> RocoManager:
    """Return a manager in which one request, "a", has a row without a gap."""
    budget, stride, chunk = (
        BLOCK_SIZE * blocks for blocks in (BUDGET_BLOCKS, stride_blocks, MAX_ROW)
    )
    config = RocoConfig(budget=budget, stride=stride, chunk=chunk)
    _, spec = layer_specs(shape_of("llama-3.1-8b"), config)
    manager = RocoManager(
        spec,
        block_pool=BlockPool(
            MAX_ROW + 1, enable_caching=False, hash_block_size=BLOCK_SIZE
        ),
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK_SIZE,
    )
    manager.scheduler_ends_chunks = True
    num_tokens = num_blocks * BLOCK_SIZE
    manager.allocate_new_blocks("a", num_tokens, num_tokens)
    return manager


def nothing_due(num_blocks: int) -> Callable[[], None]:
    """Return a call that finds the end of the gap of a row, and no more to free."""
    manager = manager_with_row(num_blocks, stride_blocks=16)
    call = partial(manager.remove_skipped_blocks, "a", num_blocks * BLOCK_SIZE)
    call()
    return call


def free_strides(stride_blocks: int) -> list[float]:
    """Return the seconds that each stride of rows of `MAX_ROW` blocks takes to free."""
    first = (BUDGET_BLOCKS + stride_blocks) * BLOCK_SIZE
    last = MAX_ROW * BLOCK_SIZE
    managers = [manager_with_row(MAX_ROW, stride_blocks) for _ in range(10)]
    return [
        timeit.timeit(partial(manager.remove_skipped_blocks, "a", end), number=1)
        for manager in managers
        for end in range(first, last + 1, stride_blocks * BLOCK_SIZE)
    ]


def test_nothing_due_costs_the_same_in_rows_of_any_length() -> None:
    calls = [nothing_due(num_blocks) for num_blocks in ROWS]
    # in turns, so that a busy machine slows all of them
    rounds = [[timeit.timeit(call, number=200) for call in calls] for _ in range(300)]
    medians = [median(times) for times in zip(*rounds, strict=True)]
    assert max(medians) / min(medians) <= 1.5


def test_what_is_due_costs_in_proportion_to_the_stride() -> None:
    """From 8 to 512 blocks: at most 64 times as much, and a constant."""
    few, many = (median(free_strides(stride)) for stride in STRIDES)
    assert many / few <= 1.5 * STRIDES[1] / STRIDES[0]
