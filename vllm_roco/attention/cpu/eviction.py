# SPDX-License-Identifier: Apache-2.0
"""Evicts for one sequence: chooses the victims and moves the survivors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_roco import fp8_cache, policy
from vllm_roco.config import blocks_of
from vllm_roco.kv_cache.page import (
    first_positions_view,
    page_view,
    statistics_view,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from vllm_roco.attention.cpu.metadata import Sequence


def evict(
    sequence: Sequence,
    kv_caches: SequenceOf[torch.Tensor],
    block_size: int,
    *,
    measured: bool,
    any_rank: Callable[[torch.Tensor], torch.Tensor] = policy.of_one_rank,
) -> int:
    """Leave nothing in the outgoing blocks that the sequence still needs.

    Args:
        sequence: A sequence whose `E` grows in this step.
        kv_caches: The caches of all layers of the group, after their attention.
        block_size: Tokens per block.
        measured: Whether pages hold statistics; if not, the oldest blocks go.
        any_rank: See `policy.select_victims`.

    Returns:
        The blocks that were moved, each once for all layers.
    """
    moves = torch.tensor(_moves(sequence, kv_caches, block_size, measured, any_rank))
    if not len(moves):
        return 0
    source, destination = sequence.live_blocks[moves].unbind(-1)
    for kv_cache in kv_caches:
        pages = page_view(kv_cache)
        pages[destination] = pages[source]
    return len(moves)


def _moves(
    sequence: Sequence,
    kv_caches: SequenceOf[torch.Tensor],
    block_size: int,
    measured: bool,
    any_rank: Callable[[torch.Tensor], torch.Tensor],
) -> list[tuple[int, int]]:
    row = sequence.row
    before, after = sequence.evicted_before, sequence.evicted_after
    if not measured:
        sink = blocks_of(row.sink, block_size)
        return policy.plan_recent_moves(before, after, row.resident_blocks, sink)
    num_full = sequence.num_tokens // block_size - before
    full = sequence.live_blocks[:num_full]
    # [layers, blocks, heads, fields] to [layers, heads, blocks, fields]
    statistics = torch.stack([statistics_view(cache)[full] for cache in kv_caches])
    distances = None
    if row.shields_by_contribution:
        distances = torch.stack(
            [policy.value_distances(_values(cache, full)) for cache in kv_caches]
        )
    victims = policy.select_victims(
        statistics.transpose(1, 2),
        first_positions_view(kv_caches[0])[full],
        sequence.num_tokens,
        after - before,
        block_size,
        row,
        distances,
        any_rank,
    )
    return policy.plan_moves(victims, row.resident_blocks)


def _values(kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return blocks' values but for a factor of each head, which no share depends on.

    Returns:
        `[num_kv_heads, num_blocks, block_size, head_size]` float32.
    """
    values = kv_cache[blocks].transpose(0, 1).chunk(2, -1)[1]
    if values.dtype == torch.uint8:
        return fp8_cache.from_bytes(values, torch.ones(()))
    return values.float()
