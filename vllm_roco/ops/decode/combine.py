# SPDX-License-Identifier: Apache-2.0
"""The second kernel of decode attention: merges splits and updates the statistics.

It knows the log-sum-exp over all keys, and turns the first kernel's partial sums of
each block into its mass; see `attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_roco.ops.decode.merge import log_sum_exp, merge_output
from vllm_roco.ops.decode.partial_sums import update_statistics
from vllm_roco.ops.decode.splits import ROW_FIELDS
from vllm_roco.ops.statistics import read_statistics

NUM_ROW_FIELDS = tl.constexpr(ROW_FIELDS)


@triton.jit(do_not_specialize=["stride_table_row", "max_pieces"])
def combine_kernel(
    partial_output_ptr,  # [most_splits, num_q_heads, head_size] float32
    partial_lse_ptr,  # [most_splits, num_q_heads] float32, base 2
    partial_sums_ptr,  # [num_rows, num_kv_heads, max_pieces, GROUP] float32, base 2
    splits_of_rows_ptr,  # [num_rows, ROW_FIELDS] int32, as `DecodeSplits` has it
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
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
    COMBINE_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(0)
    num_q_heads = num_kv_heads * GROUP
    length = tl.load(live_lens_ptr + row)
    splits_of_rows_ptr += row * NUM_ROW_FIELDS
    first_kept = tl.load(splits_of_rows_ptr).to(tl.int64)
    num_splits = tl.load(splits_of_rows_ptr + 1)
    partial_output_ptr += first_kept * num_q_heads * HEAD_SIZE
    partial_lse_ptr += first_kept * num_q_heads
    if part < GROUP:
        if PDL:
            tl.extra.cuda.gdc_wait()
        head = kv_head * GROUP + part
        merge_output(
            partial_output_ptr,
            partial_lse_ptr,
            output_ptr + row * stride_output_row + head * stride_output_head,
            head,
            tl.where(length > 0, num_splits, 0),
            num_q_heads,
            HEAD_SIZE,
            HEAD_PADDED,
            SPLITS,
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
                kv_head * GROUP,
                num_splits,
                num_q_heads,
                GROUP,
                GROUP_PADDED,
                SPLITS,
            )
            partial_sums_ptr += (row * num_kv_heads + kv_head) * max_pieces * GROUP
            update_statistics(
                partial_sums_ptr,
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
