# SPDX-License-Identifier: Apache-2.0
"""The live table: which blocks a sequence attends over in this step.

The row of a sequence has a gap where blocks were evicted; attention reads it without::

    row        0 ... B-1 | B ......... B+E-1 | B+E ....... last
    live row   0 ... B-1 |                   | B ......... last-E
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import cdiv

from vllm_roco.ops.launch import Launcher
from vllm_roco.ops.rows import NUM_ROW_FIELDS, RESIDENT_BLOCKS, STRIDE_BLOCKS, UNTIL

COLUMNS = 1024


# what vLLM passes is known when it passes it, so no variant is compiled for it
@triton.jit(
    do_not_specialize=["stride_table_row", "width"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "seq_lens_ptr",
        "query_start_loc_ptr",
    ],
)
def _live_table_kernel(
    block_table_ptr,  # [num_rows, width] int32
    seq_lens_ptr,  # [num_rows] int32
    query_start_loc_ptr,  # [num_rows + 1] int32
    rows_ptr,  # [num_rows, NUM_ROW_FIELDS] int32
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    measured_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    evicted_after_ptr,  # [num_rows] int32
    stride_table_row,
    stride_live_row,
    width,
    live_width,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)

    after = tl.load(seq_lens_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - tl.load(
        query_start_loc_ptr + row
    )
    before = after - query_len
    rows_ptr += row * NUM_ROW_FIELDS
    resident = tl.load(rows_ptr + RESIDENT_BLOCKS)
    stride = tl.load(rows_ptr + STRIDE_BLOCKS)
    until = tl.load(rows_ptr + UNTIL)
    over_before = tl.maximum(tl.minimum(before, until) // BLOCK_SIZE - resident, 0)
    over_after = tl.maximum(tl.minimum(after, until) // BLOCK_SIZE - resident, 0)
    evicted_before = over_before // stride * stride
    evicted_after = over_after // stride * stride
    live_len = after - evicted_before * BLOCK_SIZE

    if chunk == 0:
        tl.store(live_lens_ptr + row, live_len)
        tl.store(measured_lens_ptr + row, tl.where(before < until, live_len, 0))
        tl.store(evicted_before_ptr + row, evicted_before)
        tl.store(evicted_after_ptr + row, evicted_after)

    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.where(column < resident, column, column + evicted_before)
    live = (column * BLOCK_SIZE < live_len) & (column < live_width) & (source < width)
    block = tl.load(block_table_ptr + row * stride_table_row + source, mask=live)
    tl.store(live_table_ptr + row * stride_live_row + column, block, mask=live)


_launch = Launcher(_live_table_kernel)


def build_live_table(
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rows: torch.Tensor,
    live_table: torch.Tensor,
    live_lens: torch.Tensor,
    measured_lens: torch.Tensor,
    evicted_before: torch.Tensor,
    evicted_after: torch.Tensor,
    block_size: int,
) -> None:
    """Write the live table, its lengths and `E` before and after the step.

    Entries of `live_table` behind a sequence's last live block keep what they held.
    Padded rows, with length and query length 0, get length 0 and `E` = 0.

    Args:
        block_table: `[num_rows, width]` int32, indexed by `position // block_size`.
        seq_lens: `[num_rows]` int32, computed tokens after the step.
        query_start_loc: `[num_rows + 1]` int32, first query of each row.
        rows: `[num_rows, NUM_ROW_FIELDS]` int32, contiguous, how each row evicts; those
            of padding may be any.
        live_table: `[num_rows, live_width]` int32, output.
        live_lens: `[num_rows]` int32, output: tokens to attend over.
        measured_lens: `[num_rows]` int32, output: the same, and 0 for rows whose step
            begins where they evict no more, of which nothing is measured.
        evicted_before: `[num_rows]` int32, output: `E` at the start of the step.
        evicted_after: `[num_rows]` int32, output: `E` at its end.
        block_size: Tokens per block.
    """
    num_rows, width = block_table.shape
    live_width = live_table.shape[1]
    _launch(
        (num_rows, cdiv(live_width, COLUMNS), 1),
        {},
        block_table_ptr=block_table,
        seq_lens_ptr=seq_lens,
        query_start_loc_ptr=query_start_loc,
        rows_ptr=rows,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        measured_lens_ptr=measured_lens,
        evicted_before_ptr=evicted_before,
        evicted_after_ptr=evicted_after,
        stride_table_row=block_table.stride(0),
        stride_live_row=live_table.stride(0),
        width=width,
        live_width=live_width,
        BLOCK_SIZE=block_size,
        COLUMNS=COLUMNS,
    )
