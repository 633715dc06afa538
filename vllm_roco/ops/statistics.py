# SPDX-License-Identifier: Apache-2.0
"""How a kernel adds what it has measured to the statistics in the pages."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_roco.kv_cache import page

NUM_FIELDS = tl.constexpr(page.NUM_FIELDS)
MASS_SUM = tl.constexpr(page.MASS_SUM)
MASS_SQUARES = tl.constexpr(page.MASS_SQUARES)
MASS_PEAK = tl.constexpr(page.MASS_PEAK)
NUM_QUERIES = tl.constexpr(page.NUM_QUERIES)
FIRST_POSITION = tl.constexpr(page.FIRST_POSITION)


@triton.jit
def read_statistics(
    statistics_ptr,  # [num_blocks, num_kv_heads + 1, NUM_FIELDS] float32
    stride_statistics_block,
    kv_head,
    table_ptr,  # [live_width] int32, the live table of one row
    index,  # [N], places in the live table
    length,  # live tokens, the step's own included
    BLOCK_SIZE: tl.constexpr,
):
    """Return live blocks and one kv head's statistics of them.

    Returns:
        `[N]` int64, block ids, and `[N, NUM_FIELDS]` float32; zeros for places behind
        the last live block.
    """
    live = index * BLOCK_SIZE < length
    block = tl.load(table_ptr + index, mask=live, other=0).to(tl.int64)
    field = tl.arange(0, NUM_FIELDS)[None, :]
    statistics_ptr += kv_head * NUM_FIELDS
    entry = statistics_ptr + block[:, None] * stride_statistics_block + field
    return block, tl.load(entry, mask=live[:, None], other=0.0)


@triton.jit
def write_statistics(
    statistics_ptr,  # [num_blocks, num_kv_heads + 1, NUM_FIELDS] float32
    stride_statistics_block,
    kv_head,
    num_kv_heads,
    block,  # [N] int64, as `read_statistics` returned them
    before,  # [N, NUM_FIELDS] float32, likewise
    index,  # [N], places in the live table
    length,  # live tokens, the step's own included
    query_len,
    evicted,  # E at the start of the step
    mass,  # [N] float32, summed over the step's queries
    squares,  # [N] float32, likewise
    peak,  # [N] float32, the largest of a single query
    BLOCK_SIZE: tl.constexpr,
):
    """Add one step's attention mass to live blocks; the caller is their one writer.

    The first kv head also notes where new blocks begin. Places behind the last live
    block are left out.
    """
    field = tl.arange(0, NUM_FIELDS)[None, :]
    # the query that writes a block's first token sees it, and so do all later ones
    num_queries = tl.minimum(length - index * BLOCK_SIZE, query_len).to(tl.float32)
    fresh = tl.where(field == MASS_SUM, mass[:, None], squares[:, None])
    fresh = tl.where(field == MASS_PEAK, peak[:, None], fresh)
    # what is no number adds nothing, see `policy.accumulate`
    fresh = tl.where(tl.abs(mass)[:, None] < float("inf"), fresh, 0.0)
    fresh = tl.where(field == NUM_QUERIES, num_queries[:, None], fresh)
    grown = tl.where(field == MASS_PEAK, tl.maximum(before, fresh), before + fresh)
    # a block whose first token is this step's still holds what its last owner left
    is_new = index * BLOCK_SIZE >= length - query_len
    live = index * BLOCK_SIZE < length
    page_tail = statistics_ptr + block[:, None] * stride_statistics_block
    entry = page_tail + kv_head * NUM_FIELDS + field
    tl.store(entry, tl.where(is_new[:, None], fresh, grown), mask=live[:, None])
    if kv_head == 0:
        # a whole entry, as the others are: one number would want a layout of its own
        first_position = ((index + evicted) * BLOCK_SIZE).to(tl.float32)
        tl.store(
            page_tail + num_kv_heads * NUM_FIELDS + field,
            tl.where(field == FIRST_POSITION, first_position[:, None], 0.0),
            mask=(live & is_new)[:, None],
        )
