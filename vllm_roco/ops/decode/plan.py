# SPDX-License-Identifier: Apache-2.0
"""How decode attention is laid out on a device, and the memory it needs there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_roco.ops.device import Device
from vllm_roco.ops.scratch import carve, total

MIN_TILE, MAX_TILE = 16, 128
"""Tokens that a program reads at a time."""

TILE_BYTES = 32 * 1024
"""Keys and values that a program reads at a time."""

PROGRAMS = 3
"""That fit on a multiprocessor at once, each with three tiles in flight."""

LONG_WORK = 0.55 * 2**20
"""Numbers of keys and values for each multiprocessor from which two programs share it.

Of a byte each they take as long to work on, if not to read."""


@dataclass(frozen=True)
class DecodePlan:
    """How one decode shape is laid out on the device; fixed when a graph is captured.

    Attributes:
        tile: Tokens a program reads at a time, a power of two of at least 16.
        splits: Programs that share the keys of one kv head and a row of mean length.
            From two on all run at once, and a second kernel merges them; else rows take
            turns, and those that are split are merged by the last of their programs.
        num_warps: Warps of the attention kernel.
        num_stages: Tiles in flight, the one being computed included.
        dependent_launch: Whether the second kernel is launched before the first ends
            (programmatic dependent launch, compute capability 9.0 and above).
        shares: Into how many the keys of all rows are dealt, for each kv head; where
            rows take turns, those that are left. See `splits.DecodeSplits`.
        least_tokens: Of a split that is none of the whole row; at least a tile.
    """

    tile: int
    splits: int
    num_warps: int
    num_stages: int
    dependent_launch: bool
    shares: int
    least_tokens: int

    def __post_init__(self) -> None:
        if self.least_tokens < self.tile:
            raise ValueError(
                f"a split of {self.least_tokens} tokens is less than a tile of "
                f"{self.tile}; allowed is at least a tile."
            )

    @property
    def merged_apart(self) -> bool:
        """Whether a second kernel merges the splits of rows, all of them."""
        return self.splits > 1

    def most_splits(self, num_rows: int) -> int:
        """Return the most splits of so many rows, and programs for each kv head.

        Those without a split end at once.
        """
        if self.merged_apart:
            return num_rows + self.shares
        # two and a third a share, at most; see `splits`
        return num_rows + 5 * self.shares // 2

    def kept_splits(self, num_rows: int) -> int:
        """Return how many of them leave something for a merge.

        Where rows take turns these are the splits of rows that have two or more, at
        most two for each that a row has beside its first.
        """
        most = self.most_splits(num_rows)
        return most if self.merged_apart else min(most, 2 * (most - num_rows))


@dataclass(frozen=True)
class DecodeScratchSize:
    """How many float32 numbers the launches that share a scratch need.

    Attributes:
        partial_output: `splits * q_heads * head_size`, of the splits that are merged.
        partial_lse: `splits * q_heads`, likewise.
        partial_sums: For each row and query head a number for every piece of the
            longest row; none when nothing is measured.
        max_blocks: Blocks of the longest row.
    """

    partial_output: int
    partial_lse: int
    partial_sums: int
    max_blocks: int

    @classmethod
    def of(
        cls,
        *,
        plans: Sequence[tuple[int, DecodePlan]],
        num_q_heads: int,
        head_size: int,
        block_size: int,
        max_live_tokens: int,
        measure: bool,
    ) -> DecodeScratchSize:
        """Return what is enough for every launch.

        Args:
            plans: The launches, as number of rows and plan.
            num_q_heads: Query heads of the layer on this rank.
            head_size: Numbers per head.
            block_size: Tokens per block.
            max_live_tokens: Bound of the rows' live lengths.
            measure: Whether statistics are to be kept.
        """
        max_blocks = cdiv(max_live_tokens, block_size)
        splits = max(plan.kept_splits(rows) for rows, plan in plans)
        partial_sums = 0
        if measure:
            partial_sums = max(
                rows * pieces_of(max_blocks, block_size, plan.tile)
                for rows, plan in plans
            )
        return cls(
            partial_output=splits * num_q_heads * head_size,
            partial_lse=splits * num_q_heads,
            partial_sums=partial_sums * num_q_heads,
            max_blocks=max_blocks,
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of each part, in the order of their attributes."""
        return self.partial_output, self.partial_lse, self.partial_sums

    @property
    def total(self) -> int:
        """Numbers of all parts together."""
        return total(self.counts)


