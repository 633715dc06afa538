# SPDX-License-Identifier: Apache-2.0
"""Which blocks a running engine really keeps, read from its pages."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch

from tests.engine.engines import Engine
from tests.oracle import Options
from vllm_roco.attention.cpu import impl
from vllm_roco.attention.cpu.metadata import Sequence
from vllm_roco.kv_cache.page import first_positions_view, page_view

KeptBlocks = dict[tuple[int, ...], dict[int, tuple[int, ...]]]
"""Prompt, then computed tokens at an eviction, to the blocks that live on after it.

Blocks are logical indices, full blocks only, sorted.
"""


@contextlib.contextmanager
def recorded_kept_blocks(engine: Engine) -> Iterator[KeptBlocks]:
    """Record every eviction of an engine while the context lasts.

    Prompts must differ from each other. An eviction that a preempted request repeats
    must keep what it kept the first time.
    """
    recorder = _Recorder(engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "evict", recorder.evict)
        yield recorder.kept


def num_moved_blocks(kept: KeptBlocks, options: Options) -> int:
    """Return how many kept blocks had to leave the places that evictions freed."""
    moved = 0
    for evictions in kept.values():
        evicted_before = 0
        for num_tokens, blocks in sorted(evictions.items()):
            evicted_after = options.evicted_blocks(num_tokens)
            first = options.budget_blocks + evicted_before
            moved += sum(
                first <= block < options.budget_blocks + evicted_after
                for block in blocks
            )
            evicted_before = evicted_after
    return moved


class _Recorder:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._evict = impl.evict
        # per request, the logical index of the block at each resident place
        self._resident: dict[str, list[int]] = {}
        self.kept: KeptBlocks = defaultdict(dict)

    def evict(
        self,
        sequence: Sequence,
        kv_caches: SequenceOf[torch.Tensor],
        block_size: int,
        *,
        measured: bool,
        **how: Any,
    ) -> int:
        """Evict, and find every block of the live table by its content before."""
        request_id = self._request_of(int(sequence.live_blocks[0]))
        num_resident = sequence.row.resident_blocks
        num_full = sequence.num_tokens // block_size
        if sequence.evicted_before == 0:
            self._resident[request_id] = list(range(num_resident))
        incoming = range(num_resident + sequence.evicted_before, num_full)
        indices = [*self._resident[request_id], *incoming]
        full = sequence.live_blocks[: len(indices)]
        before = [_contents(cache, full) for cache in kv_caches]

        num_moved = self._evict(
            sequence, kv_caches, block_size, measured=measured, **how
        )

        num_evicted = sequence.evicted_after - sequence.evicted_before
        live = torch.cat((full[:num_resident], full[num_resident + num_evicted :]))
        per_layer = {
            tuple(indices[old.index(page)] for page in _contents(cache, live))
            for cache, old in zip(kv_caches, before, strict=True)
        }
        assert len(per_layer) == 1, "the layers do not keep the same blocks"
        (kept,) = per_layer
        assert len(set(kept)) == len(kept), "a block lies in two places"
        if measured:
            for cache in kv_caches:
                first = first_positions_view(cache)[live]
                expected = torch.tensor(kept) * block_size
                assert torch.equal(first, expected.float())

        self._resident[request_id] = list(kept[:num_resident])
        prompt = tuple(self._engine.scheduler.requests[request_id].prompt_token_ids)
        first_time = self.kept[prompt].setdefault(
            sequence.num_tokens, tuple(sorted(kept))
        )
        assert first_time == tuple(sorted(kept)), "a repetition keeps other blocks"
        return num_moved

    def _request_of(self, first_block: int) -> str:
        rows = self._engine.manager.req_to_blocks
        (request_id,) = (
            name for name, row in rows.items() if row and row[0].block_id == first_block
        )
        return request_id


def _contents(kv_cache: torch.Tensor, blocks: torch.Tensor) -> list[bytes]:
    pages = page_view(kv_cache)[blocks].view(torch.uint8)
    return [page.numpy().tobytes() for page in pages]
