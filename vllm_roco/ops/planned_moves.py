# SPDX-License-Identifier: Apache-2.0
"""How a kernel writes the moves that end a step."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_moves(
    moves_ptr,  # [max_moves, 2] int32, of one row
    table_ptr,  # [live_width] int32, of one row
    index,  # [BLOCKS], places in the live table
    is_source,  # [BLOCKS]
    is_target,  # [BLOCKS], as many
):
    """Write which blocks go over which, both in live order; return how many."""
    source_rank = tl.cumsum(is_source.to(tl.int32), 0) - 1
    target_rank = tl.cumsum(is_target.to(tl.int32), 0) - 1
    block = tl.load(table_ptr + index, mask=is_source | is_target, other=0)
    tl.store(moves_ptr + 2 * source_rank, block, mask=is_source)
    tl.store(moves_ptr + 2 * target_rank + 1, block, mask=is_target)
    return tl.sum(is_source.to(tl.int32), 0)


@triton.jit
def store_moves(count, row, num_moves_ptr, moved_ptr):
    """Write how many moves a row has, and count them."""
    tl.store(num_moves_ptr + row, count)
    if count > 0:
        tl.atomic_add(moved_ptr, count.to(tl.int64), sem="relaxed")
