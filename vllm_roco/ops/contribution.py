# SPDX-License-Identifier: Apache-2.0
"""What each block contributed to an output, of blocks that may have to go.

The arithmetic is `vllm_roco.policy`'s: the peak of a block's attention mass times the
distance of its mean value from the mean of all. A program has one layer and head, and
every so many rows. Of a row that is due it reads the values three times, for their
mean, the sum of the contributions and each block's share of it. It returns at once
where no row is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_roco.ops.fp8 import unpack
from vllm_roco.ops.rows import FLAGS, NUM_ROW_FIELDS, SHIELD_BY_CONTRIBUTION
from vllm_roco.ops.statistics import MASS_PEAK, NUM_FIELDS

# smallest normal float32: keeps a head that nobody listened to from dividing by zero
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_ALIGNMENT = tl.constexpr(16)
# numbers that a program has in registers at a time
_TILE_NUMBERS = 8192
# rows that it looks at at once
_ROWS = 128
# programs that are launched in every step, if there is anything for so many
_MOST_PROGRAMS = 2048
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
    table_ptr,  # [live_width] int32, of one row
    index,  # [TILE], places in the live table
    num_full,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return some blocks, and the mean of the values of each.

    Returns:
        `[TILE]` int64, block ids, and `[TILE, HEAD_DIM]` float32, zeros for places
        behind the last full block.
    """
    counts = index < num_full
    block = tl.load(table_ptr + index, mask=counts, other=0).to(tl.int64)
    token = tl.arange(0, TOKENS)[None, :, None]
    dim = tl.arange(0, HEAD_DIM)[None, None, :]
    place = block[:, None, None] * stride_block + token * (2 * HEAD_SIZE) + dim
    mask = counts[:, None, None] & (dim < HEAD_SIZE)
    total = tl.zeros([index.shape[0], HEAD_DIM], tl.float32)
    for start in tl.static_range(0, BLOCK_SIZE, TOKENS):
        numbers = tl.load(
            values_ptr + place + start * 2 * HEAD_SIZE, mask=mask, other=0
        )
        if numbers.dtype == tl.uint8:
            # the factor is the same for all values of a head, and cancels out
            numbers = unpack(numbers, tl.float32)
        total += tl.sum(numbers.to(tl.float32), 1)
    return block, total / BLOCK_SIZE


@triton.jit
def _contributions(
    mean,  # [TILE, HEAD_DIM] float32
    centre,  # [HEAD_DIM] float32
    entries_ptr,  # statistics of block 0 and one kv head
    stride_statistics_block,
    block,  # [TILE] int64
    counts,  # [TILE]
):
    """Return `[TILE]` float32, 0 for blocks that there are not."""
    apart = mean - centre[None, :]
    distance = tl.sqrt(tl.sum(apart * apart, 1))
    entry = entries_ptr + block * stride_statistics_block
    return tl.load(entry + MASS_PEAK, mask=counts, other=0.0) * distance


@triton.jit
def _any_due(
    evicted_before_ptr,
    evicted_after_ptr,
    num_rows,
    ROWS: tl.constexpr,
):
    """Return whether any row evicts, after one look at many rows at once."""
    due = tl.zeros([ROWS], tl.int32)
    for start in tl.range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        before = tl.load(evicted_before_ptr + row, mask=row < num_rows, other=0)
        after = tl.load(evicted_after_ptr + row, mask=row < num_rows, other=0)
        due |= (after != before).to(tl.int32)
    return tl.max(due, 0) > 0


@triton.jit
def _raise_shields(
    values_ptr,  # of block 0 and one kv head
    stride_block,
    entries_ptr,  # statistics of block 0 and one kv head
    stride_statistics_block,
    table_ptr,  # [live_width] int32, of one row
    num_full,
    shields_ptr,  # [max_blocks] float32, of one row
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Raise one row's shields to each block's share of one head's contributions."""
    tile = tl.arange(0, TILE)
    centre = tl.zeros([HEAD_DIM], tl.float32)
    for start in tl.range(0, num_full, TILE):
        _, mean = _mean_values(
            values_ptr,
            stride_block,
            table_ptr,
            start + tile,
            num_full,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_DIM,
            TOKENS,
        )
        centre += tl.sum(mean, 0)
    centre /= num_full

    total = tl.zeros([], tl.float32)
    for round in tl.static_range(2):
        for start in tl.range(0, num_full, TILE):
            index = start + tile
            counts = index < num_full
            block, mean = _mean_values(
                values_ptr,
                stride_block,
                table_ptr,
                index,
                num_full,
                BLOCK_SIZE,
                HEAD_SIZE,
                HEAD_DIM,
                TOKENS,
            )
            contribution = _contributions(
                mean, centre, entries_ptr, stride_statistics_block, block, counts
            )
            if round == 0:
                total += tl.sum(contribution, 0)
            else:
                share = contribution / tl.maximum(total, _TINY)
                # the largest of all is the same in whatever order they come
                tl.atomic_max(shields_ptr + index, share, mask=counts)


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
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # most steps end here
    if not _any_due(evicted_before_ptr, evicted_after_ptr, num_rows, ROWS):
        return

    layer = tl.program_id(1)
    head = tl.program_id(2)
    page_ptr = tl.load(first_pages_ptr + layer).to(tl.pointer_type(TYPE))
    # a head's tokens, and of each the value behind the key
    values_ptr = tl.multiple_of(page_ptr, _ALIGNMENT) + (
        head * (BLOCK_SIZE * 2 * HEAD_SIZE) + HEAD_SIZE
    )
    entries_ptr = tl.load(first_statistics_ptr + layer).to(tl.pointer_type(tl.float32))
    entries_ptr += head * NUM_FIELDS
    shields_ptr += (layer % num_slices) * stride_shields_slice
    for number in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.zeros([], tl.int64) + number
        evicted = tl.load(evicted_before_ptr + row)
        flags = tl.load(rows_ptr + row * NUM_ROW_FIELDS + FLAGS)
        is_due = tl.load(evicted_after_ptr + row) != evicted
        if is_due & ((flags & SHIELD_BY_CONTRIBUTION) != 0):
            _raise_shields(
                values_ptr,
                stride_block,
                entries_ptr,
                stride_statistics_block,
                live_table_ptr + row * stride_table_row,
                tl.load(seq_lens_ptr + row) // BLOCK_SIZE - evicted,
                shields_ptr + row * stride_shields_row,
                BLOCK_SIZE,
                HEAD_SIZE,
                HEAD_DIM,
                TILE,
                TOKENS,
            )


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
            `ops.select_victims.first_statistics`.
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
    num_rows, num_slices, _ = shields.shape
    head_dim = triton.next_power_of_2(head_size)
    tokens = min(16, block_size & -block_size)
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
        TILE=max(1, _TILE_NUMBERS // (tokens * head_dim)),
        TOKENS=tokens,
        ROWS=_ROWS,
        num_warps=4,
    )
