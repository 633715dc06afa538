# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the live table, measuring every block's attention mass.

One query a row, whose keys are split, see `splits`. Two launches: `attend_kernel` goes
through them, with an online softmax over tiles of tokens in each; `combine_kernel`
merges a row's splits and, knowing the final log-sum-exp, turns the first kernel's
partial sums of each block into its mass and updates the statistics. Where rows are many
a program of the first kernel does that, which sees all keys of its row or is the last
of those that do, and there is no second launch.

With `s` the logits, `m` the running maximum and `L` the log-sum-exp of a query head,
all in base 2, the first kernel stores, out of the weights it needs anyway,
`w = m + log2(sum_t 2^(s_t - m))` for each piece of a block; the second computes
`a = mean_g sum_pieces 2^(w - L)`. A piece is the part of a block that lies in one
tile, the whole block as a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_roco.ops import fp8
from vllm_roco.ops.decode.attend import attend_kernel
from vllm_roco.ops.decode.combine import combine_kernel
from vllm_roco.ops.decode.plan import (
    DecodePlan,
    DecodeScratch,
    piece_size,
    pieces_of,
)
from vllm_roco.ops.decode.splits import DecodeSplits
from vllm_roco.ops.launch import Launch, Launcher
from vllm_roco.ops.logits import logit_scale

# tensor cores multiply at least 16 rows
MIN_GROUP = 16
MIN_WIDTH = 16
# live blocks whose statistics a program updates at a time: many where it has attended
# over all of them, few where each is a program of its own
UPDATED_BLOCKS = 128
COMBINE_BLOCKS = 32

_launch_attend = Launcher(attend_kernel)
_launch_combine = Launcher(combine_kernel)


@dataclass(frozen=True)
class DecodeLaunch:
    """What attends in a step's other layers as `decode_attention` did in its first.

    Attributes:
        attend: The first kernel's launch.
        attend_places: Where it has a layer's tensors.
        combine: The second one's, None without.
        combine_places: Likewise.
    """

    attend: Launch
    attend_places: Sequence[int]
    combine: Launch | None
    combine_places: Sequence[int]

    def again(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        statistics: torch.Tensor | None,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
    ) -> None:
        """Attend in another layer; arguments as of `decode_attention`.

        They are as those of the first layer were: `ops.launch.alike` tells it.
        """
        if k_scale is not None:
            kv_cache = kv_cache.view(torch.int16)
        given = (query, kv_cache, output, statistics, sinks, k_scale, v_scale)
        self.attend.again(self.attend_places, [x for x in given if x is not None])
        if self.combine is not None:
            combined = (output, statistics)
            self.combine.again(
                self.combine_places, [x for x in combined if x is not None]
            )


