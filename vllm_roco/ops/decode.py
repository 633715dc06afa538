# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the live table, measuring every block's attention mass.

One query a row. Two launches: `_attend_kernel` splits the keys of a (row, kv head)
over several programs, each with an online softmax over tiles of tokens;
`_combine_kernel` merges the splits and, knowing the final log-sum-exp, turns what the
first kernel noted of each block into its mass and updates the statistics.

With `s` the logits, `m` the running maximum and `L` the log-sum-exp of a query head,
all in base 2, the first kernel notes for each piece of a block

    log2 sum_t 2^(s_t)  =  m + log2 sum_t 2^(s_t - m)

out of the sums it needs anyway, and the second computes `a = mean_g 2^(noted - L)`.
A piece is the part of a block that lies in one tile, the whole block as a rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_roco.ops.statistics import NUM_FIELDS, add_to_statistics

# tensor cores multiply at least 16 rows
MIN_GROUP = 16
COMBINE_BLOCKS = 64

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _split_range(length, split, num_splits, TILE: tl.constexpr):
    """Return the first tile of a split and the one behind its last."""
    num_tiles = tl.cdiv(length, TILE)
    return split * num_tiles // num_splits, (split + 1) * num_tiles // num_splits


@triton.jit(do_not_specialize=["stride_table_row", "max_pieces"])
def _attend_kernel(
    query_ptr,  # [num_rows, num_q_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    output_ptr,  # [num_rows, num_q_heads, head_size]
    partial_output_ptr,  # [num_rows, num_q_heads, splits, head_size] float32
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    piece_lse_ptr,  # [num_rows, num_kv_heads, max_pieces, GROUP] float32, base 2
    logit_scale,  # softmax scale * log2(e), without soft cap: else the softmax scale
    soft_cap,
    stride_query_row,
    stride_query_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_token,
    stride_table_row,
    stride_output_row,
    stride_output_head,
    max_pieces,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MEASURE: tl.constexpr,
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

    group = tl.arange(0, GROUP_PADDED)
    dim = tl.arange(0, HEAD_PADDED)
    token = tl.arange(0, TILE)
    head = kv_head * GROUP + group
    query_mask = (group < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]

    # [GROUP_PADDED, HEAD_PADDED]
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
    pieces_ptr = piece_lse_ptr + (row * num_kv_heads + kv_head) * max_pieces * GROUP

    PIECES: tl.constexpr = TILE // PIECE
    piece = tl.arange(0, PIECES)
    running_max = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    # a sum for each place of a piece in the tile: they are added up once, at the end
    running_sum = tl.zeros([GROUP_PADDED, PIECES], tl.float32)
    accumulated = tl.zeros([GROUP_PADDED, HEAD_PADDED], tl.float32)

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
        piece_sum = tl.sum(tl.reshape(weights, [GROUP_PADDED, PIECES, PIECE]), 2)
        running_sum = running_sum * decay[:, None] + piece_sum
        if MEASURE:
            number = tile * PIECES + piece
            tl.store(
                pieces_ptr + number[None, :] * GROUP + group[:, None],
                new_max[:, None] + tl.log2(piece_sum),
                mask=(group < GROUP)[:, None] & (number * PIECE < length)[None, :],
            )

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


@triton.jit
def _update_statistics(
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    pieces_ptr,  # [max_pieces, GROUP] float32, base 2, of one row and kv head
    table_ptr,  # [live_width] int32, of one row
    statistics_ptr,  # [num_blocks, NUM_FIELDS] float32, of one kv head
    stride_statistics_block,
    row_head,  # row * num_q_heads + the group's first query head
    first_index,  # first of the COMBINE_BLOCKS live blocks to update
    length,
    evicted,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    COMBINE_BLOCKS: tl.constexpr,
):
    """Add one query's attention mass to a run of live blocks of one kv head."""
    index = first_index + tl.arange(0, COMBINE_BLOCKS)
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
    lse = largest + tl.log2(tl.sum(tl.exp2(split_lse - largest[:, None]), 1))

    PIECES: tl.constexpr = BLOCK_SIZE // PIECE
    mass = tl.zeros([COMBINE_BLOCKS], tl.float32)
    for piece in tl.static_range(PIECES):
        number = index * PIECES + piece
        # [COMBINE_BLOCKS, GROUP_PADDED]
        noted_mask = (number * PIECE < length)[:, None] & (group < GROUP)[None, :]
        noted = tl.load(
            pieces_ptr + number[:, None] * GROUP + group[None, :],
            mask=noted_mask,
            other=float("-inf"),
        )
        mass += tl.sum(tl.where(noted_mask, tl.exp2(noted - lse[None, :]), 0.0), 1)
    mass /= GROUP
    add_to_statistics(
        statistics_ptr,
        stride_statistics_block,
        table_ptr,
        index,
        length,
        1,
        evicted,
        mass,
        mass * mass,
        mass,
        BLOCK_SIZE,
    )


@triton.jit(do_not_specialize=["stride_table_row", "max_pieces", "num_splits"])
def _combine_kernel(
    partial_output_ptr,  # [num_rows, num_q_heads, splits, head_size] float32
    partial_lse_ptr,  # [num_rows, num_q_heads, splits] float32, base 2
    piece_lse_ptr,  # [num_rows, num_kv_heads, max_pieces, GROUP] float32, base 2
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
    num_splits,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    OUTPUT_PARTS: tl.constexpr,
    COMBINE_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    row_kv_head = row * tl.num_programs(0) + kv_head
    if PDL:
        tl.extra.cuda.gdc_wait()

    length = tl.load(live_lens_ptr + row)
    if part < OUTPUT_PARTS:
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
        first_index = (part - OUTPUT_PARTS) * COMBINE_BLOCKS
        if first_index * BLOCK_SIZE < length:
            _update_statistics(
                partial_lse_ptr,
                piece_lse_ptr + row_kv_head * max_pieces * GROUP,
                live_table_ptr + row * stride_table_row,
                statistics_ptr + kv_head * NUM_FIELDS,
                stride_statistics_block,
                row_kv_head * GROUP,
                first_index,
                length,
                tl.load(evicted_before_ptr + row),
                num_splits,
                GROUP,
                GROUP_PADDED,
                BLOCK_SIZE,
                PIECE,
                TILE,
                SPLITS_PADDED,
                COMBINE_BLOCKS,
            )


@dataclass(frozen=True)
class DecodePlan:
    """How one decode shape is laid out on the device; fixed when a graph is captured.

    Attributes:
        tile: Tokens a program reads at a time, a power of two of at least 16.
        splits: Programs that share the keys of one row and kv head.
        num_warps: Warps of the attention kernel.
        num_stages: Tiles in flight, the one being computed included.
        dependent_launch: Whether the second kernel is launched before the first ends
            (programmatic dependent launch, compute capability 9.0 and above).
    """

    tile: int
    splits: int
    num_warps: int
    num_stages: int
    dependent_launch: bool


@dataclass(frozen=True)
class DecodeScratch:
    """What the first kernel leaves for the second; allocated once.

    Attributes:
        partial_output: Flat float32, `rows * q_heads * splits * head_size` numbers.
        partial_lse: Flat float32, `rows * q_heads * splits` numbers.
        piece_lse: Flat float32, `rows * q_heads * pieces of the longest row` numbers;
            empty when nothing is measured.
        max_blocks: Blocks of the longest row.
    """

    partial_output: torch.Tensor
    partial_lse: torch.Tensor
    piece_lse: torch.Tensor
    max_blocks: int

    @classmethod
    def allocate(
        cls,
        *,
        plans: Sequence[tuple[int, DecodePlan]],
        num_q_heads: int,
        head_size: int,
        block_size: int,
        max_live_tokens: int,
        measure: bool,
        device: torch.device,
    ) -> DecodeScratch:
        """Allocate enough for every launch that is to share the memory.

        Args:
            plans: The launches, as number of rows and plan.
            num_q_heads: Query heads of the layer on this rank.
            head_size: Numbers per head.
            block_size: Tokens per block.
            max_live_tokens: Bound of the rows' live lengths.
            measure: Whether statistics are to be kept.
            device: Where the kernels run.
        """

        def floats(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.float32, device=device)

        max_blocks = triton.cdiv(max_live_tokens, block_size)
        splits = max(rows * plan.splits for rows, plan in plans)
        pieces = max(
            rows * max_blocks * (block_size // piece_size(block_size, plan.tile))
            for rows, plan in plans
        )
        return cls(
            partial_output=floats(splits * num_q_heads * head_size),
            partial_lse=floats(splits * num_q_heads),
            piece_lse=floats(pieces * num_q_heads if measure else 0),
            max_blocks=max_blocks,
        )


def piece_size(block_size: int, tile: int) -> int:
    """Return the tokens of a piece: the largest power of two in block and tile."""
    return math.gcd(block_size, tile)


def plan_decode(
    *,
    num_rows: int,
    num_kv_heads: int,
    head_size: int,
    max_live_tokens: int,
    dtype: torch.dtype,
    num_multiprocessors: int,
    capability: tuple[int, int],
) -> DecodePlan:
    """Choose tile and splits from what is known when the launch is recorded.

    Args:
        num_rows: Decode rows of the launch, padding included.
        num_kv_heads: KV heads of the layer on this rank.
        head_size: Numbers per head.
        max_live_tokens: Bound of the rows' live lengths.
        dtype: Element type of query and cache.
        num_multiprocessors: Multiprocessors of the device.
        capability: Compute capability of the device.
    """
    tile_bytes = 2 * triton.next_power_of_2(head_size) * dtype.itemsize
    tile = max(16, min(128, 32 * 1024 // tile_bytes))
    programs = num_rows * num_kv_heads
    wanted = triton.cdiv(4 * num_multiprocessors, programs)
    most = max(1, max_live_tokens // (2 * tile))
    splits = triton.next_power_of_2(min(wanted, most, 128))
    return DecodePlan(
        tile=tile,
        splits=splits,
        num_warps=4,
        num_stages=3,
        dependent_launch=capability >= (9, 0),
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
    max_pieces = scratch.max_blocks * block_size // piece
    head_padded = triton.next_power_of_2(head_size)
    launch_dependent = {"launch_pdl": True} if plan.dependent_launch else {}

    _attend_kernel[(num_kv_heads, plan.splits, num_rows)](
        query_ptr=query,
        kv_cache_ptr=kv_cache,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        output_ptr=output,
        partial_output_ptr=scratch.partial_output,
        partial_lse_ptr=scratch.partial_lse,
        piece_lse_ptr=scratch.piece_lse,
        logit_scale=scale if soft_cap else scale * math.log2(math.e),
        soft_cap=soft_cap,
        stride_query_row=query.stride(0),
        stride_query_head=query.stride(1),
        stride_cache_block=kv_cache.stride(0),
        stride_cache_head=kv_cache.stride(1),
        stride_cache_token=kv_cache.stride(2),
        stride_table_row=live_table.stride(0),
        stride_output_row=output.stride(0),
        stride_output_head=output.stride(1),
        max_pieces=max_pieces,
        GROUP=group,
        GROUP_PADDED=max(MIN_GROUP, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        TILE=plan.tile,
        SPLIT=plan.splits > 1,
        SOFT_CAP=soft_cap != 0.0,
        MEASURE=measure,
        PDL=plan.dependent_launch,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )

    output_parts = group if plan.splits > 1 else 0
    parts = output_parts
    if measure:
        parts += triton.cdiv(scratch.max_blocks, COMBINE_BLOCKS)
    if parts == 0:
        return
    _combine_kernel[(num_kv_heads, parts, num_rows)](
        partial_output_ptr=scratch.partial_output,
        partial_lse_ptr=scratch.partial_lse,
        piece_lse_ptr=scratch.piece_lse,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        evicted_before_ptr=evicted_before,
        # without statistics no program touches them
        statistics_ptr=scratch.partial_lse if statistics is None else statistics,
        output_ptr=output,
        stride_table_row=live_table.stride(0),
        stride_statistics_block=0 if statistics is None else statistics.stride(0),
        stride_output_row=output.stride(0),
        stride_output_head=output.stride(1),
        max_pieces=max_pieces,
        num_splits=plan.splits,
        GROUP=group,
        GROUP_PADDED=triton.next_power_of_2(group),
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        PIECE=piece,
        TILE=plan.tile,
        SPLITS_PADDED=triton.next_power_of_2(plan.splits),
        OUTPUT_PARTS=output_parts,
        COMBINE_BLOCKS=COMBINE_BLOCKS,
        PDL=plan.dependent_launch,
        num_warps=1 if plan.splits <= 8 else 4,
        **launch_dependent,
    )
