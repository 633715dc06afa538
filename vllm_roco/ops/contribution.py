# SPDX-License-Identifier: Apache-2.0
"""What each block contributed to an output, of blocks that may have to go.

The arithmetic is `vllm_roco.policy`'s: the peak of a block's attention mass times the
distance of its mean value from the mean of all. A program has one layer and head, and
its part of the rows that are due. Of each it reads the values twice, for their mean and
for the distances from it; the second time backwards, while the last ones are at hand.
It returns at once where no row is due.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_roco.ops.fp8 import unpack
from vllm_roco.ops.rows import FLAGS, NUM_ROW_FIELDS, SHIELD_BY_CONTRIBUTION
from vllm_roco.ops.statistics import MASS_PEAK, NUM_FIELDS

# smallest normal float32: keeps a head that nobody listened to from dividing by zero
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_ALIGNMENT = tl.constexpr(16)
# numbers of the means that a program works out at a time
_TILE_NUMBERS = 4096
# tokens of a block whose values it asks for at once
_TOKENS = 16
# rows that it looks at at once
_ROWS = 128
# programs that are launched in every step, if there is anything for so many
_MOST_PROGRAMS = 1024
# of a program, whose registers hold a number for each block to the end
_FEWEST_WARPS = 4
_MOST_WARPS = 16
_BLOCKS_OF_A_WARP = 2048
_TYPES = {
    torch.uint8: tl.uint8,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit
def _mean_values(
    values_ptr,  # of block 0 and one kv head
    stride_block,
    block,  # [TILE] int64, block ids
    counts,  # [TILE]
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return `[TILE, HEAD_DIM]` float32, zeros for blocks that do not count."""
    dim = tl.arange(0, HEAD_DIM)[None, :]
    token_ptr = values_ptr + block[:, None] * stride_block + dim
    mask = counts[:, None] & (dim < HEAD_SIZE)
    total = tl.zeros([block.shape[0], HEAD_DIM], tl.float32)
    for _ in tl.range(BLOCK_SIZE // TOKENS):
        for token in tl.static_range(TOKENS):
            numbers = tl.load(token_ptr + token * (2 * HEAD_SIZE), mask=mask, other=0)
            if numbers.dtype == tl.uint8:
                # the factor is the same for all values of a head, and cancels out
                numbers = unpack(numbers, tl.float32)
            total += numbers.to(tl.float32)
        token_ptr += TOKENS * 2 * HEAD_SIZE
    return total / BLOCK_SIZE


@triton.jit
def _raise_shields(
    values_ptr,  # of block 0 and one kv head
    stride_block,
    peaks_ptr,  # of block 0 and one kv head
    stride_statistics_block,
    table_ptr,  # [live_width] int32, of one row
    num_full,
    shields_ptr,  # [max_blocks] float32, of one row
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Raise one row's shields to each block's share of one head's contributions."""
    within = tl.arange(0, TILE)
    total = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for start in tl.range(0, num_full, TILE):
        counts = start + within < num_full
        block = tl.load(table_ptr + start + within, mask=counts, other=0).to(tl.int64)
        total += _mean_values(
            values_ptr,
            stride_block,
            block,
            counts,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_DIM,
            TOKENS,
        )
    centre = tl.sum(total, 0) / num_full

    tile = tl.arange(0, TILES)[:, None]
    contributions = tl.zeros([TILES, TILE], tl.float32)
    num_tiles = tl.cdiv(num_full, TILE)
    for step in tl.range(num_tiles):
        number = num_tiles - 1 - step
        index = number * TILE + within
        counts = index < num_full
        block = tl.load(table_ptr + index, mask=counts, other=0).to(tl.int64)
        apart = _mean_values(
            values_ptr,
            stride_block,
            block,
            counts,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_DIM,
            TOKENS,
        )
        apart -= centre[None, :]
        distance = tl.sqrt(tl.sum(apart * apart, 1))
        peak = tl.load(
            peaks_ptr + block * stride_statistics_block, mask=counts, other=0.0
        )
        contribution = (peak * distance)[None, :]
        contributions = tl.where(tile == number, contribution, contributions)
    index = tile * TILE + within[None, :]
    all_blocks = tl.sum(contributions)
    # of values that are no numbers a head says nothing, see `policy.contribution_of`
    shares = tl.where(
        all_blocks < float("inf"), contributions / tl.maximum(all_blocks, TINY), 0.0
    )
    # the largest of all is the same in whatever order they come; not negative, they
    # are in the order of their bits. Nothing else is told by them, so that no program
    # needs to wait for its own to be seen, as it would by default
    tl.atomic_max(
        shields_ptr.to(tl.pointer_type(tl.int32)) + index,
        shares.to(tl.int32, bitcast=True),
        mask=index < num_full,
        sem="relaxed",
    )


@triton.jit(
    do_not_specialize=[
        "stride_shields_row",
        "stride_shields_slice",
        "num_slices",
        "num_rows",
        "stride_table_row",
    ],
    do_not_specialize_on_alignment=["seq_lens_ptr"],
)
def _contribution_kernel(
    first_pages_ptr,  # [num_layers] int64, address of page 0
    first_statistics_ptr,  # [num_layers] int64, address of block 0's statistics
    seq_lens_ptr,  # [num_rows] int32
    live_table_ptr,  # [num_rows, live_width] int32
    evicted_before_ptr,  # [num_rows] int32
    evicted_after_ptr,  # [num_rows] int32
    rows_ptr,  # [num_rows, NUM_ROW_FIELDS] int32
    shields_ptr,  # of row 0 and slice 0, [max_blocks] float32
    stride_shields_row,
    stride_shields_slice,
    num_slices,
    num_rows,
    stride_table_row,
    stride_block,
    stride_statistics_block,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    layer = tl.program_id(1)
    head = tl.program_id(2)
    due_before = tl.zeros([], tl.int32)
    for start in tl.range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < num_rows
        before = tl.load(evicted_before_ptr + row, mask=exists, other=0)
        after = tl.load(evicted_after_ptr + row, mask=exists, other=0)
        due = after != before
        # most steps have no more to do
        if tl.max(due.to(tl.int32), 0) > 0:
            flags = tl.load(
                rows_ptr + row * NUM_ROW_FIELDS + FLAGS, mask=exists, other=0
            )
            due &= (flags & SHIELD_BY_CONTRIBUTION) != 0
            ordinal = due_before + tl.cumsum(due.to(tl.int32), 0) - 1
            mine = due & (ordinal % tl.num_programs(0) == tl.program_id(0))
            page_ptr = tl.load(first_pages_ptr + layer).to(tl.pointer_type(TYPE))
            statistics_ptr = tl.load(first_statistics_ptr + layer)
            number = tl.zeros([], tl.int32) - 1
            for _ in tl.range(tl.sum(mine.to(tl.int32), 0)):
                number = tl.min(tl.where(mine & (row > number), row, num_rows), 0)
                at = number.to(tl.int64)
                _raise_shields(
                    # a head's tokens, and of each the value behind the key
                    tl.multiple_of(page_ptr, _ALIGNMENT)
                    + (head * (BLOCK_SIZE * 2 * HEAD_SIZE) + HEAD_SIZE),
                    stride_block,
                    statistics_ptr.to(tl.pointer_type(tl.float32))
                    + (head * NUM_FIELDS + MASS_PEAK),
                    stride_statistics_block,
                    live_table_ptr + at * stride_table_row,
                    tl.load(seq_lens_ptr + at) // BLOCK_SIZE
                    - tl.load(evicted_before_ptr + at),
                    shields_ptr
                    + at * stride_shields_row
                    + (layer % num_slices) * stride_shields_slice,
                    BLOCK_SIZE,
                    HEAD_SIZE,
                    HEAD_DIM,
                    TOKENS,
                    TILES,
                    TILE,
                )
            due_before += tl.sum(due.to(tl.int32), 0)


def warps_per_head(blocks: int) -> int:
    """Return the warps of a program that has a head, and rows of so many blocks."""
    return min(_MOST_WARPS, max(_FEWEST_WARPS, blocks // _BLOCKS_OF_A_WARP))


def shield_by_contribution(
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
    shields: torch.Tensor,
    block_size: int,
) -> None:
    """Raise shields to each block's largest share of contributions in any head.

    Args:
        first_page_of_layer: `[num_layers]` int64, see `ops.move_blocks.first_pages`.
        first_statistics_of_layer: `[num_layers]` int64, see
            `ops.score_blocks.first_statistics`.
        page_bytes: Bytes of a page, tail included.
        num_kv_heads: KV heads of a layer on this rank.
        head_size: Numbers of a value.
        dtype: Of keys and values as they are stored; uint8 for fp8.
        seq_lens: `[num_rows]` int32, computed tokens after the step.
        live_table: `[num_rows, live_width]` int32, see `ops.live_table`.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        evicted_after: `[num_rows]` int32, `E` at its end.
        rows: `[num_rows, NUM_ROW_FIELDS]` int32, contiguous, how each row evicts.
        shields: `[num_rows, num_slices, max_blocks]` float32, zero for the full live
            blocks of rows that shield by the contribution; the largest over all slices
            counts.
        block_size: Tokens per block.
    """
    num_rows, num_slices, max_blocks = shields.shape
    head_dim = next_power_of_2(head_size)
    tile = max(1, _TILE_NUMBERS // head_dim)
    tiles = next_power_of_2(cdiv(max_blocks, tile))
    num_layers = first_page_of_layer.shape[0]
    shares = max(1, _MOST_PROGRAMS // (num_layers * num_kv_heads))
    grid = (min(num_rows, shares), num_layers, num_kv_heads)
    _contribution_kernel[grid](
        first_pages_ptr=first_page_of_layer,
        first_statistics_ptr=first_statistics_of_layer,
        seq_lens_ptr=seq_lens,
        live_table_ptr=live_table,
        evicted_before_ptr=evicted_before,
        evicted_after_ptr=evicted_after,
        rows_ptr=rows,
        shields_ptr=shields,
        stride_shields_row=shields.stride(0),
        stride_shields_slice=shields.stride(1),
        num_slices=num_slices,
        num_rows=num_rows,
        stride_table_row=live_table.stride(0),
        stride_block=page_bytes // dtype.itemsize,
        stride_statistics_block=page_bytes // torch.float32.itemsize,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        HEAD_DIM=head_dim,
        TYPE=_TYPES[dtype],
        TOKENS=math.gcd(_TOKENS, block_size),
        TILES=tiles,
        TILE=tile,
        ROWS=_ROWS,
        num_warps=warps_per_head(tiles * tile),
    )
