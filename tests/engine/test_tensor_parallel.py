# SPDX-License-Identifier: Apache-2.0
"""Two ranks with half of the heads each keep what one does.

What is kept of a prefix does not depend on who has read it either. That each request's
blocks are the same, too: `test_agreeing_ranks.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engines import Engine, Prompt, running_engine
from tests.engine.steps import audited_manager, most_held_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.quick_start.nursery import EXECUTED
from vllm_roco.metrics import get_metrics

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine_lock")]

# 110 tokens in the end, and the first eviction comes at 128
SHORT = [random_prompt(length, seed=length) for length in (80, 33)]
NUM_NEW_SHORT = 30
LONG = [random_prompt(length, seed=length) for length in (300, 150, 70)]
NUM_NEW_LONG = 64


def begun_with(
    engine: Engine, prompts: list[Prompt], expected: list[tuple[int, ...]]
) -> list[int]:
    """Return with how many tokens requests begin that write what is expected."""
    outputs = engine.run(prompts, len(expected[0]))
    for output, tokens in zip(outputs, expected, strict=True):
        assert tuple(output.outputs[0].token_ids) == tokens
    return [output.num_cached_tokens for output in outputs]


def test_two_ranks(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what depends on the order of a set would differ between ranks that are executed
    monkeypatch.setenv(EXECUTED, "1")
    tokens, written, freed, scheduled = {}, {}, {}, {}
    for size in (1, 2):
        with running_engine(
            tiny_llama,
            SMALL_BUDGET,
            tensor_parallel_size=size,
            distributed_executor_backend="mp" if size > 1 else None,
            enable_prefix_caching=True,
        ) as engine:
            tokens[size] = engine.generate(SHORT, NUM_NEW_SHORT)
            assert engine.manager.num_freed_blocks == 0
            assert get_metrics(engine.llm).moved_blocks == 0
            with audited_manager(engine) as steps:
                evicting = engine.generate(LONG, NUM_NEW_LONG)
            assert [len(x) for x in evicting] == [NUM_NEW_LONG] * len(LONG)
            written[size] = evicting
            assert steps.peak_held_blocks <= most_held_blocks(SMALL_BUDGET, 1)
            assert engine.num_lost_blocks == 0
            freed[size] = engine.manager.num_freed_blocks
            # one rank counts, not each
            assert 0 < get_metrics(engine.llm).moved_blocks <= freed[size]
            scheduled[size] = [tuple(step.values()) for step in steps.scheduled]
            # all blocks of the prompts, and what was kept at their last ends of chunks
            assert begun_with(engine, SHORT, tokens[size]) == [64, 32]
            assert begun_with(engine, LONG[:2], evicting[:2]) == [256, 128]
            assert engine.num_lost_blocks == 0
    assert tokens[1] == tokens[2]
    assert written[1] == written[2]
    assert scheduled[1] == scheduled[2]
    assert freed[1] == freed[2] > 0
