# SPDX-License-Identifier: Apache-2.0
"""Attention of prompt rows over the live table where FlashAttention does not run.

FlashAttention wants 16-bit numbers, and takes an fp8 cache on Hopper alone. This kernel
takes float32 and fp8 everywhere; it is not tuned for speed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_roco.ops.fp8 import load_scale, scale_stride, unpack
from vllm_roco.ops.logits import LOG2_E, cap_logits, logit_scale

_LN_2 = tl.constexpr(math.log(2))

# float32 tiles of this many rows and columns fit into any supported device
ROWS = 32
COLUMNS = 32


# the rows of prompts lie behind those of decodes, at addresses of all kinds
@triton.jit(
    do_not_specialize=["stride_table_row", "stride_lse_head"],
    do_not_specialize_on_alignment=[
        "query_start_loc_ptr",
        "live_table_ptr",
        "live_lens_ptr",
    ],
)
def _prefill_attention_kernel(
    query_ptr,  # [num_queries, num_q_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    sinks_ptr,  # [num_q_heads], base e
    k_scale_ptr,  # [1] or [num_kv_heads] float32, with FP8
    v_scale_ptr,  # likewise
    query_start_loc_ptr,  # [num_rows + 1] int32
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    output_ptr,  # [num_queries, num_q_heads, head_size]
    lse_ptr,  # [num_q_heads, num_queries] float32, natural logarithm
    logit_scale,  # softmax scale * log2(e), without soft cap: else the softmax scale
    soft_cap,
    stride_query_token,
    stride_query_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_token,
    stride_k_scale,
    stride_v_scale,
    stride_output_token,
    stride_output_head,
    stride_lse_head,
    stride_table_row,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    # the heads of a group lie beside each other in the rows, padded to a power of two
    QUERIES: tl.constexpr = ROWS // GROUP_PADDED
    first_query = tl.program_id(1) * QUERIES

    query_start = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - query_start
    if first_query >= query_len:
        return
    length = tl.load(live_lens_ptr + row)

    number = first_query + tl.arange(0, ROWS) // GROUP_PADDED
    member = tl.arange(0, ROWS) % GROUP_PADDED
    head = kv_head * GROUP + member
    valid = (number < query_len) & (member < GROUP)
    query_token = (query_start + number).to(tl.int64)
    position = length - query_len + number
    dim = tl.arange(0, HEAD_PADDED)
    row_mask = valid[:, None] & (dim < HEAD_SIZE)[None, :]
    # [ROWS, HEAD_PADDED]
    query = tl.load(
        query_ptr
        + (query_token * stride_query_token + head * stride_query_head)[:, None]
        + dim[None, :],
        mask=row_mask,
        other=0.0,
    )

    v_scale = 1.0
    if FP8:
        logit_scale *= load_scale(k_scale_ptr, stride_k_scale, kv_head, False)
        v_scale = load_scale(v_scale_ptr, stride_v_scale, kv_head, False)
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    accumulated = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    if SINKS:
        # a key without a value, before all others
        sink = tl.load(sinks_ptr + head, mask=member < GROUP, other=0.0)
        running_max = sink.to(tl.float32) * LOG2_E
        running_sum += 1.0
    last_query = tl.minimum(first_query + QUERIES, query_len)
    for start in tl.range(0, length - query_len + last_query, COLUMNS):
        token = start + tl.arange(0, COLUMNS)
        present = token < length
        block = tl.load(
            live_table_ptr + row * stride_table_row + token // BLOCK_SIZE,
            mask=present,
            other=0,
        ).to(tl.int64)
        slot = block * stride_cache_block + token % BLOCK_SIZE * stride_cache_token
        content_ptr = (
            kv_cache_ptr + kv_head * stride_cache_head + slot[:, None] + dim[None, :]
        )
        content_mask = present[:, None] & (dim < HEAD_SIZE)[None, :]
        # [COLUMNS, HEAD_PADDED]
        keys = tl.load(content_ptr, mask=content_mask, other=0)
        values = tl.load(content_ptr + HEAD_SIZE, mask=content_mask, other=0)
        if FP8:
            keys = unpack(keys, query.dtype)
            values = unpack(values, query.dtype)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * logit_scale
        if SOFT_CAP:
            logits = cap_logits(logits, soft_cap)
        # every query sees the row's first token, so the maximum is finite from here on
        seen = token[None, :] <= position[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(running_max - new_max)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        accumulated = tl.dot(
            weights.to(values.dtype),
            values,
            acc=accumulated * decay[:, None],
            input_precision="ieee",
        )
        running_max = new_max

    tl.store(
        output_ptr
        + (query_token * stride_output_token + head * stride_output_head)[:, None]
        + dim[None, :],
        (accumulated * v_scale / running_sum[:, None]).to(output_ptr.dtype.element_ty),
        mask=row_mask,
    )
    tl.store(
        lse_ptr + head * stride_lse_head + query_token,
        (running_max + tl.log2(running_sum)) * _LN_2,
        mask=valid,
    )


def prefill_attention(
    *,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    live_table: torch.Tensor,
    live_lens: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    max_query_len: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Attend causally over the live tokens, the newest of which are the queries.

    Args:
        query: `[num_queries, num_q_heads, head_size]`; last dimension contiguous.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, K then V;
            last dimension contiguous. Tokens beyond a row's length are not read. Of the
            query's dtype, or with scales bytes that are float8 e4m3.
        query_start_loc: `[num_rows + 1]` int32, first query of each row in `query`.
        live_table: `[num_rows, live_width]` int32, see `ops.live_table`.
        live_lens: `[num_rows]` int32, the step's tokens included.
        output: As `query`, written in place.
        lse: `[num_q_heads, num_queries]` float32, natural logarithm, sinks included,
            written in place.
        max_query_len: Bound of the rows' query lengths, known on the host.
        scale: Softmax scale.
        soft_cap: Bound of the logits' soft cap, 0 for none.
        sinks: `[num_q_heads]`, contiguous, of any dtype: a logit of each head in the
            softmax's denominator alone. None for none.
        k_scale: By what keys are multiplied, float32: one number, or one for each kv
            head. None, as `v_scale`, for a cache that is not fp8.
        v_scale: Likewise values.
    """
    _, num_q_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    group_padded = next_power_of_2(group)
    rows = max(ROWS, group_padded)
    tiles = cdiv(max_query_len, rows // group_padded)
    _prefill_attention_kernel[(num_kv_heads, tiles, live_lens.shape[0])](
        query_ptr=query,
        kv_cache_ptr=kv_cache if k_scale is None else kv_cache.view(torch.uint8),
        # without sinks no program touches them
        sinks_ptr=query if sinks is None else sinks,
        k_scale_ptr=lse if k_scale is None else k_scale,
        v_scale_ptr=lse if v_scale is None else v_scale,
        query_start_loc_ptr=query_start_loc,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        output_ptr=output,
        lse_ptr=lse,
        logit_scale=logit_scale(scale, soft_cap),
        soft_cap=soft_cap,
        stride_query_token=query.stride(0),
        stride_query_head=query.stride(1),
        stride_cache_block=kv_cache.stride(0),
        stride_cache_head=kv_cache.stride(1),
        stride_cache_token=kv_cache.stride(2),
        stride_k_scale=scale_stride(k_scale),
        stride_v_scale=scale_stride(v_scale),
        stride_output_token=output.stride(0),
        stride_output_head=output.stride(1),
        stride_lse_head=lse.stride(0),
        stride_table_row=live_table.stride(0),
        GROUP=group,
        GROUP_PADDED=group_padded,
        HEAD_SIZE=head_size,
        HEAD_PADDED=next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
        ROWS=rows,
        COLUMNS=COLUMNS,
        SOFT_CAP=soft_cap != 0.0,
        SINKS=sinks is not None,
        FP8=k_scale is not None,
        num_warps=4,
        num_stages=1,
    )
