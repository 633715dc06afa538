# SPDX-License-Identifier: Apache-2.0
"""Writes the moves that end a step on a server that measures nothing.

The arithmetic is `vllm_roco.policy.plan_recent_moves`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import next_power_of_2

from vllm_roco.ops.planned_moves import store_moves
from vllm_roco.ops.rows import NUM_ROW_FIELDS, RESIDENT_BLOCKS, SINK


@triton.jit(do_not_specialize=["stride_table_row", "max_moves"])
def _recent_kernel(
    live_table_ptr,  # [num_rows, live_width] int32
    evicted_before_ptr,  # [num_rows] int32
    evicted_after_ptr,  # [num_rows] int32
    rows_ptr,  # [num_rows, NUM_ROW_FIELDS] int32
    moves_ptr,  # [num_rows, max_moves, 2] int32
    num_moves_ptr,  # [num_rows] int32
    moved_ptr,  # [1] int64
    stride_table_row,
    max_moves,
    BLOCK_SIZE: tl.constexpr,
    MOVES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(evicted_before_ptr + row)
    after = tl.load(evicted_after_ptr + row)
    rows_ptr += row * NUM_ROW_FIELDS
    resident = tl.load(rows_ptr + RESIDENT_BLOCKS)
    sink_blocks = tl.cdiv(tl.load(rows_ptr + SINK), BLOCK_SIZE)
    # without a ring nothing is ever due
    ring = tl.maximum(resident - sink_blocks, 1)
    table_ptr = live_table_ptr + row * stride_table_row
    # the newest blocks that the ring behind the sinks holds, of those that are outgoing
    first = tl.maximum(resident + before, sink_blocks + after)
    count = tl.where(after > before, tl.maximum(resident + after - first, 0), 0)
    store_moves(count, row, num_moves_ptr, moved_ptr)
    move = tl.arange(0, MOVES)
    due = move < count
    logical = first + move
    place = sink_blocks + (logical - sink_blocks) % ring
    pair_ptr = moves_ptr + (row * max_moves + move) * 2
    source = tl.load(table_ptr + logical - before, mask=due, other=0)
    target = tl.load(table_ptr + place, mask=due, other=0)
    tl.store(pair_ptr, source, mask=due)
    tl.store(pair_ptr + 1, target, mask=due)


def select_oldest(
    *,
    live_table: torch.Tensor,
    evicted_before: torch.Tensor,
    evicted_after: torch.Tensor,
    rows: torch.Tensor,
    moves: torch.Tensor,
    num_moves: torch.Tensor,
    moved: torch.Tensor,
    block_size: int,
) -> None:
    """Write the moves that end the step, for `policy="recent"`.

    Args:
        live_table: `[num_rows, live_width]` int32, see `ops.live_table`.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        evicted_after: `[num_rows]` int32, `E` at its end.
        rows: `[num_rows, NUM_ROW_FIELDS]` int32, contiguous, how each row evicts.
        moves: `[num_rows, max_moves, 2]` int32, contiguous, output: source and
            destination block of each move.
        num_moves: `[num_rows]` int32, output.
        moved: `[1]` int64, to which the moves are added.
        block_size: Tokens per block.
    """
    num_rows, max_moves, _ = moves.shape
    _recent_kernel[(num_rows,)](
        live_table_ptr=live_table,
        evicted_before_ptr=evicted_before,
        evicted_after_ptr=evicted_after,
        rows_ptr=rows,
        moves_ptr=moves,
        num_moves_ptr=num_moves,
        moved_ptr=moved,
        stride_table_row=live_table.stride(0),
        max_moves=max_moves,
        BLOCK_SIZE=block_size,
        MOVES=next_power_of_2(max_moves),
        num_warps=1,
    )
