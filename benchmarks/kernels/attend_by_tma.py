# SPDX-License-Identifier: Apache-2.0
"""Decode attention whose keys and values Hopper's tensor memory accelerator loads.

For comparison with the package's kernel alone: `tensor_descriptors` times it. A tile is
a page, which one load fetches a kv head's keys of and another its values, and a program
sees all keys of its row. Block sums are kept and statistics are updated as
`vllm_roco.ops.decode.attention` tells.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_roco.ops.decode.attention import MIN_GROUP
from vllm_roco.ops.decode.partial_sums import update_statistics
from vllm_roco.ops.decode.plan import DecodePlan, DecodeScratch
from vllm_roco.ops.logits import logit_scale as scale_in_base_2
from vllm_roco.ops.statistics import read_statistics

UPDATED_BLOCKS = 32
"""Live blocks whose statistics a program updates at a time."""


@triton.jit
def attend_by_tma_kernel(
    query_ptr,  # [num_rows, num_q_heads, head_size]
    pages,  # descriptor of [num_blocks, num_kv_heads, block_size, 2 * head_size]
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    statistics_ptr,  # [num_blocks, num_kv_heads + 1, NUM_FIELDS] float32
    output_ptr,  # [num_rows, num_q_heads, head_size]
    partial_sums_ptr,  # [num_rows, num_kv_heads, max_pieces, GROUP] float32, base 2
    logit_scale,  # softmax scale * log2(e)
    stride_query_row,
    stride_query_head,
    stride_table_row,
    stride_statistics_block,
    stride_output_row,
    stride_output_head,
    max_pieces,
    GROUP: tl.constexpr,
    DOT_GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UPDATED_BLOCKS: tl.constexpr,
    MEASURE: tl.constexpr,
    STAGES: tl.constexpr,
):
    kv_head = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(0)
    length = tl.load(live_lens_ptr + row)
    group = tl.arange(0, DOT_GROUP)
    dim = tl.arange(0, HEAD_SIZE)
    head = kv_head * GROUP + group
    mask = (group < GROUP)[:, None]
    # [DOT_GROUP, HEAD_SIZE]
    query_ptr += row * stride_query_row
    query = tl.load(
        query_ptr + head[:, None] * stride_query_head + dim[None, :],
        mask=mask,
        other=0.0,
    )
    table_ptr = live_table_ptr + row * stride_table_row
    partial_sums_ptr += (row * num_kv_heads + kv_head) * max_pieces * GROUP
    if MEASURE:
        index = tl.arange(0, UPDATED_BLOCKS)
        live_block, before = read_statistics(
            statistics_ptr,
            stride_statistics_block,
            kv_head.to(tl.int64),
            table_ptr,
            index,
            length,
            BLOCK_SIZE,
        )

    running_max = tl.full([DOT_GROUP], float("-inf"), tl.float32)
    running_sum = tl.zeros([DOT_GROUP], tl.float32)
    accumulated = tl.zeros([DOT_GROUP, HEAD_SIZE], tl.float32)
    token = tl.arange(0, BLOCK_SIZE)
    # read a tile ahead, so that no load of a page waits for one of its own iteration
    block = tl.load(table_ptr)
    num_blocks = tl.cdiv(length, BLOCK_SIZE)
    for tile in tl.range(0, num_blocks, num_stages=STAGES):
        keys = pages.load([block, kv_head, 0, 0]).reshape(BLOCK_SIZE, HEAD_SIZE)
        values = pages.load([block, kv_head, 0, HEAD_SIZE])
        values = values.reshape(BLOCK_SIZE, HEAD_SIZE)
        block = tl.load(table_ptr + tl.minimum(tile + 1, num_blocks - 1))
        logits = tl.dot(query, tl.trans(keys)) * logit_scale
        visible = tile * BLOCK_SIZE + token < length
        logits = tl.where(visible[None, :], logits, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(running_max - new_max)
        block_sum = tl.sum(weights, 1)
        running_sum = running_sum * decay + block_sum
        if MEASURE:
            tl.store(
                partial_sums_ptr + tile * GROUP + group,
                tl.log2(block_sum) + new_max,
                mask=group < GROUP,
                eviction_policy="evict_last",
            )
        accumulated = tl.dot(
            weights.to(values.dtype), values, acc=accumulated * decay[:, None]
        )
        running_max = new_max

    output_ptr += row * stride_output_row
    tl.store(
        output_ptr + head[:, None] * stride_output_head + dim[None, :],
        (accumulated / running_sum[:, None]).to(output_ptr.dtype.element_ty),
        mask=mask,
    )
    if MEASURE:
        lse = running_max + tl.log2(running_sum)
        # what the program's other threads have stored is visible behind the barrier
        tl.debug_barrier()
        evicted = tl.load(evicted_before_ptr + row)
        for first_index in range(0, num_blocks, UPDATED_BLOCKS):
            update_statistics(
                partial_sums_ptr,
                lse,
                statistics_ptr,
                stride_statistics_block,
                kv_head.to(tl.int64),
                num_kv_heads,
                live_block,
                before,
                index,
                length,
                evicted,
                GROUP,
                DOT_GROUP,
                BLOCK_SIZE,
                BLOCK_SIZE,
            )
            index = first_index + UPDATED_BLOCKS + tl.arange(0, UPDATED_BLOCKS)
            live_block, before = read_statistics(
                statistics_ptr,
                stride_statistics_block,
                kv_head.to(tl.int64),
                table_ptr,
                index,
                length,
                BLOCK_SIZE,
            )


def attend_by_tma(
    *,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    live_table: torch.Tensor,
    live_lens: torch.Tensor,
    evicted_before: torch.Tensor,
    statistics: torch.Tensor | None,
    output: torch.Tensor,
    scratch: DecodeScratch,
    plan: DecodePlan,
    scale: float,
) -> None:
    """Attend with one query a row and update the statistics of the blocks it saw.

    Arguments are those of `vllm_roco.ops.decode.attention.decode_attention`, but all
    rows or none are measured and no row is empty. Whole pages are read: what lies
    behind a row's last token must be finite.

    Args:
        query: `[num_rows, num_q_heads, head_size]`, head sizes powers of two.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, of the
            query's dtype; strides are multiples of 16 bytes.
        live_table: `[num_rows, live_width]` int32.
        live_lens: `[num_rows]` int32, each at least 1.
        evicted_before: `[num_rows]` int32.
        statistics: `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, updated in
            place; None to measure nothing.
        output: `[num_rows, num_q_heads, head_size]`, of the query's dtype.
        scratch: Memory for the partial sums.
        plan: Tiles as long as a block, one split; stages and warps are free.
        scale: Softmax scale.

    Raises:
        ValueError: The plan is another.
    """
    num_rows, num_q_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    if (plan.tile, plan.splits) != (block_size, 1):
        raise ValueError(f"{plan} must have tiles of {block_size} tokens, and 1 split.")
    group = num_q_heads // num_kv_heads
    tile = [1, 1, block_size, head_size]
    attend_by_tma_kernel[(num_kv_heads, 1, num_rows)](
        query,
        TensorDescriptor.from_tensor(kv_cache, tile),
        live_table,
        live_lens,
        evicted_before,
        # without statistics no program touches them
        scratch.partial_lse if statistics is None else statistics,
        output,
        scratch.partial_sums,
        scale_in_base_2(scale, soft_cap=0.0),
        query.stride(0),
        query.stride(1),
        live_table.stride(0),
        0 if statistics is None else statistics.stride(0),
        output.stride(0),
        output.stride(1),
        scratch.max_blocks,
        GROUP=group,
        DOT_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        UPDATED_BLOCKS=UPDATED_BLOCKS,
        MEASURE=statistics is not None,
        STAGES=plan.num_stages,
        num_warps=plan.num_warps,
    )
