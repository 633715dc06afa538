# SPDX-License-Identifier: Apache-2.0
"""What each block is worth by its statistics: its largest share in any head.

The arithmetic is `vllm_roco.policy`'s. A program has one row that is due and one slice
of the layers; it returns at once where nothing is due.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_roco.ops.contribution import TINY
from vllm_roco.ops.rows import (
    FLAGS,
    NUM_ROW_FIELDS,
    SCORE_MASK,
    SCORE_SUM,
    SHIELD_BY_CONTRIBUTION,
    SHIELD_BY_DEVIATION,
)
from vllm_roco.ops.statistics import (
    MASS_PEAK,
    MASS_SQUARES,
    MASS_SUM,
    NUM_FIELDS,
    NUM_QUERIES,
)

# of a block: its largest share of what the second stage goes by, and the first
SCORES = 2
_SCORES = tl.constexpr(SCORES)


@triton.jit
def _by_statistics(entry, full, count, kind):
    """Return what the second stage goes by, of one head's statistics."""
    total = tl.load(entry + MASS_SUM, mask=full, other=0.0)
    return tl.where(kind == SCORE_SUM, total, total / count)


@triton.jit
def _shield_of(entry, full, count, flags):
    """Return what the first stage shields by, of one head's statistics.

    Zeros for contributions, which another kernel works out.
    """
    if (flags & SHIELD_BY_CONTRIBUTION) != 0:
        shield = tl.zeros_like(count)
    elif (flags & SHIELD_BY_DEVIATION) != 0:
        mean = tl.load(entry + MASS_SUM, mask=full, other=0.0) / count
        squares = tl.load(entry + MASS_SQUARES, mask=full, other=0.0) / count
        shield = tl.sqrt(tl.maximum(squares - mean * mean, 0.0))
    else:
        shield = tl.load(entry + MASS_PEAK, mask=full, other=0.0)
    return shield


