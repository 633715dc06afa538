# SPDX-License-Identifier: Apache-2.0
"""Makes one score of those that slices of the layers have, to be sent to other ranks.

A score is the largest of its kind in any slice, so nothing is rounded, and what the
ranks make of all of them does not depend on who has which head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# of blocks, for each of the two scores of a row
_BLOCKS = 1024


@triton.jit(
    do_not_specialize=["num_slices", "max_blocks", "width"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "merged_ptr"],
)
def _merge_slices_kernel(
    scores_ptr,  # [num_rows, num_slices, num_scores, max_blocks] float32
    seq_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    evicted_after_ptr,  # [num_rows] int32
    merged_ptr,  # [num_rows, num_scores, width] float32
    num_slices,
    max_blocks,
    width,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    score = tl.program_id(1)
    num_scores = tl.num_programs(1)
    evicted = tl.load(evicted_before_ptr + row)
    if tl.load(evicted_after_ptr + row) == evicted:
        return

    num_full = tl.load(seq_lens_ptr + row) // BLOCK_SIZE - evicted
    scores_ptr += (row * num_slices * num_scores + score) * max_blocks
    merged_ptr += (row * num_scores + score) * width
    for start in tl.range(0, num_full, BLOCKS):
        index = start + tl.arange(0, BLOCKS)
        full = index < num_full
        most = tl.zeros([BLOCKS], tl.float32)
        for layer_slice in tl.range(num_slices):
            slot = scores_ptr + layer_slice * num_scores * max_blocks
            most = tl.maximum(most, tl.load(slot + index, mask=full, other=0.0))
        tl.store(merged_ptr + index, most, mask=full)


def merge_slices(
    *,
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    evicted_before: torch.Tensor,
    evicted_after: torch.Tensor,
    merged: torch.Tensor,
    block_size: int,
) -> None:
    """Write the largest score of all slices, for rows that are due.

    Args:
        scores: `[num_rows, num_slices, num_scores, max_blocks]` float32, contiguous,
            not negative; see `ops.score_blocks`.
        seq_lens: `[num_rows]` int32, computed tokens after the step.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        evicted_after: `[num_rows]` int32, `E` at its end.
        merged: `[num_rows, num_scores, width]` float32, contiguous, output; `width`
            bounds the full live blocks of rows that are due. What lies behind them, and
            other rows, is left as it is.
        block_size: Tokens per block.
    """
    num_rows, num_slices, num_scores, max_blocks = scores.shape
    _merge_slices_kernel[(num_rows, num_scores)](
        scores_ptr=scores,
        seq_lens_ptr=seq_lens,
        evicted_before_ptr=evicted_before,
        evicted_after_ptr=evicted_after,
        merged_ptr=merged,
        num_slices=num_slices,
        max_blocks=max_blocks,
        width=merged.shape[2],
        BLOCK_SIZE=block_size,
        BLOCKS=_BLOCKS,
        num_warps=4,
    )
