# SPDX-License-Identifier: Apache-2.0
"""Freed blocks are free: nobody reads them again, whenever the scheduler runs ahead.

vLLM's CPU platform schedules synchronously; here it is told to run one step ahead, as
on other platforms. One engine lives in one process, so the steps still take turns, but
the scheduler allocates and frees a step before it sees what the last one gave.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engines import Engine, running_engine
from tests.engine.steps import audited_manager, most_held_blocks, poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from vllm_roco.scheduler import RocoAsyncScheduler

pytestmark = pytest.mark.engine

PROMPTS = [
    random_prompt(length, seed=length) for length in (20, 70, 96, 150, 210, 333, 480)
]
NUM_NEW = 150
# requests are let in on what is free at the moment, and then preempt each other
SMALL_POOL = dict(num_gpu_blocks_override=40, scheduler_reserve_full_isl=False)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[tuple[int, ...]]:
    """What synchronous scheduling says while freed blocks keep what they held."""
    with running_engine(tiny_llama, SMALL_BUDGET) as engine:
        return engine.generate(PROMPTS, NUM_NEW)


@pytest.mark.parametrize("pool", [{}, SMALL_POOL], ids=["large-pool", "small-pool"])
class TestPoison:
    def test_synchronous(
        self,
        pool: dict[str, int],
        tiny_llama: Path,
        expected: list[tuple[int, ...]],
    ) -> None:
        with running_engine(tiny_llama, SMALL_BUDGET, **pool) as engine:
            assert engine.core.batch_queue is None
            check_poisoned_run(engine, expected, 1, pool)

    def test_asynchronous(
        self,
        pool: dict[str, int],
        tiny_llama: Path,
        expected: list[tuple[int, ...]],
        asynchronous: None,
    ) -> None:
        with running_engine(tiny_llama, SMALL_BUDGET, **pool) as engine:
            assert isinstance(engine.scheduler, RocoAsyncScheduler)
            assert engine.core.batch_queue_size == 2
            check_poisoned_run(engine, expected, 2, pool)


def check_poisoned_run(
    engine: Engine,
    expected: list[tuple[int, ...]],
    steps_in_flight: int,
    pool: dict[str, int],
) -> None:
    bound = most_held_blocks(SMALL_BUDGET, steps_in_flight)
    with audited_manager(engine) as steps, poisoned_free_blocks(engine):
        tokens = engine.generate(PROMPTS, NUM_NEW)
    assert tokens == expected
    assert bool(steps.preemptions) == bool(pool), "the pool has the wrong size"
    assert engine.manager.num_freed_blocks > 0
    assert SMALL_BUDGET.budget_blocks < steps.peak_held_blocks <= bound
    assert engine.num_lost_blocks == 0
