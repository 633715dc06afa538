# SPDX-License-Identifier: Apache-2.0
"""A request that begins behind another's prefix ends as if it had read all of it.

As `tests/engine/test_prefix_cache.py`, with graphs and vLLM's runner for GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conversations import check_next_turns
from tests.engine.final_pages import run_to_the_end
from tests.engine.mixed_models import save_mixed
from tests.engine.prefix_hits import (
    BEGUN,
    NUM_NEW,
    PROMPTS,
    alone,
    assert_same,
    assert_whole,
)
from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET
from tests.gpu.engines import EAGER, FULL_GRAPHS, gpu_engine
from tests.oracle import Options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

RUNS: dict[str, dict[str, Any]] = {
    "eager": dict(EAGER, async_scheduling=False),
    "full-graphs": dict(FULL_GRAPHS, async_scheduling=False),
    "full-graphs-async": dict(FULL_GRAPHS, async_scheduling=True),
}


@pytest.mark.parametrize("policy", ["roco", "recent"])
@pytest.mark.parametrize("run", RUNS)
def test_hits_change_no_byte(tiny_llama: Path, run: str, policy: str) -> None:
    check_hits(tiny_llama, replace(SMALL_BUDGET, policy=policy), RUNS[run])


@pytest.mark.parametrize("window", [40, 150])
@pytest.mark.parametrize("run", RUNS)
def test_hits_behind_windows_change_no_byte(
    tmp_path: Path, run: str, window: int
) -> None:
    model = save_mixed("gemma2", tmp_path, sliding_window=window)
    check_hits(model, SMALL_BUDGET, RUNS[run])


@pytest.mark.parametrize("run", RUNS)
def test_next_turns_begin_behind_answers(tiny_llama: Path, run: str) -> None:
    """With blocks and tokens as of who reads all, and bytes that rounding changes."""
    check_next_turns(partial(gpu_engine, tiny_llama, SMALL_BUDGET, **RUNS[run]))


def check_hits(
    model: Path,
    options: Options,
    run: dict[str, Any],
) -> None:
    with gpu_engine(model, options, **run) as engine:
        expected = alone(engine)
    with (
        gpu_engine(model, options, **run, enable_prefix_caching=True) as engine,
        audited_manager(engine),
        poisoned_free_blocks(engine),
    ):
        found = alone(engine)
        crowd = run_to_the_end(engine, list(PROMPTS.values()), NUM_NEW)
        assert_whole(engine)
    assert {name: found[name].num_cached_tokens for name in PROMPTS} == BEGUN
    for ending, name in zip(crowd, PROMPTS, strict=True):
        assert_same(found[name], expected[name])
        # another batch shape may round differently
        assert ending.tokens == expected[name].tokens
        assert ending.num_cached_tokens > 0
