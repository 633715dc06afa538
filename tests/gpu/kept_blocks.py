# SPDX-License-Identifier: Apache-2.0
"""Which blocks an engine on a GPU keeps, read from its pages after each step.

Nothing inside a replayed graph can be watched, but the statistics of a page tell which
block lies in it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.engines import Engine
from tests.engine.kept_blocks import KeptBlocks
from vllm_roco.attention.cuda.metadata import (
    RocoCudaMetadata,
    RocoCudaMetadataBuilder,
)
from vllm_roco.kv_cache.page import first_positions_view


@contextlib.contextmanager
def recorded_kept_blocks(engine: Engine) -> Iterator[KeptBlocks]:
    """Record every eviction of an engine that measures, while the context lasts.

    Prompts must differ from each other.
    """
    executor = engine.core.model_executor
    execute = executor.execute_model
    build = RocoCudaMetadataBuilder.build
    steps: list[RocoCudaMetadata] = []
    kept: KeptBlocks = defaultdict(dict)

    def build_and_keep(*args: Any, **kwargs: Any) -> RocoCudaMetadata:
        steps.append(build(*args, **kwargs))
        return steps[-1]

    def execute_and_look(*args: Any, **kwargs: Any) -> Any:
        steps.clear()
        result = execute(*args, **kwargs)
        torch.cuda.synchronize()
        for step in steps:
            _record(engine, step, kept)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RocoCudaMetadataBuilder, "build", build_and_keep)
        patch.setattr(executor, "execute_model", execute_and_look)
        yield kept


def _record(engine: Engine, metadata: RocoCudaMetadata, kept: KeptBlocks) -> None:
    schedule = engine.manager.plans.default.schedule
    step = metadata.step
    rows = zip(
        step.live_table[:, : schedule.budget_blocks].tolist(),
        step.evicted_before.tolist(),
        step.evicted_after.tolist(),
        metadata.seq_lens.tolist(),
        strict=True,
    )
    for resident, before, after, num_tokens in rows:
        if before == after:
            continue
        # [layers, blocks]
        first = torch.stack(
            [first_positions_view(x)[resident] for x in engine.kv_caches]
        )
        assert torch.equal(first, first[:1].expand_as(first)), "layers disagree"
        indices = (first[0] / schedule.block_size).int().tolist()
        assert len(set(indices)) == len(indices), "a block lies in two places"
        incoming = range(
            schedule.budget_blocks + after, num_tokens // schedule.block_size
        )
        request = engine.scheduler.requests[_request_of(engine, resident[0])]
        found = tuple(sorted([*indices, *incoming]))
        first_time = kept[tuple(request.prompt_token_ids)].setdefault(num_tokens, found)
        assert first_time == found, "a repetition keeps other blocks"


def _request_of(engine: Engine, first_block: int) -> str:
    rows = engine.manager.req_to_blocks
    (request_id,) = (
        name for name, row in rows.items() if row and row[0].block_id == first_block
    )
    return request_id
