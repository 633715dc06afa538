# SPDX-License-Identifier: Apache-2.0
"""Chooses the blocks that a sequence gives up, and the moves that follow from it.

The arithmetic is `vllm_roco.policy`'s. Three launches: `score_blocks` reduces the
statistics of a slice of the layers to each block's largest share in any of their heads;
`contribution` does so for shields that need the values, too; `_select_kernel` takes the
largest of all slices, shields, picks the victims and writes the moves, one program a
row. All return at once where nothing is due, so they may be part of every step. Where
ranks share a layer's heads, `merge_slices` comes before the last.

The `k` smallest of a set are found without sorting. A score is not negative, so its
bits order as an integer does, and the k-th smallest is built bit by bit from counts,
exactly and in fixed order. Of several blocks that have it, the oldest are found in the
same way, by their first positions, of which no two are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vllm_roco.ops.contribution import shield_by_contribution
from vllm_roco.ops.planned_moves import store_moves, write_moves
from vllm_roco.ops.rows import (
    FLAGS,
    NEIGHBOUR_SHARE,
    NUM_ROW_FIELDS,
    RECENT,
    RESIDENT_BLOCKS,
    SCORE_MASK,
    SCORE_NONE,
    SCORE_RANDOM,
    SEED,
    SHIELD_BLOCKS,
    SHIELD_BY_CONTRIBUTION,
    SINK,
)
from vllm_roco.ops.score_blocks import padded, score_blocks, warps_per_row
from vllm_roco.ops.statistics import FIRST_POSITION, NUM_FIELDS


@triton.jit
def _random_order(first_position, seed):
    """Return whole float32 numbers below 2^24; see `policy.random_order`."""
    x = first_position.to(tl.uint32) * 0x9E3779B1
    x ^= seed.to(tl.uint32)
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return (x >> 8).to(tl.float32)


@triton.jit
def _without_statistics(score, first_position, kind, seed):
    """Return what the second stage goes by, of blocks: `score` unless it needs none."""
    if kind == SCORE_NONE:
        score = tl.zeros_like(score)
    elif kind == SCORE_RANDOM:
        score = _random_order(first_position, seed)
    return score


@triton.jit
def _kth_smallest(numbers, among, count):
    """Return the count-th smallest number in a set of int32, none of them negative."""
    found = tl.zeros([], tl.int32)
    for step in tl.range(31):
        trial = found | (1 << (30 - step))
        below = tl.sum((among & (numbers < trial)).to(tl.int32), 0)
        found = tl.where(below < count, trial, found)
    return found


@triton.jit
def _smallest(score, first, among, count):
    """Return which `count` blocks of a set go, at least one: a mask like `among`."""
    bits = score.to(tl.int32, bitcast=True)
    largest = _kth_smallest(bits, among, count)
    chosen = among & (bits < largest)
    equal = among & (bits == largest)
    missing = count - tl.sum(chosen.to(tl.int32), 0)
    # mostly there is one, which is taken
    if tl.sum(equal.to(tl.int32), 0) > missing:
        equal &= first <= _kth_smallest(first, equal, missing)
    return chosen | equal


@triton.jit
def _with_neighbours(
    value,  # [BLOCKS] float32
    first,  # [BLOCKS] int32, first positions
    among,  # [BLOCKS], the blocks that count, the first ones
    values_ptr,  # [num_places] float32, scratch
    places_ptr,  # [num_places] int32, scratch
    table_ptr,  # [live_width] int32, of one row
    first_positions_ptr,
    stride_statistics_block,
    num_blocks,  # that count
    num_places,  # as many or more
    BLOCK_SIZE: tl.constexpr,
):
    """Return at least a share of the neighbours'; see `policy.with_neighbours`.

    Live order is not the text's, so every block notes itself at a place that its number
    in the text tells, and looks whom it finds at those of its neighbours. Of blocks
    that want the same place one gets it, and the others note themselves in the next
    round. What is found is asked for its position, whoever has noted it and when.
    """
    index = tl.arange(0, value.shape[0])
    # never negative, but what is written to must not depend on what is in a page
    number = tl.maximum(first, 0) // BLOCK_SIZE
    place = number % num_places
    tl.store(values_ptr + index, value, mask=among)
    lent = tl.zeros_like(value)
    missing = among
    while tl.max(missing.to(tl.int32), 0) > 0:
        # everybody has looked at what the round before, or another kernel, noted
        tl.debug_barrier()
        tl.store(places_ptr + place, index, mask=missing)
        tl.debug_barrier()
        missing &= tl.load(places_ptr + place, mask=missing, other=0) != index
        for side in tl.static_range(-1, 2, 2):
            other = tl.load(
                places_ptr + (number + side + num_places) % num_places,
                mask=among,
                other=-1,
            )
            noted = (other >= 0) & (other < num_blocks)
            block = tl.load(table_ptr + other, mask=noted, other=0).to(tl.int64)
            position = tl.load(
                first_positions_ptr + block * stride_statistics_block,
                mask=noted,
                other=0.0,
            ).to(tl.int32)
            is_beside = noted & (position == first + side * BLOCK_SIZE)
            theirs = tl.load(values_ptr + other, mask=is_beside, other=0.0)
            lent = tl.maximum(lent, theirs)
    return tl.maximum(value, lent * NEIGHBOUR_SHARE)


@triton.jit(
    do_not_specialize=[
        "num_slices",
        "stride_scores_row",
        "stride_scores_slice",
        "max_blocks",
        "stride_table_row",
        "max_moves",
    ],
    do_not_specialize_on_alignment=["seq_lens_ptr"],
)
def _select_kernel(
    first_statistics_ptr,  # [num_layers] int64, address of block 0's statistics
    scores_ptr,  # [num_rows, num_slices, SCORES, max_blocks] float32
    seq_lens_ptr,  # [num_rows] int32
    live_table_ptr,  # [num_rows, live_width] int32
    evicted_before_ptr,  # [num_rows] int32
    evicted_after_ptr,  # [num_rows] int32
    rows_ptr,  # [num_rows, NUM_ROW_FIELDS] int32
    moves_ptr,  # [num_rows, max_moves, 2] int32
    num_moves_ptr,  # [num_rows] int32
    moved_ptr,  # [1] int64
    num_slices,
    stride_scores_row,
    stride_scores_slice,
    max_blocks,
    stride_table_row,
    stride_statistics_block,
    max_moves,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    evicted = tl.load(evicted_before_ptr + row)
    num_victims = tl.load(evicted_after_ptr + row) - evicted
    if num_victims == 0:
        tl.store(num_moves_ptr + row, 0)
        return

    num_tokens = tl.load(seq_lens_ptr + row)
    rows_ptr += row * NUM_ROW_FIELDS
    resident = tl.load(rows_ptr + RESIDENT_BLOCKS)
    sink = tl.load(rows_ptr + SINK)
    recent = tl.load(rows_ptr + RECENT)
    shield_blocks = tl.load(rows_ptr + SHIELD_BLOCKS)
    flags = tl.load(rows_ptr + FLAGS)
    kind = flags & SCORE_MASK
    table_ptr = live_table_ptr + row * stride_table_row
    index = tl.arange(0, BLOCKS)
    candidate = index < resident + num_victims
    num_full = num_tokens // BLOCK_SIZE - evicted
    full = index < num_full
    block = tl.load(table_ptr + index, mask=full, other=0).to(tl.int64)
    # every layer holds the same first position, behind its heads' statistics
    statistics = tl.load(first_statistics_ptr).to(tl.pointer_type(tl.float32))
    first_positions = statistics + NUM_KV_HEADS * NUM_FIELDS + FIRST_POSITION
    first = tl.load(
        first_positions + block * stride_statistics_block, mask=full, other=0.0
    ).to(tl.int32)
    score = tl.zeros([BLOCKS], tl.float32)
    shield = tl.zeros([BLOCKS], tl.float32)
    scores_ptr += row * stride_scores_row
    for layer_slice in tl.range(num_slices):
        slot = scores_ptr + layer_slice * stride_scores_slice
        score = tl.maximum(score, tl.load(slot + index, mask=candidate, other=0.0))
        shield = tl.maximum(
            shield, tl.load(slot + max_blocks + index, mask=full, other=0.0)
        )
    if (flags & SHIELD_BY_CONTRIBUTION) != 0:
        # what the first slice told has been read
        shield = _with_neighbours(
            shield,
            first,
            full,
            scores_ptr + max_blocks,
            scores_ptr.to(tl.pointer_type(tl.int32)),
            table_ptr,
            first_positions,
            stride_statistics_block,
            num_full,
            max_blocks,
            BLOCK_SIZE,
        )

    in_reach = candidate & (first >= sink) & (first + BLOCK_SIZE <= num_tokens - recent)
    num_in_reach = tl.sum(in_reach.to(tl.int32), 0)
    num_exposed = num_in_reach - tl.minimum(shield_blocks, num_in_reach - num_victims)
    exposed = _smallest(shield, first, in_reach, num_exposed)
    score = _without_statistics(score, first, kind, tl.load(rows_ptr + SEED))
    victim = _smallest(score, first, exposed, num_victims)

    is_resident = index < resident
    count = write_moves(
        moves_ptr + row * max_moves * 2,
        table_ptr,
        index,
        candidate & ~is_resident & ~victim,
        victim & is_resident,
    )
    store_moves(count, row, num_moves_ptr, moved_ptr)


def select_victims(
    *,
    first_page_of_layer: torch.Tensor,
    first_statistics_of_layer: torch.Tensor,
    page_bytes: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    seq_lens: torch.Tensor,
    live_table: torch.Tensor,
    evicted_before: torch.Tensor,
    evicted_after: torch.Tensor,
    rows: torch.Tensor,
    scores: torch.Tensor,
    moves: torch.Tensor,
    num_moves: torch.Tensor,
    moved: torch.Tensor,
    block_size: int,
    of_all_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write the moves that end the step, for policies that measure.

    Args:
        first_page_of_layer: `[num_layers]` int64, see `ops.move_blocks.first_pages`.
        first_statistics_of_layer: `[num_layers]` int64, see
            `ops.score_blocks.first_statistics`.
        page_bytes: Bytes of a page, tail included.
        num_kv_heads: KV heads of a layer on this rank.
        head_size: Numbers of a key, and of a value.
        dtype: Of keys and values as they are stored; uint8 for fp8.
        seq_lens: `[num_rows]` int32, computed tokens after the step.
        live_table: `[num_rows, live_width]` int32, see `ops.live_table`.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        evicted_after: `[num_rows]` int32, `E` at its end.
        rows: `[num_rows, NUM_ROW_FIELDS]` int32, contiguous, how each row evicts.
        scores: `[num_rows, num_slices, SCORES, max_blocks]` float32 scratch,
            contiguous; `max_blocks` bounds a row's full live blocks, and the layers are
            shared out among the slices.
        moves: `[num_rows, max_moves, 2]` int32, contiguous, output: source and
            destination block of each move.
        num_moves: `[num_rows]` int32, output.
        moved: `[1]` int64, to which the moves are added.
        block_size: Tokens per block.
        of_all_ranks: Turns this rank's scores into those of all ranks that choose
            together, `[num_rows, any, SCORES, any]` float32; None for one rank.
    """
    score_blocks(
        first_statistics_of_layer=first_statistics_of_layer,
        page_bytes=page_bytes,
        num_kv_heads=num_kv_heads,
        seq_lens=seq_lens,
        live_table=live_table,
        evicted_before=evicted_before,
        evicted_after=evicted_after,
        rows=rows,
        scores=scores,
        block_size=block_size,
    )
    shield_by_contribution(
        first_page_of_layer=first_page_of_layer,
        first_statistics_of_layer=first_statistics_of_layer,
        page_bytes=page_bytes,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        seq_lens=seq_lens,
        live_table=live_table,
        evicted_before=evicted_before,
        evicted_after=evicted_after,
        rows=rows,
        shields=scores[:, :, 1],
        block_size=block_size,
    )
    blocks = padded(scores.shape[3])
    if of_all_ranks is not None:
        scores = of_all_ranks(scores)
    _select_kernel[(len(scores),)](
        first_statistics_ptr=first_statistics_of_layer,
        scores_ptr=scores,
        seq_lens_ptr=seq_lens,
        live_table_ptr=live_table,
        evicted_before_ptr=evicted_before,
        evicted_after_ptr=evicted_after,
        rows_ptr=rows,
        moves_ptr=moves,
        num_moves_ptr=num_moves,
        moved_ptr=moved,
        num_slices=scores.shape[1],
        stride_scores_row=scores.stride(0),
        stride_scores_slice=scores.stride(1),
        max_blocks=scores.stride(2),
        stride_table_row=live_table.stride(0),
        stride_statistics_block=page_bytes // torch.float32.itemsize,
        max_moves=moves.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        BLOCKS=blocks,
        num_warps=warps_per_row(blocks),
    )
