# SPDX-License-Identifier: Apache-2.0
"""The second kernel of decode attention: merges splits and updates the statistics.

It knows the log-sum-exp over all keys, and turns the first kernel's partial sums of
each block into its mass; see `attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_roco.ops.decode.partial_sums import (
    log_sum_exp,
    split_range,
    update_statistics,
)
from vllm_roco.ops.statistics import read_statistics


@triton.jit
def _merge_output(
    partial_output_ptr,  # [num_rows, num_q_heads, splits, head_size] float32
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    output_ptr,  # [head_size], of one row and query head
    row_head,  # row * num_q_heads + query head
    length,
    num_splits,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Write one query head's output, the average of its splits' outputs.

    `log_sum_exp` in `partial_sums` sums up the same splits, for the statistics: what
    changes here about which of them count, and by how much, changes there.
    """
    split = tl.arange(0, SPLITS_PADDED)
    dim = tl.arange(0, HEAD_PADDED)
    # a split without tiles wrote nothing
    first_tile, last_tile = split_range(length, split, num_splits, TILE)
    used = (split < num_splits) & (first_tile < last_tile)
    slot = row_head * num_splits + split
    split_lse = tl.load(partial_lse_ptr + slot, mask=used, other=float("-inf"))
    # [SPLITS_PADDED, HEAD_PADDED]
    partial = tl.load(
        partial_output_ptr + slot[:, None] * HEAD_SIZE + dim[None, :],
        mask=used[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    largest = tl.where(length > 0, tl.max(split_lse, 0), 0.0)
    share = tl.exp2(split_lse - largest)
    # the largest share is 1, so only an empty row is changed by the lower bound
    merged = tl.sum(partial * share[:, None], 0) / tl.maximum(tl.sum(share, 0), 1.0)
    tl.store(
        output_ptr + dim, merged.to(output_ptr.dtype.element_ty), mask=dim < HEAD_SIZE
    )


@triton.jit(do_not_specialize=["stride_table_row", "max_pieces", "num_splits"])
def combine_kernel(
    partial_output_ptr,  # [num_rows, num_q_heads, splits, head_size] float32
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    partial_sums_ptr,  # [num_rows, num_kv_heads, max_pieces, GROUP] float32, base 2
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    measured_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    statistics_ptr,  # [num_blocks, num_kv_heads + 1, NUM_FIELDS] float32
    output_ptr,  # [num_rows, num_q_heads, head_size]
    stride_table_row,
    stride_statistics_block,
    stride_output_row,
    stride_output_head,
    max_pieces,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    COMBINE_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(0)
    row_kv_head = row * num_kv_heads + kv_head
    length = tl.load(live_lens_ptr + row)
    if part < GROUP:
        if PDL:
            tl.extra.cuda.gdc_wait()
        _merge_output(
            partial_output_ptr,
            partial_lse_ptr,
            output_ptr
            + row * stride_output_row
            + (kv_head * GROUP + part) * stride_output_head,
            row_kv_head * GROUP + part,
            length,
            num_splits,
            HEAD_SIZE,
            HEAD_PADDED,
            TILE,
            SPLITS_PADDED,
        )
    else:
        first_index = (part - GROUP) * COMBINE_BLOCKS
        measured = tl.load(measured_lens_ptr + row)
        if first_index * BLOCK_SIZE < measured:
            # the first kernel leaves the statistics alone, so they may be read early
            index = first_index + tl.arange(0, COMBINE_BLOCKS)
            evicted = tl.load(evicted_before_ptr + row)
            live_block, before = read_statistics(
                statistics_ptr,
                stride_statistics_block,
                kv_head,
                live_table_ptr + row * stride_table_row,
                index,
                length,
                BLOCK_SIZE,
            )
            if PDL:
                tl.extra.cuda.gdc_wait()
            lse = log_sum_exp(
                partial_lse_ptr,
                row_kv_head * GROUP,
                length,
                num_splits,
                GROUP,
                GROUP_PADDED,
                TILE,
                SPLITS_PADDED,
            )
            update_statistics(
                partial_sums_ptr + row_kv_head * max_pieces * GROUP,
                lse,
                statistics_ptr,
                stride_statistics_block,
                kv_head,
                num_kv_heads,
                live_block,
                before,
                index,
                length,
                evicted,
                GROUP,
                GROUP_PADDED,
                BLOCK_SIZE,
                PIECE,
            )
