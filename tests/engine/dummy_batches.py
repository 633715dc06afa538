# SPDX-License-Identifier: Apache-2.0
"""Idle batches between the steps of requests, as data parallelism has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.engines import Engine
from vllm_roco.kv_cache.page import page_view


@contextlib.contextmanager
def dummy_batch_after_each_step(
    engine: Engine, run: Callable[[Engine], None] | None = None
) -> Iterator[list[int]]:
    """Let the engine run a dummy batch behind each step, and look at its pages.

    A rank without work takes part in the others' steps so. Its requests may be there
    all the same: with asynchronous scheduling, when the last token of each is on its
    way.

    Args:
        engine: To run them.
        run: Runs a dummy batch; None: as the engine core does.

    Yields:
        Blocks that were freed in the steps in front of each dummy batch.

    Raises:
        AssertionError: A dummy batch has changed a page.
    """
    llm_engine = engine.llm.llm_engine
    step, freed = llm_engine.step, [engine.manager.num_freed_blocks]
    evicted: list[int] = []

    def step_and_run() -> Any:
        outputs = step()
        before = _pages(engine)
        if run is None:
            engine.core.execute_dummy_batch()
        else:
            run(engine)
        assert all(map(torch.equal, before, _pages(engine)))
        freed.append(engine.manager.num_freed_blocks)
        evicted.append(freed[-1] - freed[-2])
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_engine, "step", step_and_run)
        yield evicted


def _pages(engine: Engine) -> list[torch.Tensor]:
    """Return a copy of every page as bytes, but for vLLM's null block."""
    null_block = engine.manager.block_pool.null_block.block_id
    assert null_block == 0
    return [page_view(x)[1:].view(torch.uint8).clone() for x in engine.kv_caches]
