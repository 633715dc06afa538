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

TILE_BYTES = 32 * 1024
"""Keys and values that a program reads at a time while several share a row."""

LONG_WORK = 0.55 * 2**20
"""Numbers of keys and values for each multiprocessor from which two programs share it.

Of a byte each they take as long to work on, if not to read."""


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
class DecodeScratchSize:
    """How many float32 numbers the launches that share a scratch need.

    Attributes:
        partial_output: `rows * q_heads * splits * head_size` where keys are split.
        partial_lse: `rows * q_heads * splits`, likewise.
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
        # a program that sees all keys of its row needs none of what splits leave
        splits = max(rows * plan.splits * (plan.splits > 1) for rows, plan in plans)
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
    """What the first kernel leaves for the second.

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
    multiprocessor two programs, splitting only costs, and large tiles save the most
    work around them; of an fp8 cache three are in flight. Else keys are split until one
    program runs on each multiprocessor, two where they have long work; a third stage
    hides what a single program waits for.
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

    def fitting(tile: int, splits: int, num_stages: int) -> DecodePlan:
        tile = max(16, min(128, tile))
        while tile * token_bytes * num_stages > device.shared_memory:
            if tile > 16:
                tile //= 2
            elif num_stages > 1:
                num_stages -= 1
            else:
                break
        dependent_launch = device.capability >= (9, 0)
        return DecodePlan(tile, splits, 4, num_stages, dependent_launch)

    tile = TILE_BYTES // token_bytes
    programs = num_rows * num_kv_heads
    if programs >= 2 * device.num_multiprocessors:
        # of a byte each, the numbers of the largest tile are half as much to wait for
        return fitting(2 * tile, splits=1, num_stages=3 if dtype.itemsize == 1 else 2)
    numbers = programs * max_live_tokens * token_bytes // dtype.itemsize
    long = numbers > LONG_WORK * device.num_multiprocessors
    wanted = device.num_multiprocessors * (2 if long else 1)
    splits = next_power_of_2(max(1, wanted // programs))
    # a split is worth its share of the second kernel from two tiles on
    most = max(1, max_live_tokens // (2 * tile))
    return fitting(tile, splits=min(splits, most), num_stages=3)