@dataclass(frozen=True)
class DecodeScratch:
    """What programs leave for whoever merges the splits of their row.

    Attributes:
        partial_output: Flat float32, see `DecodeScratchSize`.
        partial_lse: Likewise.
        partial_sums: Likewise.
        max_blocks: Blocks of the longest row.
    """

    partial_output: torch.Tensor
    partial_lse: torch.Tensor
    partial_sums: torch.Tensor
    max_blocks: int

    @classmethod
    def over(cls, memory: torch.Tensor, size: DecodeScratchSize) -> DecodeScratch:
        """Lay the scratch over memory.

        Args:
            memory: Flat float32, at least `size.total` numbers.
            size: What the launches need.
        """
        partial_output, partial_lse, partial_sums = carve(memory, size.counts)
        return cls(partial_output, partial_lse, partial_sums, size.max_blocks)

    @classmethod
    def allocate(cls, size: DecodeScratchSize, device: torch.device) -> DecodeScratch:
        """Allocate the scratch by itself."""
        memory = torch.empty(size.total, dtype=torch.float32, device=device)
        return cls.over(memory, size)


def piece_size(block_size: int, tile: int) -> int:
    """Return the tokens of a piece: the largest power of two in block and tile."""
    return math.gcd(block_size, tile)


def pieces_of(max_blocks: int, block_size: int, tile: int) -> int:
    """Return the most pieces of a row of `max_blocks` blocks."""
    return max_blocks * block_size // piece_size(block_size, tile)


def plan_decode(
    *,
    num_rows: int,
    num_kv_heads: int,
    head_size: int,
    max_live_tokens: int,
    dtype: torch.dtype,
    device: Device,
) -> DecodePlan:
    """Choose a layout from what is known when the launch is recorded.

    Every row is taken to be as long as it can be. Where rows and heads alone give each
    multiprocessor two programs, rows take turns. Else keys are split until one program
    runs on each multiprocessor, two where they have long work or rows alone nearly give
    it one. Rows that are nearly enough for two stay whole as a rule, and have larger
    tiles: three programs fit on a multiprocessor, and of so few some would have three
    and others one.
    `benchmarks/kernels/sweep_decode.py` tells how far from the best this is.

    Args:
        num_rows: Decode rows of the launch, padding included.
        num_kv_heads: KV heads of the layer on this rank.
        head_size: Numbers per head.
        max_live_tokens: Bound of the rows' live lengths.
        dtype: Element type of the cache.
        device: Where the kernels run.
    """
    token_bytes = 2 * next_power_of_2(head_size) * dtype.itemsize

    def fitting(tile: int, splits: int, shares: int, num_stages: int) -> DecodePlan:
        tile = max(MIN_TILE, min(MAX_TILE, tile))
        while tile * token_bytes * num_stages > device.shared_memory:
            if tile > MIN_TILE:
                tile //= 2
            elif num_stages > 1:
                num_stages -= 1
            else:
                break
        return DecodePlan(
            tile=tile,
            splits=splits,
            num_warps=4,
            num_stages=num_stages,
            dependent_launch=device.capability >= (9, 0),
            shares=shares,
            # what a split costs is worth it from two tiles on, beside whole rows four
            least_tokens=(2 if splits > 1 else 4) * tile,
        )

    tile = TILE_BYTES // token_bytes
    programs = num_rows * num_kv_heads
    if programs >= 2 * device.num_multiprocessors:
        shares = PROGRAMS * device.num_multiprocessors // num_kv_heads
        return fitting(tile, splits=1, shares=max(1, shares), num_stages=3)
    numbers = programs * max_live_tokens * token_bytes // dtype.itemsize
    long = numbers > LONG_WORK * device.num_multiprocessors
    wanted = device.num_multiprocessors * (2 if long else 1)
    most = max(2, max_live_tokens // (2 * tile))
    splits = min(next_power_of_2(wanted // programs), most)
    if splits > 1:
        return fitting(tile, splits, shares=num_rows * splits, num_stages=3)
    shares = 2 * device.num_multiprocessors // num_kv_heads
    if 2 * shares >= 3 * num_rows:
        # a row of mean length is split
        splits = max(2, next_power_of_2(shares // num_rows))
        return fitting(tile, splits, shares, num_stages=3)
    # of a byte each, the numbers of the largest tile are half as much to wait for
    num_stages = 3 if dtype.itemsize == 1 else 2
    return fitting(2 * tile, splits=2, shares=shares, num_stages=num_stages)
