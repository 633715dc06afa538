# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the live table, measuring every block's attention mass.

One query a row. Two launches: `_attend_kernel` splits the keys of a (row, kv head)
over several programs, each with an online softmax over tiles of tokens;
`_combine_kernel` merges the splits and, knowing the final log-sum-exp, turns what the
first kernel noted of each block into its mass and updates the statistics.

With `s` the logits, `m` the running maximum and `L` the log-sum-exp of a query head,
all in base 2, the first kernel notes the `m` of each tile and, out of the weights it
needs anyway, `w = sum_t 2^(s_t - m)` for each piece of a block; the second computes
`a = mean_g sum_pieces w * 2^(m - L)`. A piece is the part of a block that lies in one
tile, the whole block as a rule.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_roco.ops.decode_plan import (
    DecodePlan,
    DecodeScratch,
    piece_size,
    pieces_and_tiles,
)
from vllm_roco.ops.statistics import (
    NUM_FIELDS,
    read_statistics,
    write_statistics,
)

# tensor cores multiply at least 16 rows
MIN_GROUP = 16
# live blocks whose statistics a program updates at a time: many where it has attended
# over all of them, few where each is a program of its own
CLOSING_BLOCKS = 128
COMBINE_BLOCKS = 32

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _split_range(length, split, num_splits, TILE: tl.constexpr):
    """Return the first tile of a split and the one behind its last."""
    num_tiles = tl.cdiv(length, TILE)
    return split * num_tiles // num_splits, (split + 1) * num_tiles // num_splits


@triton.jit
def _token_order(TILE: tl.constexpr, PIECE: tl.constexpr, WARPS: tl.constexpr):
    """Return a tile's tokens in the order of its columns.

    Warps take turns at a tile's columns, eight at a time. Dealt out like that, a piece
    lies in one warp, which sums it up alone.
    """
    RUN: tl.constexpr = 8
    column = tl.arange(0, TILE)
    run = column // RUN
    piece = run // (WARPS * (PIECE // RUN)) * WARPS + run % WARPS
    return piece * PIECE + run // WARPS % (PIECE // RUN) * RUN + column % RUN


