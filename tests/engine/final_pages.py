# SPDX-License-Identifier: Apache-2.0
"""What lies in a request's live blocks when it ends, byte by byte."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.engine.engines import Engine, Prompt
from vllm_roco.kv_cache.page import first_positions_view, statistics_view


@dataclass(frozen=True)
class Ending:
    """How a request ended.

    Attributes:
        tokens: What it wrote.
        pages: K, V and statistics of every full live block of every layer.
        num_cached_tokens: With how many tokens it began, as vLLM reports it.
        was_preempted: Whether it has read its own output again.
    """

    tokens: tuple[int, ...]
    pages: bytes
    num_cached_tokens: int
    was_preempted: bool


def run_to_the_end(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int, **arguments: Any
) -> list[Ending]:
    """Generate for all prompts at once, as `Engine.generate` does."""
    with _recorded_pages(engine) as recorded:
        outputs = engine.run(prompts, max_tokens, **arguments)
    endings = []
    for output in outputs:
        # vLLM adds something to each name
        its = re.compile(rf"{output.request_id}(-\w+)?")
        ((pages, was_preempted),) = [
            found for name, found in recorded.items() if its.fullmatch(name)
        ]
        endings.append(
            Ending(
                tokens=tuple(output.outputs[0].token_ids),
                pages=pages,
                num_cached_tokens=output.num_cached_tokens or 0,
                was_preempted=was_preempted,
            )
        )
    return endings


def bytes_of(engine: Engine, blocks: Sequence[int]) -> bytes:
    """Return K, V and statistics of pages in all layers, without padding."""
    chosen = torch.tensor(blocks)
    with_statistics = engine.manager.kv_cache_spec.has_statistics
    parts = []
    for cache in engine.kv_caches:
        parts.append(cache[chosen].cpu().view(torch.uint8).numpy().tobytes())
        if with_statistics:
            for numbers in (statistics_view(cache), first_positions_view(cache)):
                parts.append(numbers[chosen].cpu().numpy().tobytes())
    return b"".join(parts)


@contextlib.contextmanager
def _recorded_pages(engine: Engine) -> Iterator[dict[str, tuple[bytes, bool]]]:
    manager, requests = engine.manager, engine.scheduler.requests
    pop = manager.pop_blocks_for_free
    recorded: dict[str, tuple[bytes, bool]] = {}

    def record_and_pop(request_id: str) -> object:
        row, request = manager.req_to_blocks.get(request_id), requests.get(request_id)
        if row and request is not None and request.is_finished():
            # the last token was never computed
            full = (request.num_tokens - 1) // manager.block_size
            resident = manager.plans.default.schedule.budget_blocks
            live = [block.block_id for block in row[:full] if not block.is_null]
            assert len(live) >= min(full, resident)
            was_preempted = request.num_preemptions > 0
            recorded[request_id] = bytes_of(engine, live), was_preempted
        return pop(request_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "pop_blocks_for_free", record_and_pop)
        yield recorded
