# SPDX-License-Identifier: Apache-2.0
"""What programs of decode attention tell each other; see `attention`.

Those that attend leave, for each row and kv head, the partial sums, `[max_pieces,
GROUP]` float32: the log-sum-exp of every piece, in base 2. What splits leave is in
`merge`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_roco.ops.statistics import write_statistics


@triton.jit
def split_range(length, split, num_splits, TILE: tl.constexpr):
    """Return the first tile of a split and the one behind its last."""
    num_tiles = tl.cdiv(length, TILE)
    return split * num_tiles // num_splits, (split + 1) * num_tiles // num_splits


@triton.jit
def update_statistics(
    partial_sums_ptr,  # [max_pieces, GROUP] float32, base 2, of one row and kv head
    lse,  # [GROUP_PADDED] float32, base 2
    statistics_ptr,  # [num_blocks, num_kv_heads + 1, NUM_FIELDS] float32
    stride_statistics_block,
    kv_head,
    num_kv_heads,
    live_block,  # [N] int64, as `read_statistics` returned them
    before,  # [N, NUM_FIELDS] float32, likewise
    index,  # [N], places in the live table
    length,
    evicted,  # E at the start of the step
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Add one query's attention mass in live blocks of one kv head."""
    PIECES: tl.constexpr = BLOCK_SIZE // PIECE
    group = tl.arange(0, GROUP_PADDED)[None, :]
    mass = tl.zeros(index.shape, tl.float32)
    for piece in tl.static_range(PIECES):
        number = (index * PIECES + piece)[:, None]
        # [N, GROUP_PADDED]
        stored = (number * PIECE < length) & (group < GROUP)
        piece_sum = tl.load(
            partial_sums_ptr + number * GROUP + group, mask=stored, other=0.0
        )
        share = tl.where(stored, tl.exp2(piece_sum - lse[None, :]), 0.0)
        mass += tl.sum(share, 1)
    mass /= GROUP
    write_statistics(
        statistics_ptr,
        stride_statistics_block,
        kv_head,
        num_kv_heads,
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