@triton.jit
def _by_piece(
    columns,  # [GROUP_PADDED, TILE]
    GROUP_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Return `[GROUP_PADDED, TILE // PIECE, PIECE]`; see `_token_order`."""
    RUN: tl.constexpr = 8
    runs = tl.reshape(
        columns,
        [GROUP_PADDED, TILE // (WARPS * PIECE), PIECE // RUN, WARPS, RUN],
    )
    return tl.reshape(
        tl.permute(runs, [0, 1, 3, 2, 4]), [GROUP_PADDED, TILE // PIECE, PIECE]
    )


@triton.jit
def _log_sum_exp(
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    row_head,  # row * num_q_heads + the group's first query head
    length,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Return `[GROUP_PADDED]`, the log-sum-exp of a group's query heads in base 2."""
    split = tl.arange(0, SPLITS_PADDED)
    group = tl.arange(0, GROUP_PADDED)
    first_tile, last_tile = _split_range(length, split, num_splits, TILE)
    used = (split < num_splits) & (first_tile < last_tile)
    slot = (row_head + group) * num_splits
    # [GROUP_PADDED, SPLITS_PADDED]
    split_lse = tl.load(
        partial_lse_ptr + slot[:, None] + split[None, :],
        mask=(group < GROUP)[:, None] & used[None, :],
        other=float("-inf"),
    )
    largest = tl.where(group < GROUP, tl.max(split_lse, 1), 0.0)
    return largest + tl.log2(tl.sum(tl.exp2(split_lse - largest[:, None]), 1))


@triton.jit
def _mass(
    notes_ptr,  # [max_pieces + max_tiles, GROUP] float32, of one row and kv head
    max_pieces,
    index,  # [N], places in the live table
    length,
    lse,  # [GROUP_PADDED] float32, base 2
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return `[N]`, the attention mass of one query in live blocks of one kv head."""
    PIECES: tl.constexpr = BLOCK_SIZE // PIECE
    group = tl.arange(0, GROUP_PADDED)[None, :]
    mass = tl.zeros(index.shape, tl.float32)
    for piece in tl.static_range(PIECES):
        number = (index * PIECES + piece)[:, None]
        # [N, GROUP_PADDED]
        noted = (number * PIECE < length) & (group < GROUP)
        piece_sum = tl.load(notes_ptr + number * GROUP + group, mask=noted, other=0.0)
        tile_max = tl.load(
            notes_ptr + (max_pieces + number * PIECE // TILE) * GROUP + group,
            mask=noted,
            other=0.0,
        )
        share = tl.where(noted, piece_sum * tl.exp2(tile_max - lse[None, :]), 0.0)
        mass += tl.sum(share, 1)
    return mass / GROUP


@triton.jit(do_not_specialize=["stride_table_row", "max_pieces", "max_tiles"])
def _attend_kernel(
    query_ptr,  # [num_rows, num_q_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    statistics_ptr,  # [num_blocks, num_kv_heads, NUM_FIELDS] float32
    output_ptr,  # [num_rows, num_q_heads, head_size]
    partial_output_ptr,  # [num_rows, num_q_heads, splits, head_size] float32
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    notes_ptr,  # [num_rows, num_kv_heads, max_pieces + max_tiles, GROUP] float32
    logit_scale,  # softmax scale * log2(e), without soft cap: else the softmax scale
    soft_cap,
    stride_query_row,
    stride_query_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_token,
    stride_table_row,
    stride_statistics_block,
    stride_output_row,
    stride_output_head,
    max_pieces,
    max_tiles,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DOT_GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    CLOSING_BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MEASURE: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(0)
    num_splits = tl.num_programs(1)
    if PDL:
        # lets the combining kernel take its place early; it waits for this one's end
        tl.extra.cuda.gdc_launch_dependents()

    length = tl.load(live_lens_ptr + row)
    first_tile, last_tile = _split_range(length, split, num_splits, TILE)
    # with one split, an empty row must still write its zeros
    if SPLIT and first_tile >= last_tile:
        return

    group = tl.arange(0, DOT_GROUP)
    dim = tl.arange(0, HEAD_PADDED)
    token = _token_order(TILE, PIECE, WARPS)
    head = kv_head * GROUP + group
    query_mask = (group < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]

    # [DOT_GROUP, HEAD_PADDED]
    query = tl.load(
        query_ptr
        + row * stride_query_row
        + head[:, None] * stride_query_head
        + dim[None, :],
        mask=query_mask,
        other=0.0,
    )
    keys_ptr = kv_cache_ptr + kv_head * stride_cache_head
    table_ptr = live_table_ptr + row * stride_table_row
    max_notes = max_pieces + max_tiles
    notes_ptr += (row * num_kv_heads + kv_head) * max_notes * GROUP
    maxima_ptr = notes_ptr + max_pieces * GROUP
    if MEASURE and not SPLIT:
        # whoever sees every key closes the books itself: what it will add to is on its
        # way while it attends
        statistics_ptr += kv_head * NUM_FIELDS
        index = tl.arange(0, CLOSING_BLOCKS)
        live_block, before = read_statistics(
            statistics_ptr,
            stride_statistics_block,
            table_ptr,
            index,
            length,
            BLOCK_SIZE,
        )

    PIECES: tl.constexpr = TILE // PIECE
    piece = tl.arange(0, PIECES)
    running_max = tl.full([DOT_GROUP], float("-inf"), tl.float32)
    # a sum for each place in the tile: they are added up once, at the end, so that no
    # tile waits for a sum over several warps
    running_sum = tl.zeros([DOT_GROUP, TILE], tl.float32)
    accumulated = tl.zeros([DOT_GROUP, HEAD_PADDED], tl.float32)

    # block ids are read a tile ahead, so that the loads of K and V depend on no load of
    # their own iteration and are pipelined to the full depth
    position = first_tile * TILE + token
    block = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < length, other=0)
    for tile in tl.range(first_tile, last_tile):
        position = tile * TILE + token
        visible = position < length
        offset = token % BLOCK_SIZE if TILE % BLOCK_SIZE == 0 else position % BLOCK_SIZE
        slot = block.to(tl.int64) * stride_cache_block + offset * stride_cache_token
        following = position + TILE
        block = tl.load(
            table_ptr + following // BLOCK_SIZE, mask=following < length, other=0
        )

        content_ptr = keys_ptr + slot[:, None] + dim[None, :]
        content_mask = visible[:, None]
        if HEAD_PADDED != HEAD_SIZE:
            content_mask &= (dim < HEAD_SIZE)[None, :]
        # keys and values are loaded alike, [TILE, HEAD_PADDED], to share addresses
        keys = tl.load(
            content_ptr, mask=content_mask, other=0.0, eviction_policy="evict_first"
        )
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * logit_scale
        if SOFT_CAP:
            # tanh, in a form of which neither end overflows
            growth = tl.exp2(logits * (2.0 * _LOG2_E / soft_cap))
            logits = soft_cap * _LOG2_E * (1.0 - 2.0 / (growth + 1.0))
        logits = tl.where(visible[None, :], logits, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(running_max - new_max)
        running_sum = running_sum * decay[:, None] + weights
        if MEASURE:
            piece_sum = tl.sum(_by_piece(weights, DOT_GROUP, TILE, PIECE, WARPS), 2)
            number = tile * PIECES + piece
            tl.store(
                notes_ptr + number[None, :] * GROUP + group[:, None],
                piece_sum,
                mask=(group < GROUP)[:, None] & (number * PIECE < length)[None, :],
            )
            tl.store(maxima_ptr + tile * GROUP + group, new_max, mask=group < GROUP)

        values = tl.load(
            content_ptr + HEAD_SIZE,
            mask=content_mask,
            other=0.0,
            eviction_policy="evict_first",
        )
        accumulated = tl.dot(
            weights.to(values.dtype),
            values,
            acc=accumulated * decay[:, None],
            input_precision="ieee",
        )
        running_max = new_max

    # the largest logit alone adds 1 to the sum, so only an empty row is changed here
    total = tl.sum(running_sum, 1)
    normalised = accumulated / tl.maximum(total, 1.0)[:, None]
    slot_of_split = (row * num_kv_heads * GROUP + head) * num_splits + split
    if SPLIT:
        tl.store(
            partial_output_ptr + slot_of_split[:, None] * HEAD_SIZE + dim[None, :],
            normalised,
            mask=query_mask,
        )
    else:
        tl.store(
            output_ptr
            + row * stride_output_row
            + head[:, None] * stride_output_head
            + dim[None, :],
            normalised.to(output_ptr.dtype.element_ty),
            mask=query_mask,
        )
    if SPLIT or MEASURE:
        tl.store(
            partial_lse_ptr + slot_of_split,
            running_max + tl.log2(total),
            mask=group < GROUP,
        )
    if MEASURE and not SPLIT:
        # what the program's other threads have noted is visible behind the barrier
        tl.debug_barrier()
        evicted = tl.load(evicted_before_ptr + row)
        lse = _log_sum_exp(
            partial_lse_ptr,
            (row * num_kv_heads + kv_head) * GROUP,
            length,
            num_splits,
            GROUP,
            GROUP_PADDED,
            TILE,
            1,
        )
        num_blocks = tl.cdiv(length, BLOCK_SIZE)
        for first_index in range(0, num_blocks, CLOSING_BLOCKS):
            mass = _mass(
                notes_ptr,
                max_pieces,
                index,
                length,
                lse,
                GROUP,
                GROUP_PADDED,
                BLOCK_SIZE,
                PIECE,
                TILE,
            )
            write_statistics(
                statistics_ptr,
                stride_statistics_block,
                live_block,
                before,
                index,
                length,
                1,
                evicted,
                mass,
                mass * mass,
                mass,
                BLOCK_SIZE,
            )
            index = first_index + CLOSING_BLOCKS + tl.arange(0, CLOSING_BLOCKS)
            live_block, before = read_statistics(
                statistics_ptr,
                stride_statistics_block,
                table_ptr,
                index,
                length,
                BLOCK_SIZE,
            )


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
    """Write one query head's output, the average of its splits' outputs."""
    split = tl.arange(0, SPLITS_PADDED)
    dim = tl.arange(0, HEAD_PADDED)
    # a split without tiles wrote nothing
    first_tile, last_tile = _split_range(length, split, num_splits, TILE)
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


@triton.jit(
    do_not_specialize=["stride_table_row", "max_pieces", "max_tiles", "num_splits"]
)
def _combine_kernel(
    partial_output_ptr,  # [num_rows, num_q_heads, splits, head_size] float32
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    notes_ptr,  # [num_rows, num_kv_heads, max_pieces + max_tiles, GROUP] float32
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    statistics_ptr,  # [num_blocks, num_kv_heads, NUM_FIELDS] float32
    output_ptr,  # [num_rows, num_q_heads, head_size]
    stride_table_row,
    stride_statistics_block,
    stride_output_row,
    stride_output_head,
    max_pieces,
    max_tiles,
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
    row_kv_head = row * tl.num_programs(0) + kv_head
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
        if first_index * BLOCK_SIZE < length:
            # the first kernel leaves the statistics alone, so they may be read early
            index = first_index + tl.arange(0, COMBINE_BLOCKS)
            evicted = tl.load(evicted_before_ptr + row)
            statistics_ptr += kv_head * NUM_FIELDS
            live_block, before = read_statistics(
                statistics_ptr,
                stride_statistics_block,
                live_table_ptr + row * stride_table_row,
                index,
                length,
                BLOCK_SIZE,
            )
            if PDL:
                tl.extra.cuda.gdc_wait()
            lse = _log_sum_exp(
                partial_lse_ptr,
                row_kv_head * GROUP,
                length,
                num_splits,
                GROUP,
                GROUP_PADDED,
                TILE,
                SPLITS_PADDED,
            )
            mass = _mass(
                notes_ptr + row_kv_head * (max_pieces + max_tiles) * GROUP,
                max_pieces,
                index,
                length,
                lse,
                GROUP,
                GROUP_PADDED,
                BLOCK_SIZE,
                PIECE,
                TILE,
            )
            write_statistics(
                statistics_ptr,
                stride_statistics_block,
                live_block,
                before,
                index,
                length,
                1,
                evicted,
                mass,
                mass * mass,
                mass,
                BLOCK_SIZE,
            )


def decode_attention(
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
    soft_cap: float = 0.0,
) -> None:
    """Attend with one query a row and update the statistics of the blocks it saw.

    Tokens at and beyond a row's length are never read as numbers, whatever they hold. A
    row of length 0 gets zeros.

    Args:
        query: `[num_rows, num_q_heads, head_size]`; last dimension contiguous.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, K then V;
            last dimension contiguous, every other stride as it comes.
        live_table: `[>= num_rows, live_width]` int32, see `ops.live_table`.
        live_lens: `[>= num_rows]` int32, this step's token included.
        evicted_before: `[>= num_rows]` int32, `E` at the start of the step.
        statistics: `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, updated in place;
            None to measure nothing.
        output: `[num_rows, num_q_heads, head_size]`; last dimension contiguous.
        scratch: Memory for the partial results.
        plan: The launch's layout, see `plan_decode`.
        scale: Softmax scale.
        soft_cap: Bound of the logits' soft cap, 0 for none.
    """
    num_rows, num_q_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    measure = statistics is not None
    # without statistics a tile is one piece, which is the cheapest sum
    piece = piece_size(block_size, plan.tile) if measure else plan.tile
    max_pieces, max_tiles = pieces_and_tiles(scratch.max_blocks, block_size, plan.tile)
    head_padded = triton.next_power_of_2(head_size)
    group_padded = triton.next_power_of_2(group)
    # without statistics no program touches them
    statistics_or_nothing = scratch.partial_lse if statistics is None else statistics
    stride_statistics_block = 0 if statistics is None else statistics.stride(0)
    launch_dependent = {"launch_pdl": True} if plan.dependent_launch else {}
    # columns are dealt out as tensor cores lay them out; float32 uses none, so that its
    # columns stay in natural order
    warps_of_a_tile = min(plan.num_warps, plan.tile // piece)
    if query.dtype == torch.float32:
        warps_of_a_tile = 1

    _attend_kernel[(num_kv_heads, plan.splits, num_rows)](
        query_ptr=query,
        kv_cache_ptr=kv_cache,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        evicted_before_ptr=evicted_before,
        statistics_ptr=statistics_or_nothing,
        output_ptr=output,
        partial_output_ptr=scratch.partial_output,
        partial_lse_ptr=scratch.partial_lse,
        notes_ptr=scratch.notes,
        logit_scale=scale if soft_cap else scale * math.log2(math.e),
        soft_cap=soft_cap,
        stride_query_row=query.stride(0),
        stride_query_head=query.stride(1),
        stride_cache_block=kv_cache.stride(0),
        stride_cache_head=kv_cache.stride(1),
        stride_cache_token=kv_cache.stride(2),
        stride_table_row=live_table.stride(0),
        stride_statistics_block=stride_statistics_block,
        stride_output_row=output.stride(0),
        stride_output_head=output.stride(1),
        max_pieces=max_pieces,
        max_tiles=max_tiles,
        GROUP=group,
        GROUP_PADDED=group_padded,
        DOT_GROUP=max(MIN_GROUP, group_padded),
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        TILE=plan.tile,
        CLOSING_BLOCKS=CLOSING_BLOCKS,
        SPLIT=plan.splits > 1,
        SOFT_CAP=soft_cap != 0.0,
        MEASURE=measure,
        WARPS=warps_of_a_tile,
        PDL=plan.dependent_launch and plan.splits > 1,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )

    if plan.splits == 1:
        return
    parts = group
    if measure:
        parts += triton.cdiv(scratch.max_blocks, COMBINE_BLOCKS)
    _combine_kernel[(num_kv_heads, parts, num_rows)](
        partial_output_ptr=scratch.partial_output,
        partial_lse_ptr=scratch.partial_lse,
        notes_ptr=scratch.notes,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        evicted_before_ptr=evicted_before,
        statistics_ptr=statistics_or_nothing,
        output_ptr=output,
        stride_table_row=live_table.stride(0),
        stride_statistics_block=stride_statistics_block,
        stride_output_row=output.stride(0),
        stride_output_head=output.stride(1),
        max_pieces=max_pieces,
        max_tiles=max_tiles,
        num_splits=plan.splits,
        GROUP=group,
        GROUP_PADDED=group_padded,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        TILE=plan.tile,
        SPLITS_PADDED=triton.next_power_of_2(plan.splits),
        COMBINE_BLOCKS=COMBINE_BLOCKS,
        PDL=plan.dependent_launch,
        num_warps=1 if plan.splits <= 8 else 4,
        **launch_dependent,
    )