def decode_attention(
    *,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    live_table: torch.Tensor,
    live_lens: torch.Tensor,
    splits: DecodeSplits,
    measured_lens: torch.Tensor,
    evicted_before: torch.Tensor,
    statistics: torch.Tensor | None,
    output: torch.Tensor,
    scratch: DecodeScratch,
    plan: DecodePlan,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> DecodeLaunch:
    """Attend with one query a row and update the statistics of the blocks it saw.

    Tokens at and beyond a row's length are never read as numbers, whatever they hold. A
    row of length 0 gets zeros.

    Args:
        query: `[num_rows, num_q_heads, head_size]`; last dimension contiguous.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, K then V;
            last dimension contiguous, every other stride as it comes. Of the query's
            dtype, or with scales bytes that are float8 e4m3.
        live_table: `[>= num_rows, live_width]` int32, see `ops.live_table`.
        live_lens: `[>= num_rows]` int32, this step's token included.
        splits: Those of `live_lens[:num_rows]`, as `DecodeSplits.deal` left them.
        measured_lens: `[>= num_rows]` int32, the same, or 0 for rows that are not
            measured. These may be longer than the scratch has room for.
        evicted_before: `[>= num_rows]` int32, `E` at the start of the step.
        statistics: `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, the pages' as
            `kv_cache.page.statistics_view` shows them, updated in place; so are the
            first positions behind them. None to measure nothing.
        output: `[num_rows, num_q_heads, head_size]`; last dimension contiguous.
        scratch: Memory for the partial results.
        plan: The launch's layout, see `plan_decode`.
        scale: Softmax scale.
        soft_cap: Bound of the logits' soft cap, 0 for none.
        sinks: `[num_q_heads]`, contiguous, of any dtype: a logit of each head in the
            softmax's denominator alone. None for none.
        k_scale: By what keys are multiplied, float32: one number, or one for each kv
            head. None, as `v_scale`, for a cache that is not fp8.
        v_scale: Likewise values.

    Returns:
        How to do so in another layer.
    """
    num_rows, num_q_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    measure = statistics is not None
    piece = piece_size(block_size, plan.tile)
    max_pieces = pieces_of(scratch.max_blocks, block_size, plan.tile)
    head_padded = next_power_of_2(head_size)
    is_fp8 = k_scale is not None and v_scale is not None
    if is_fp8:
        kv_cache = kv_cache.view(torch.int16)
        head_padded = max(2 * MIN_WIDTH, head_padded)
    group_padded = next_power_of_2(group)
    # without statistics no program touches them
    statistics_or_nothing = scratch.partial_lse if statistics is None else statistics
    stride_statistics_block = 0 if statistics is None else statistics.stride(0)
    launch_dependent = {"launch_pdl": True} if plan.dependent_launch else {}
    # columns are dealt out as tensor cores lay them out; float32 uses none, so that its
    # columns stay in natural order
    warps_of_a_tile = min(plan.num_warps, plan.tile // piece)
    if query.dtype == torch.float32:
        warps_of_a_tile = 1

    of_layer = ["query_ptr", "kv_cache_ptr", "output_ptr"]
    of_layer += ["statistics_ptr"] * measure + ["sinks_ptr"] * (sinks is not None)
    of_layer += ["k_scale_ptr", "v_scale_ptr"] * is_fp8
    attend = _launch_attend(
        (num_kv_heads, plan.most_splits(num_rows), 1),
        {"num_warps": plan.num_warps, "num_stages": plan.num_stages},
        query_ptr=query,
        kv_cache_ptr=kv_cache,
        # without sinks no program touches them
        sinks_ptr=query if sinks is None else sinks,
        k_scale_ptr=scratch.partial_lse if k_scale is None else k_scale,
        v_scale_ptr=scratch.partial_lse if v_scale is None else v_scale,
        splits_ptr=splits.splits,
        arrivals_ptr=splits.arrivals,
        live_table_ptr=live_table,
        measured_lens_ptr=measured_lens,
        evicted_before_ptr=evicted_before,
        statistics_ptr=statistics_or_nothing,
        output_ptr=output,
        partial_output_ptr=scratch.partial_output,
        partial_lse_ptr=scratch.partial_lse,
        partial_sums_ptr=scratch.partial_sums,
        logit_scale=logit_scale(scale, soft_cap),
        soft_cap=soft_cap,
        stride_query_row=query.stride(0),
        stride_query_head=query.stride(1),
        stride_cache_block=kv_cache.stride(0),
        stride_cache_head=kv_cache.stride(1),
        stride_cache_token=kv_cache.stride(2),
        stride_k_scale=fp8.scale_stride(k_scale),
        stride_v_scale=fp8.scale_stride(v_scale),
        stride_table_row=live_table.stride(0),
        stride_statistics_block=stride_statistics_block,
        stride_output_row=output.stride(0),
        stride_output_head=output.stride(1),
        max_pieces=max_pieces,
        GROUP=group,
        DOT_GROUP=max(MIN_GROUP, group_padded),
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        TILE=plan.tile,
        UPDATED_BLOCKS=UPDATED_BLOCKS,
        MERGED_APART=plan.merged_apart,
        SOFT_CAP=soft_cap != 0.0,
        SINKS=sinks is not None,
        MEASURE=measure,
        FP8=is_fp8,
        NATIVE_FP8=is_fp8 and fp8.converts_natively(query.device),
        WARPS=warps_of_a_tile,
        PDL=plan.dependent_launch and plan.merged_apart,
    )

    attend_places = attend.places(*of_layer)
    if not plan.merged_apart:
        return DecodeLaunch(attend, attend_places, None, ())
    parts = group
    if measure:
        parts += cdiv(scratch.max_blocks, COMBINE_BLOCKS)
    combine = _launch_combine(
        (num_kv_heads, parts, num_rows),
        {"num_warps": 1 if plan.splits <= 8 else 4, **launch_dependent},
        partial_output_ptr=scratch.partial_output,
        partial_lse_ptr=scratch.partial_lse,
        partial_sums_ptr=scratch.partial_sums,
        splits_of_rows_ptr=splits.of_rows,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        measured_lens_ptr=measured_lens,
        evicted_before_ptr=evicted_before,
        statistics_ptr=statistics_or_nothing,
        output_ptr=output,
        stride_table_row=live_table.stride(0),
        stride_statistics_block=stride_statistics_block,
        stride_output_row=output.stride(0),
        stride_output_head=output.stride(1),
        max_pieces=max_pieces,
        GROUP=group,
        GROUP_PADDED=group_padded,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        # at a time; of rows longer than the mean there are more
        SPLITS=next_power_of_2(plan.splits),
        COMBINE_BLOCKS=COMBINE_BLOCKS,
        PDL=plan.dependent_launch,
    )
    combine_places = combine.places("output_ptr", *["statistics_ptr"] * measure)
    return DecodeLaunch(attend, attend_places, combine, combine_places)
