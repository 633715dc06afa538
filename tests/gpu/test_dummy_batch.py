# SPDX-License-Identifier: Apache-2.0
"""A data-parallel rank without work replays the graphs of ranks that have some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from tests.engine.engines import Engine
from tests.engine.tiny_models import TINY_BUDGET, random_prompt
from tests.gpu.engines import gpu_engine
from vllm_roco.kv_cache.page import page_view

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

PROMPT = random_prompt(70, seed=1)
NUM_NEW = 120


def test_dummy_batches_leave_the_cache_alone(tiny_llama: Path) -> None:
    """The step before may have evicted; replaying it must not evict again."""
    with gpu_engine(tiny_llama, TINY_BUDGET, async_scheduling=False) as engine:
        (expected,) = engine.generate([PROMPT], NUM_NEW)
        engine.llm.llm_engine.add_request(
            "interrupted",
            {"prompt_token_ids": list(PROMPT)},
            SamplingParams(
                temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False
            ),
        )
        tokens: list[int] = []
        num_evictions = 0
        freed = engine.manager.num_freed_blocks
        while engine.llm.llm_engine.has_unfinished_requests():
            for output in engine.llm.llm_engine.step():
                tokens = list(output.outputs[0].token_ids)
            before = _pages(engine)
            engine.core.execute_dummy_batch()
            assert all(map(torch.equal, before, _pages(engine)))
            num_evictions += engine.manager.num_freed_blocks > freed
            freed = engine.manager.num_freed_blocks
    assert num_evictions > 1
    assert tuple(tokens) == expected


def _pages(engine: Engine) -> list[torch.Tensor]:
    """Return a copy of every page as bytes, but for vLLM's null block."""
    null_block = engine.manager.block_pool.null_block.block_id
    assert null_block == 0
    return [page_view(x)[1:].view(torch.uint8).clone() for x in engine.kv_caches]
