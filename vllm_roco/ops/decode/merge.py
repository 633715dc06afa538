# SPDX-License-Identifier: Apache-2.0
"""How the splits of a row become one, by the last of their programs or apart.

The log-sum-exp of a split weighs its output. Splits are added up in their order,
whoever does it, so a step has the same sums in every run. Every split of a row that is
not empty has a token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_by_last(
    partial_output_ptr,  # [num_splits, num_q_heads, head_size] float32, of one row
    partial_lse_ptr,  # [num_splits, num_q_heads] float32, base 2, likewise
    arrivals_ptr,  # of the row and kv head
    output,  # [GROUP_PADDED, HEAD_PADDED] float32, this split's
    lse,  # [GROUP_PADDED] float32, likewise
    split,
    num_splits,
    num_q_heads,
    head,  # [GROUP_PADDED]
    dim,  # [HEAD_PADDED]
    head_mask,  # [GROUP_PADDED]
    mask,  # [GROUP_PADDED, HEAD_PADDED]
    HEAD_SIZE: tl.constexpr,
):
    """Leave a split's output, and return that of all if it is the last to be done.

    Returns:
        Whether it is, and output and log-sum-exp over the keys of all splits.
    """
    place = head[:, None] * HEAD_SIZE + dim[None, :]
    mine = split * num_q_heads
    tl.store(partial_output_ptr + mine * HEAD_SIZE + place, output, mask=mask)
    tl.store(partial_lse_ptr + mine + head, lse, mask=head_mask)
    # all threads have stored before one of them tells the other programs
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    is_last = arrived == num_splits - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
        output = tl.zeros(output.shape, tl.float32)
        total = tl.zeros(lse.shape, tl.float32)
        largest = tl.full(lse.shape, float("-inf"), tl.float32)
        # from the L2 cache, where other programs have left it
        for other in range(num_splits):
            other_lse = tl.load(
                partial_lse_ptr + other * num_q_heads + head,
                mask=head_mask,
                other=0.0,
                cache_modifier=".cg",
            )
            other_output = tl.load(
                partial_output_ptr + other * num_q_heads * HEAD_SIZE + place,
                mask=mask,
                other=0.0,
                cache_modifier=".cg",
            )
            new_largest = tl.maximum(largest, other_lse)
            decay = tl.exp2(largest - new_largest)
            share = tl.exp2(other_lse - new_largest)
            output = output * decay[:, None] + other_output * share[:, None]
            total = total * decay + share
            largest = new_largest
        output /= total[:, None]
        lse = largest + tl.log2(total)
    return is_last, output, lse


@triton.jit
def merge_output(
    partial_output_ptr,  # [num_splits, num_q_heads, head_size] float32, of one row
    partial_lse_ptr,  # [num_splits, num_q_heads] float32, base 2, likewise
    output_ptr,  # [head_size], of one row and query head
    head,
    num_splits,  # 0 of an empty row
    num_q_heads,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write one query head's output, the average of its splits' outputs.

    `log_sum_exp` sums up the same splits, for the statistics: what changes here about
    how much they count changes there.
    """
    dim = tl.arange(0, HEAD_PADDED)
    output = tl.zeros([HEAD_PADDED], tl.float32)
    total = 0.0
    largest = float("-inf")
    for start in range(0, num_splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        is_split = split < num_splits
        place = split * num_q_heads + head
        lse = tl.load(partial_lse_ptr + place, mask=is_split, other=float("-inf"))
        # [SPLITS, HEAD_PADDED]
        partial = tl.load(
            partial_output_ptr + place[:, None] * HEAD_SIZE + dim[None, :],
            mask=is_split[:, None] & (dim < HEAD_SIZE)[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(lse, 0))
        decay = tl.exp2(largest - new_largest)
        share = tl.exp2(lse - new_largest)
        output = output * decay + tl.sum(partial * share[:, None], 0)
        total = total * decay + tl.sum(share, 0)
        largest = new_largest
    # the largest share is 1, so only an empty row is changed by the lower bound
    output /= tl.maximum(total, 1.0)
    tl.store(
        output_ptr + dim, output.to(output_ptr.dtype.element_ty), mask=dim < HEAD_SIZE
    )


@triton.jit
def log_sum_exp(
    partial_lse_ptr,  # [num_splits, num_q_heads] float32, base 2, of one row
    first_head,
    num_splits,
    num_q_heads,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Return `[GROUP_PADDED]`, the log-sum-exp of a group's query heads in base 2."""
    group = tl.arange(0, GROUP_PADDED)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    for start in range(0, num_splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        # [GROUP_PADDED, SPLITS]
        lse = tl.load(
            partial_lse_ptr
            + split[None, :] * num_q_heads
            + (first_head + group)[:, None],
            mask=(group < GROUP)[:, None] & (split < num_splits)[None, :],
            other=float("-inf"),
        )
        new_largest = tl.maximum(largest, tl.max(lse, 1))
        new_largest = tl.where(group < GROUP, new_largest, 0.0)
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(tl.exp2(lse - new_largest[:, None]), 1)
        largest = new_largest
    return largest + tl.log2(total)
