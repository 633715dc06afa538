# SPDX-License-Identifier: Apache-2.0
"""The metric of moved blocks on a GPU, which counts inside graphs and on the device."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.engine.kept_blocks import num_moved_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.gpu.engines import gpu_engine
from tests.gpu.kept_blocks import recorded_kept_blocks
from vllm_roco.attention.moved_blocks import INTERVAL_SECONDS
from vllm_roco.metrics import get_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

PROMPTS = [random_prompt(length, seed=length) for length in (230, 129, 33)]
NUM_NEW = 120
SHORT = [random_prompt(10, seed=10)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_shown_is_what_was_moved(asynchronous: bool, tiny_llama: Path) -> None:
    """Warm-up runs have evicted too, but nobody's blocks."""
    with gpu_engine(tiny_llama, SMALL_BUDGET, async_scheduling=asynchronous) as engine:
        with recorded_kept_blocks(engine) as kept:
            engine.generate(PROMPTS, NUM_NEW)
        # what the last steps moved is shown by later ones, which evict nothing
        time.sleep(INTERVAL_SECONDS)
        engine.generate(SHORT, 20)
        expected = num_moved_blocks(kept, SMALL_BUDGET)
        assert get_metrics(engine.llm).moved_blocks == expected > 0
