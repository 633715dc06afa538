# SPDX-License-Identifier: Apache-2.0
"""Which program of decode attention attends over what; worked out once for a step.

Lengths are known on the device alone, and a captured launch has the same programs in
every step: those of the rows that it was captured with, to which vLLM pads. Rows with
more tokens come first, so that nobody waits for a long row that began last, and are
split:

* where all programs run at once, so that none has much more than its share;
* where they take turns, so that what is left is shared by as many as fit at once, which
  is guided self-scheduling (Polychronopoulos and Kuck, 1987): rows that begin early
  stay whole, and splits become smaller towards the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_roco.ops.decode.plan import DecodePlan
from vllm_roco.ops.launch import Launcher

# five, in a sector of memory each
SPLIT_FIELDS = 8
ROW_FIELDS = 2
RANKED_FIELDS = 2
# rows that the program sorts in at a time, and rows with which it compares them
ROWS = 128
OTHERS = 64
FINEST = 8
"""Splits of the longest row towards the end, where rows take turns."""


@dataclass(frozen=True)
class DecodeSplits:
    """The splits of a step's rows; launches of one stream may share it.

    Attributes:
        splits: `[most, SPLIT_FIELDS]` int32: row, number of the split in it, splits of
            the row, tokens of the row, place of what the row's first split leaves for
            a merge; those of a row stand together. 0 splits: nothing to do.
        of_rows: `[num_rows, ROW_FIELDS]` int32: place of what a row's first split
            leaves, and the row's splits, at least 1.
        ranked: `[num_rows, RANKED_FIELDS]` int32: row and tokens, in their order.
        arrivals: `[kept, num_kv_heads]` int32, 0 between launches: how many programs of
            a row are done, at the place of what the first of them leaves.
    """

    splits: torch.Tensor
    of_rows: torch.Tensor
    ranked: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(
        cls,
        plans: Iterable[tuple[int, DecodePlan]],
        num_kv_heads: int,
        device: torch.device,
    ) -> DecodeSplits:
        """Allocate what is enough for every launch.

        Args:
            plans: The launches, as number of rows and plan.
            num_kv_heads: KV heads of the layer on this rank.
            device: Where it lies.
        """
        plans = list(plans)

        def zeros(numbers: Iterable[int], fields: int) -> torch.Tensor:
            shape = max(numbers), fields
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            zeros((plan.most_splits(rows) for rows, plan in plans), SPLIT_FIELDS),
            zeros((rows for rows, _ in plans), ROW_FIELDS),
            zeros((rows for rows, _ in plans), RANKED_FIELDS),
            zeros(
                (
                    0 if plan.merged_apart else plan.kept_splits(rows)
                    for rows, plan in plans
                ),
                num_kv_heads,
            ),
        )

    def deal(self, live_lens: torch.Tensor, plan: DecodePlan) -> None:
        """Split the rows of a step, on the device.

        Args:
            live_lens: `[num_rows]` int32, tokens that each attends over.
            plan: The layout of the launches to come.
        """
        (num_rows,) = live_lens.shape
        _launch(
            (1, 1, 1),
            {"num_warps": 8},
            live_lens_ptr=live_lens,
            splits_ptr=self.splits,
            of_rows_ptr=self.of_rows,
            ranked_ptr=self.ranked,
            num_rows=num_rows,
            shares=plan.shares,
            least_tokens=plan.least_tokens,
            most_splits=plan.most_splits(num_rows),
            merged_apart=int(plan.merged_apart),
            ROWS=ROWS,
            OTHERS=OTHERS,
            FINEST=FINEST,
            SPLIT_FIELDS=SPLIT_FIELDS,
            ROW_FIELDS=ROW_FIELDS,
            RANKED_FIELDS=RANKED_FIELDS,
        )


@triton.jit
def _shared_at_once(tokens, total, shares, least_tokens):
    """Return the splits of rows, of about a share each.

    Together these are at most `shares` and one a row.
    """
    total = tl.maximum(total, 1)
    splits = (2 * tokens.to(tl.int64) * shares + total) // (2 * total)
    return tl.maximum(tl.minimum(splits, tokens // least_tokens), 1).to(tl.int32)


@triton.jit
def _shared_in_turns(tokens, left, shares, least_tokens):
    """Return the splits of rows, of at most one and a half shares each.

    Beside one a row these are at most two and a third for each of `shares`: one where
    the least share is reached, and `log(FINEST / 1.5)` before, where each row takes its
    part of what is left; rounding takes a third.

    Args:
        tokens: Of the row.
        left: The same and those of all rows behind it.
        shares: Among how many they are shared.
        least_tokens: Of a share.
    """
    share = tl.maximum(tl.cdiv(left, shares), least_tokens)
    return tl.maximum((tokens + share // 2) // share, 1).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        *("num_rows", "shares", "least_tokens", "most_splits"),
        "merged_apart",
    ]
)
def _deal_kernel(
    live_lens_ptr,  # [num_rows] int32
    splits_ptr,  # [>= most_splits, SPLIT_FIELDS] int32, as `DecodeSplits` has it
    of_rows_ptr,  # [>= num_rows, ROW_FIELDS] int32, likewise
    ranked_ptr,  # [>= num_rows, RANKED_FIELDS] int32: row, tokens
    num_rows,
    shares,
    least_tokens,
    most_splits,
    merged_apart,  # 1 or 0
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    FINEST: tl.constexpr,
    SPLIT_FIELDS: tl.constexpr,
    ROW_FIELDS: tl.constexpr,
    RANKED_FIELDS: tl.constexpr,
):
    # of many long rows more than 32 bits hold, times the shares
    total = tl.zeros([], tl.int64)
    longest = 0
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        tokens = tl.load(live_lens_ptr + row, mask=row < num_rows, other=0)
        total += tl.sum(tokens.to(tl.int64))
        longest = tl.maximum(longest, tl.max(tokens))

    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        tokens = tl.load(live_lens_ptr + row, mask=row < num_rows, other=0)
        rank = tl.zeros([ROWS], tl.int32)
        for first_other in range(0, num_rows, OTHERS):
            other = first_other + tl.arange(0, OTHERS)
            theirs = tl.load(live_lens_ptr + other, mask=other < num_rows, other=-1)
            longer = theirs[None, :] > tokens[:, None]
            as_long = theirs[None, :] == tokens[:, None]
            is_before = longer | (as_long & (other[None, :] < row[:, None]))
            rank += tl.sum(is_before.to(tl.int32), 1)
        ranked = ranked_ptr + rank * RANKED_FIELDS
        tl.store(ranked, row, mask=row < num_rows)
        tl.store(ranked + 1, tokens, mask=row < num_rows)
    # what other threads have stored is visible behind the barrier
    tl.debug_barrier()

    # long rows are split no finer than short ones, unless a share of all is less
    least_in_turns = tl.minimum(longest // FINEST, tl.cdiv(total, shares))
    least_in_turns = tl.maximum(least_in_turns, least_tokens)
    left = total
    num_splits = 0
    num_kept = 0
    for start in range(0, num_rows, ROWS):
        rank = start + tl.arange(0, ROWS)
        is_row = rank < num_rows
        ranked = ranked_ptr + rank * RANKED_FIELDS
        row = tl.load(ranked, mask=is_row, other=0)
        tokens = tl.load(ranked + 1, mask=is_row, other=0)
        if merged_apart == 1:
            splits = _shared_at_once(tokens, total, shares, least_tokens)
        else:
            wide = tokens.to(tl.int64)
            left_here = left - tl.cumsum(wide, 0) + wide
            splits = _shared_in_turns(tokens, left_here, shares, least_in_turns)
        splits = tl.where(is_row, splits, 0)
        kept = tl.where((splits > 1) | (merged_apart == 1), splits, 0)
        first = num_splits + tl.cumsum(splits, 0) - splits
        first_kept = num_kept + tl.cumsum(kept, 0) - kept
        of_row = of_rows_ptr + row * ROW_FIELDS
        tl.store(of_row, first_kept, mask=is_row)
        tl.store(of_row + 1, splits, mask=is_row)
        for split in range(0, tl.max(splits)):
            entry = splits_ptr + (first + split) * SPLIT_FIELDS
            is_split = split < splits
            tl.store(entry, row, mask=is_split)
            tl.store(entry + 1, tl.zeros([ROWS], tl.int32) + split, mask=is_split)
            tl.store(entry + 2, splits, mask=is_split)
            tl.store(entry + 3, tokens, mask=is_split)
            tl.store(entry + 4, first_kept, mask=is_split)
        left -= tl.sum(tokens.to(tl.int64))
        num_splits += tl.sum(splits)
        num_kept += tl.sum(kept)
    # the programs behind have nothing to do
    for start in range(num_splits, most_splits, ROWS):
        place = start + tl.arange(0, ROWS)
        entry = splits_ptr + place * SPLIT_FIELDS
        tl.store(entry + 2, tl.zeros([ROWS], tl.int32), mask=place < most_splits)


_launch = Launcher(_deal_kernel)
