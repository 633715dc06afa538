# SPDX-License-Identifier: Apache-2.0
"""Requests begin behind prefixes of others in a pipeline of two stages."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.engine.engines import Engine, running_engine
from tests.engine.prefix_hits import BEGUN, PROMPTS
from tests.engine.tiny_models import SMALL_BUDGET

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine_lock")]

NUM_NEW = 40


def test_two_stages(tiny_llama: Path) -> None:
    """Each stage copies its own layers, and both have two steps in flight or more."""
    with two_stages(tiny_llama, enable_prefix_caching=False) as engine:
        expected = {
            name: engine.generate([prompt], NUM_NEW)[0]
            for name, prompt in PROMPTS.items()
        }
    with two_stages(tiny_llama, enable_prefix_caching=True) as engine:
        for name, prompt in PROMPTS.items():
            (output,) = engine.run([prompt], NUM_NEW)
            assert tuple(output.outputs[0].token_ids) == tuple(expected[name]), name
            assert output.num_cached_tokens == BEGUN[name], name
        assert engine.llm.reset_prefix_cache()
        outputs = engine.run(list(PROMPTS.values()), NUM_NEW)
        for name, output in zip(PROMPTS, outputs, strict=True):
            assert tuple(output.outputs[0].token_ids) == tuple(expected[name]), name
        # those that share a prefix wait for the one that reads it
        assert sum(output.num_cached_tokens > 0 for output in outputs) >= 4
        assert engine.num_lost_blocks == 0


def two_stages(
    model: Path, *, enable_prefix_caching: bool
) -> AbstractContextManager[Engine]:
    """Return an engine whose stages choose by their own layers, hits or none."""
    return running_engine(
        model,
        SMALL_BUDGET,
        enable_prefix_caching=enable_prefix_caching,
        distributed_executor_backend="mp",
        pipeline_parallel_size=2,
        # as in `test_parallel_options`
        enforce_eager=False,
        compilation_config={"mode": 1, "backend": "eager"},
    )
