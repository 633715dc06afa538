# SPDX-License-Identifier: Apache-2.0
"""What eviction costs the scheduler, which asks for every request in every step.

    python -m pytest benchmarks/test_manager_benchmark.py

Nothing due: the same however long the row. Something due: proportional to the blocks
that go. Both are asserted on medians.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.kv_cache.spec import RocoSpec

BLOCK_SIZE = 16
BUDGET_BLOCKS = 64
ROWS = (1, 10, 100, 1_000, 10_000)
STRIDES = (8, 64, 512)
MAX_ROW = 10_000

_medians: dict[tuple[str, int], float] = {}


def manager_with_row(num_blocks: int, stride_blocks: int) -> RocoManager:
    """Return a manager in which one request, "a", has a row without a gap."""
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=8, head_size=128, dtype=torch.bfloat16
    )
    config = RocoConfig(
        budget=BUDGET_BLOCKS * BLOCK_SIZE, stride=stride_blocks * BLOCK_SIZE
    )
    manager = RocoManager(
        RocoSpec.from_attention_spec(full, config, max_steps_in_flight=2),
        block_pool=BlockPool(
            MAX_ROW + 1, enable_caching=False, hash_block_size=BLOCK_SIZE
        ),
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK_SIZE,
    )
    num_tokens = num_blocks * BLOCK_SIZE
    manager.allocate_new_blocks("a", num_tokens, num_tokens)
    return manager


@pytest.mark.parametrize("num_blocks", ROWS)
def test_nothing_due(benchmark: BenchmarkFixture, num_blocks: int) -> None:
    manager = manager_with_row(num_blocks, stride_blocks=16)
    processed = num_blocks * BLOCK_SIZE
    # what was due is freed; the measured calls find the end of the gap
    manager.remove_skipped_blocks("a", processed)
    benchmark.pedantic(
        manager.remove_skipped_blocks,
        args=("a", processed),
        rounds=300,
        iterations=200,
        warmup_rounds=20,
    )
    _medians["nothing due", num_blocks] = benchmark.stats.stats.median


@pytest.mark.parametrize("stride_blocks", STRIDES)
def test_a_stride_due(benchmark: BenchmarkFixture, stride_blocks: int) -> None:
    manager = manager_with_row(MAX_ROW, stride_blocks)
    processed = 0

    def allocate_what_was_freed() -> tuple[tuple[str, int], dict[str, object]]:
        nonlocal processed
        if processed + stride_blocks > MAX_ROW - BUDGET_BLOCKS:
            manager.free("a")
            num_tokens = MAX_ROW * BLOCK_SIZE
            manager.allocate_new_blocks("a", num_tokens, num_tokens)
            processed = 0
        processed += stride_blocks
        return ("a", (BUDGET_BLOCKS + processed) * BLOCK_SIZE), {}

    freed = manager.num_freed_blocks
    benchmark.pedantic(
        manager.remove_skipped_blocks, setup=allocate_what_was_freed, rounds=200
    )
    assert manager.num_freed_blocks - freed == 200 * stride_blocks
    _medians["a stride due", stride_blocks] = benchmark.stats.stats.median


def test_nothing_due_costs_the_same_in_rows_of_any_length() -> None:
    medians = [_medians["nothing due", num_blocks] for num_blocks in ROWS]
    assert max(medians) / min(medians) <= 1.5


def test_what_is_due_costs_in_proportion_to_the_stride() -> None:
    """From 8 to 512 blocks: at most 64 times as much, and a constant."""
    few, *_, many = (_medians["a stride due", stride] for stride in STRIDES)
    assert many / few <= 1.5 * STRIDES[-1] / STRIDES[0]