@triton.jit(
    do_not_specialize=["stride_table_row", "max_blocks", "layers_per_slice"],
    do_not_specialize_on_alignment=["seq_lens_ptr"],
)
def _score_kernel(
    first_statistics_ptr,  # [num_layers] int64, address of block 0's statistics
    seq_lens_ptr,  # [num_rows] int32
    live_table_ptr,  # [num_rows, live_width] int32
    evicted_before_ptr,  # [num_rows] int32
    evicted_after_ptr,  # [num_rows] int32
    rows_ptr,  # [num_rows, NUM_ROW_FIELDS] int32
    scores_ptr,  # [num_rows, num_slices, SCORES, max_blocks] float32
    num_layers,
    layers_per_slice,
    stride_table_row,
    stride_statistics_block,
    max_blocks,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    layer_slice = tl.program_id(1)
    evicted = tl.load(evicted_before_ptr + row)
    if tl.load(evicted_after_ptr + row) == evicted:
        return

    num_tokens = tl.load(seq_lens_ptr + row)
    flags = tl.load(rows_ptr + row * NUM_ROW_FIELDS + FLAGS)
    kind = flags & SCORE_MASK
    index = tl.arange(0, BLOCKS)
    # shares are taken of all full live blocks, candidates or not
    full = index < num_tokens // BLOCK_SIZE - evicted
    block = tl.load(
        live_table_ptr + row * stride_table_row + index, mask=full, other=0
    ).to(tl.int64)
    second_score = tl.zeros([BLOCKS], tl.float32)
    shield_score = tl.zeros([BLOCKS], tl.float32)
    first_layer = layer_slice * layers_per_slice
    last_layer = tl.minimum(first_layer + layers_per_slice, num_layers)
    for layer in tl.range(first_layer, last_layer):
        statistics = tl.load(first_statistics_ptr + layer).to(
            tl.pointer_type(tl.float32)
        )
        for head in tl.range(NUM_KV_HEADS):
            entry = statistics + block * stride_statistics_block + head * NUM_FIELDS
            count = tl.load(entry + NUM_QUERIES, mask=full, other=1.0)
            score = _by_statistics(entry, full, count, kind)
            shield = _shield_of(entry, full, count, flags)
            score_total = tl.maximum(tl.sum(score, 0), TINY)
            shield_total = tl.maximum(tl.sum(shield, 0), TINY)
            second_score = tl.maximum(second_score, score / score_total)
            shield_score = tl.maximum(shield_score, shield / shield_total)

    slot = (row * tl.num_programs(1) + layer_slice) * _SCORES * max_blocks
    tl.store(scores_ptr + slot + index, second_score, mask=full)
    tl.store(scores_ptr + slot + max_blocks + index, shield_score, mask=full)


def first_statistics(statistics: list[torch.Tensor]) -> torch.Tensor:
    """Return the address of block 0's statistics in every layer.

    Args:
        statistics: The layers' `[num_blocks, num_kv_heads, NUM_FIELDS]` float32 views,
            of one group, as `kv_cache.page.statistics_view` returns them; the addresses
            are valid while the caches are bound.

    Returns:
        `[num_layers]` int64 on the views' device.
    """
    addresses = [view.data_ptr() for view in statistics]
    return torch.tensor(addresses, dtype=torch.int64, device=statistics[0].device)


def padded(max_blocks: int) -> int:
    """Return the blocks that a program looks at at once, a power of two."""
    return max(16, next_power_of_2(max_blocks))


def warps_per_row(blocks: int) -> int:
    """Return the warps of a program that has a row of so many blocks, a power of two.

    Of more than 8,192 blocks, what eight warps would hold does not fit in registers.
    """
    return min(8 if blocks <= 8192 else 32, max(1, blocks // 128))


def score_blocks(
    *,
    first_statistics_of_layer: torch.Tensor,
    page_bytes: int,
    num_kv_heads: int,
    seq_lens: torch.Tensor,
    live_table: torch.Tensor,
    evicted_before: torch.Tensor,
    evicted_after: torch.Tensor,
    rows: torch.Tensor,
    scores: torch.Tensor,
    block_size: int,
) -> None:
    """Write each full live block's largest shares in a slice of the layers.

    Those of the first stage are zeros for rows that shield by the contribution, which
    another kernel works out; other rows than those that are due are left as they are.

    Args:
        first_statistics_of_layer: `[num_layers]` int64, see `first_statistics`.
        page_bytes: Bytes of a page, tail included.
        num_kv_heads: KV heads of a layer on this rank.
        seq_lens: `[num_rows]` int32, computed tokens after the step.
        live_table: `[num_rows, live_width]` int32, see `ops.live_table`.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        evicted_after: `[num_rows]` int32, `E` at its end.
        rows: `[num_rows, NUM_ROW_FIELDS]` int32, contiguous, how each row evicts.
        scores: `[num_rows, num_slices, SCORES, max_blocks]` float32, contiguous,
            output; `max_blocks` bounds a row's full live blocks.
        block_size: Tokens per block.
    """
    num_rows, num_slices, _, max_blocks = scores.shape
    num_layers = first_statistics_of_layer.shape[0]
    blocks = padded(max_blocks)
    _score_kernel[(num_rows, num_slices)](
        first_statistics_ptr=first_statistics_of_layer,
        seq_lens_ptr=seq_lens,
        live_table_ptr=live_table,
        evicted_before_ptr=evicted_before,
        evicted_after_ptr=evicted_after,
        rows_ptr=rows,
        scores_ptr=scores,
        num_layers=num_layers,
        layers_per_slice=cdiv(num_layers, num_slices),
        stride_table_row=live_table.stride(0),
        stride_statistics_block=page_bytes // torch.float32.itemsize,
        max_blocks=max_blocks,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        BLOCKS=blocks,
        num_warps=warps_per_row(blocks),
    )
