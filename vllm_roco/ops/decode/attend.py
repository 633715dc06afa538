# SPDX-License-Identifier: Apache-2.0
"""The first kernel of decode attention: attends, and sums up each block.

A program has a split of a row's keys, see `splits`, and goes through it with an online
softmax over tiles of tokens; see `attention`. A head's learned sink enters here, as one
more key without a value, in a row's last split alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_roco.ops.decode.merge import merge_by_last
from vllm_roco.ops.decode.partial_sums import split_range, update_statistics
from vllm_roco.ops.decode.splits import SPLIT_FIELDS
from vllm_roco.ops.fp8 import halves, load_scale, query_for_halves
from vllm_roco.ops.logits import LOG2_E, cap_logits
from vllm_roco.ops.statistics import read_statistics

NUM_SPLIT_FIELDS = tl.constexpr(SPLIT_FIELDS)


@triton.jit
def _token_order(TILE: tl.constexpr, PIECE: tl.constexpr, WARPS: tl.constexpr):
    """Return a tile's tokens in the order of its columns.

    Warps take turns at a tile's columns, eight at a time. Dealt out like that, a piece
    lies in one warp, which sums it up alone, and beside the warp's other pieces.
    """
    RUN: tl.constexpr = 8
    column = tl.arange(0, TILE)
    run = column // RUN
    pieces_of_a_warp = TILE // (WARPS * PIECE)
    piece = run % WARPS * pieces_of_a_warp + run // (WARPS * (PIECE // RUN))
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
        tl.permute(runs, [0, 3, 1, 2, 4]), [GROUP_PADDED, TILE // PIECE, PIECE]
    )


@triton.jit(do_not_specialize=["stride_table_row", "max_pieces"])
def attend_kernel(
    query_ptr,  # [num_rows, num_q_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size], FP8 in pairs
    sinks_ptr,  # [num_q_heads], base e
    k_scale_ptr,  # [1] or [num_kv_heads] float32, with FP8
    v_scale_ptr,  # likewise
    splits_ptr,  # [most_splits, SPLIT_FIELDS] int32, as `DecodeSplits` has it
    arrivals_ptr,  # [kept_splits, num_kv_heads] int32, likewise
    live_table_ptr,  # [num_rows, live_width] int32
    measured_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    statistics_ptr,  # [num_blocks, num_kv_heads + 1, NUM_FIELDS] float32
    output_ptr,  # [num_rows, num_q_heads, head_size]
    partial_output_ptr,  # [kept_splits, num_q_heads, head_size] float32
    partial_lse_ptr,  # [kept_splits, num_q_heads] float32, base 2
    partial_sums_ptr,  # [num_rows, num_kv_heads, max_pieces, GROUP] float32, base 2
    logit_scale,  # softmax scale * log2(e), without soft cap: else the softmax scale
    soft_cap,
    stride_query_row,
    stride_query_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_token,
    stride_k_scale,
    stride_v_scale,
    stride_table_row,
    stride_statistics_block,
    stride_output_row,
    stride_output_head,
    max_pieces,
    GROUP: tl.constexpr,
    DOT_GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    UPDATED_BLOCKS: tl.constexpr,
    MERGED_APART: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    MEASURE: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    if PDL:
        # lets the combining kernel take its place early; it waits for this one's end
        tl.extra.cuda.gdc_launch_dependents()

    splits_ptr += place * NUM_SPLIT_FIELDS
    # volatile: else those that are not compared would be loaded behind the comparison
    row = tl.load(splits_ptr, volatile=True).to(tl.int64)
    split = tl.load(splits_ptr + 1, volatile=True)
    num_splits = tl.load(splits_ptr + 2, volatile=True)
    length = tl.load(splits_ptr + 3, volatile=True)
    first_kept = tl.load(splits_ptr + 4, volatile=True).to(tl.int64)
    if num_splits == 0:
        return
    # none of an empty row, which still gets its zeros
    first_tile, last_tile = split_range(length, split, num_splits, TILE)

    # numbers that lie in one element of the cache
    PACKED: tl.constexpr = 2 if FP8 else 1
    WIDTH: tl.constexpr = HEAD_SIZE // PACKED
    WIDTH_PADDED: tl.constexpr = HEAD_PADDED // PACKED
    group = tl.arange(0, DOT_GROUP)
    dim = tl.arange(0, WIDTH_PADDED)
    token = _token_order(TILE, PIECE, WARPS)
    head = kv_head * GROUP + group
    query_mask = (group < GROUP)[:, None] & (dim < WIDTH)[None, :]

    # [DOT_GROUP, WIDTH_PADDED]
    query_ptr += row * stride_query_row
    query_ptrs = query_ptr + head[:, None] * stride_query_head + PACKED * dim[None, :]
    query = tl.load(query_ptrs, mask=query_mask, other=0.0)
    if FP8:
        second_query = tl.load(query_ptrs + 1, mask=query_mask, other=0.0)
        query, second_query, factor = query_for_halves(query, second_query)
        k_scale = load_scale(k_scale_ptr, stride_k_scale, kv_head, NATIVE_FP8)
        logit_scale *= k_scale * factor[:, None]
    keys_ptr = kv_cache_ptr + kv_head * stride_cache_head
    table_ptr = live_table_ptr + row * stride_table_row
    partial_sums_ptr += (row * num_kv_heads + kv_head) * max_pieces * GROUP
    if MEASURE:
        measured = tl.load(measured_lens_ptr + row)
    if MEASURE and not MERGED_APART:
        # whoever sees or merges every key updates the statistics itself: what it will
        # add to is on its way while it attends
        index = tl.arange(0, UPDATED_BLOCKS)
        live_block, before = read_statistics(
            statistics_ptr,
            stride_statistics_block,
            kv_head,
            table_ptr,
            index,
            measured,
            BLOCK_SIZE,
        )

    PIECES: tl.constexpr = TILE // PIECE
    piece = tl.arange(0, PIECES)
    running_max = tl.full([DOT_GROUP], float("-inf"), tl.float32)
    # a sum for each place in the tile: they are added up once, at the end, so that no
    # tile waits for a sum over several warps
    running_sum = tl.zeros([DOT_GROUP, TILE], tl.float32)
    accumulated = tl.zeros([DOT_GROUP, WIDTH_PADDED], tl.float32)
    if FP8:
        second_accumulated = tl.zeros([DOT_GROUP, WIDTH_PADDED], tl.float32)
    if SINKS:
        # a key without a value, before all others; in other splits than the last the
        # first tile's decay of 0 takes the sum away
        sink = tl.load(sinks_ptr + head, mask=group < GROUP, other=0.0)
        is_last = split == num_splits - 1
        running_max = tl.where(is_last, sink.to(tl.float32) * LOG2_E, running_max)
        running_sum += 1.0 / TILE

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
        if WIDTH_PADDED != WIDTH:
            content_mask &= (dim < WIDTH)[None, :]
        # keys and values are loaded alike, [TILE, WIDTH_PADDED], to share addresses
        keys = tl.load(
            content_ptr, mask=content_mask, other=0, eviction_policy="evict_first"
        )
        if FP8:
            keys, second = halves(keys, NATIVE_FP8)
            second = second.to(query.dtype)
            logits = tl.dot(second_query, tl.trans(second), input_precision="ieee")
            logits = tl.dot(
                query,
                tl.trans(keys.to(query.dtype)),
                acc=logits,
                input_precision="ieee",
            )
        else:
            logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
        logits *= logit_scale
        if SOFT_CAP:
            logits = cap_logits(logits, soft_cap)
        logits = tl.where(visible[None, :], logits, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(logits, 1))
        weights = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(running_max - new_max)
        running_sum = running_sum * decay[:, None] + weights
        if MEASURE:
            piece_sum = tl.sum(_by_piece(weights, DOT_GROUP, TILE, PIECE, WARPS), 2)
            number = tile * PIECES + piece
            # read once, soon: they stay in the L2 cache while keys and values pass
            tl.store(
                partial_sums_ptr + number[None, :] * GROUP + group[:, None],
                tl.log2(piece_sum) + new_max[:, None],
                mask=(group < GROUP)[:, None] & (number * PIECE < measured)[None, :],
                eviction_policy="evict_last",
            )

        values = tl.load(
            content_ptr + WIDTH,
            mask=content_mask,
            other=0,
            eviction_policy="evict_first",
        )
        if FP8:
            values, second = halves(values, NATIVE_FP8)
            values = values.to(query.dtype)
            second_accumulated = tl.dot(
                weights.to(query.dtype),
                second.to(query.dtype),
                acc=second_accumulated * decay[:, None],
                input_precision="ieee",
            )
        accumulated = tl.dot(
            weights.to(values.dtype),
            values,
            acc=accumulated * decay[:, None],
            input_precision="ieee",
        )
        running_max = new_max

    if FP8:
        v_scale = load_scale(v_scale_ptr, stride_v_scale, kv_head, NATIVE_FP8)
        accumulated = tl.interleave(accumulated, second_accumulated) * v_scale
        dim = tl.arange(0, HEAD_PADDED)
        query_mask = (group < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    # the largest logit alone adds 1 to the sum, so only an empty row is changed here
    total = tl.sum(running_sum, 1)
    normalised = accumulated / tl.maximum(total, 1.0)[:, None]
    lse = running_max + tl.log2(total)
    num_q_heads = num_kv_heads * GROUP
    if MERGED_APART:
        mine = (first_kept + split) * num_q_heads
        partial_output_ptr += (mine + head[:, None]) * HEAD_SIZE
        tl.store(partial_output_ptr + dim[None, :], normalised, mask=query_mask)
        partial_lse_ptr += mine
        tl.store(partial_lse_ptr + head, lse, mask=group < GROUP)
    else:
        is_last = num_splits == 1
        if num_splits > 1:
            is_last, normalised, lse = merge_by_last(
                partial_output_ptr + first_kept * num_q_heads * HEAD_SIZE,
                partial_lse_ptr + first_kept * num_q_heads,
                arrivals_ptr + first_kept * num_kv_heads + kv_head,
                normalised,
                lse,
                split,
                num_splits,
                num_q_heads,
                head,
                dim,
                group < GROUP,
                query_mask,
                HEAD_SIZE,
            )
        if is_last:
            output_ptr += row * stride_output_row
            tl.store(
                output_ptr + head[:, None] * stride_output_head + dim[None, :],
                normalised.to(output_ptr.dtype.element_ty),
                mask=query_mask,
            )
            if MEASURE:
                # what other threads have stored is visible behind the barrier
                tl.debug_barrier()
                evicted = tl.load(evicted_before_ptr + row)
                num_blocks = tl.cdiv(measured, BLOCK_SIZE)
                for first_index in range(0, num_blocks, UPDATED_BLOCKS):
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
                        measured,
                        evicted,
                        GROUP,
                        DOT_GROUP,
                        BLOCK_SIZE,
                        PIECE,
                    )
                    index = first_index + UPDATED_BLOCKS + tl.arange(0, UPDATED_BLOCKS)
                    live_block, before = read_statistics(
                        statistics_ptr,
                        stride_statistics_block,
                        kv_head,
                        table_ptr,
                        index,
                        measured,
                        BLOCK_SIZE,
                    )
