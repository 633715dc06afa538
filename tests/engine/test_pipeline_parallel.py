# SPDX-License-Identifier: Apache-2.0
"""Two stages with some of the layers each, which choose their victims alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engines import running_engine
from tests.engine.steps import audited_manager, most_held_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.usefixtures("engine_lock"),
]

# 110 tokens in the end, and the first eviction comes at 128
SHORT = [random_prompt(length, seed=length) for length in (80, 33)]
NUM_NEW_SHORT = 30
LONG = [random_prompt(length, seed=length) for length in (300, 150)]
NUM_NEW_LONG = 60


def test_two_stages(tiny_llama: Path) -> None:
    with running_engine(tiny_llama, None) as engine:
        stock = engine.generate(SHORT, NUM_NEW_SHORT)
    with running_engine(tiny_llama, SMALL_BUDGET) as engine:
        engine.generate(LONG, NUM_NEW_LONG)
        freed = engine.manager.num_freed_blocks
    with (
        running_engine(
            tiny_llama,
            SMALL_BUDGET,
            pipeline_parallel_size=2,
            distributed_executor_backend="mp",
            # vLLM's CPU worker makes what a later stage receives only when it compiles
            enforce_eager=False,
            compilation_config={"backend": "eager"},
        ) as engine,
        audited_manager(engine) as steps,
    ):
        assert engine.generate(SHORT, NUM_NEW_SHORT) == stock
        assert engine.manager.num_freed_blocks == 0
        evicting = engine.generate(LONG, NUM_NEW_LONG)
        assert [len(tokens) for tokens in evicting] == [NUM_NEW_LONG] * len(LONG)
        assert engine.manager.num_freed_blocks == freed > 0
        assert engine.num_lost_blocks == 0
        assert steps.peak_held_blocks <= most_held_blocks(SMALL_BUDGET, 2)
