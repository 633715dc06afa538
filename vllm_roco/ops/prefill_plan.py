# SPDX-License-Identifier: Apache-2.0
"""How the measurement of prompts is laid out on a device, and the memory it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_roco.ops.device import Device

MIN_ROWS = 16
"""Queries of the smallest tile that tensor cores multiply."""

SUMS = 3
"""What a program tells of a block: sum and squares of its masses, and the largest."""

LONG_WORK = 64
"""Products of two tiles from which programs share a run's queries."""

PROGRAMS = 3
"""Of a launch for each multiprocessor, at least: as many fit on it at once."""

MOST_RUNS = 2048
"""Runs of blocks that a launch may share."""

MOST_SUMS = 2**16
"""Numbers that the programs of a launch may leave for each other."""


@dataclass(frozen=True)
class PrefillPlan:
    """How the product of queries and keys is tiled.

    Attributes:
        rows: Queries, a power of two of at least 16.
        columns: Tokens, a power of two of at least 16; a longer block takes its own.
        num_warps: Warps of a program.
        num_stages: Tiles of queries in flight, the one being computed included.
        programs: How many programs a launch should have at least.
        splits: Programs that share the queries of a run of blocks; at most
            `most_splits` of all runs.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    programs: int = 1
    splits: int = 1

    def blocks(self, block_size: int) -> int:
        """Return the blocks of a run, which programs have to themselves."""
        return max(1, self.columns // next_power_of_2(block_size))

    def runs(self, max_live_tokens: int, block_size: int) -> int:
        """Return the most runs of a row."""
        return cdiv(max_live_tokens, self.blocks(block_size) * block_size)

    def most_splits(self, num_runs: int, block_size: int) -> int:
        """Return how many programs of a run have room to tell each other its sums.

        A power of two: a chunk's tiles are one, and shares should be equal.

        Args:
            num_runs: Runs of all rows and kv heads.
            block_size: Tokens per block.
        """
        if num_runs > MOST_RUNS:
            return 1
        room = max(1, MOST_SUMS // (SUMS * self.blocks(block_size) * num_runs))
        return 1 << (room.bit_length() - 1)

    def for_step(
        self,
        *,
        num_rows: int,
        num_q_heads: int,
        num_kv_heads: int,
        block_size: int,
        max_query_len: int,
        max_live_tokens: int,
    ) -> PrefillPlan:
        """Return the plan with as many splits as a step is worth.

        Few programs have much to do each, as for a lone prompt with few kv heads on
        this rank; one that goes through many queries is done long after the others.

        Args:
            num_rows: Prompts of the step.
            num_q_heads: Query heads of the layer on this rank.
            num_kv_heads: KV heads of the layer on this rank.
            block_size: Tokens per block.
            max_query_len: Queries of the longest prompt.
            max_live_tokens: Bound of the rows' live lengths.
        """
        runs = num_rows * num_kv_heads * self.runs(max_live_tokens, block_size)
        tiles = cdiv(max_query_len, self.rows)
        long = cdiv(tiles * num_q_heads // num_kv_heads, LONG_WORK)
        wanted = next_power_of_2(max(long, cdiv(self.programs, runs)))
        most = min(tiles, self.most_splits(runs, block_size))
        return replace(self, splits=max(1, min(wanted, most)))


def plan_prefill(
    *, head_size: int, block_size: int, dtype: torch.dtype, device: Device
) -> PrefillPlan:
    """Choose a tile that fits in shared memory and registers.

    A program holds the keys of a block or more, and the queries in flight.
    `benchmarks/kernels/sweep_prefill_mass.py` tells what the others cost.

    Args:
        head_size: Numbers per head.
        block_size: Tokens per block.
        dtype: Element type of the query, in which keys are multiplied.
        device: Where the kernel runs.

    Raises:
        NotImplementedError: The keys of a block do not fit on the device.
    """
    row_bytes = next_power_of_2(head_size) * dtype.itemsize
    # without tensor cores, for float32, the product lives in registers
    rows, columns, stages = (32, 32, 2) if dtype.itemsize == 4 else (64, 64, 3)
    keys_bytes = max(columns, next_power_of_2(block_size)) * row_bytes
    if rows * row_bytes * stages > device.shared_memory // 2:
        stages = 2
    while keys_bytes + rows * row_bytes * stages > device.shared_memory:
        if rows > MIN_ROWS:
            rows //= 2
        elif stages > 1:
            stages -= 1
        else:
            raise NotImplementedError(
                f"roco: block_size = {block_size} is too large for heads of "
                f"{head_size} numbers of {dtype} on this GPU: a program's "
                f"{device.shared_memory // 1024} KiB of shared memory must hold the "
                "keys of a block and some queries. Choose a smaller --block-size; 16 "
                "always fits."
            )
    return PrefillPlan(
        rows=rows,
        columns=columns,
        num_warps=4,
        num_stages=stages,
        programs=PROGRAMS * device.num_multiprocessors,
    )


@dataclass(frozen=True)
class PrefillScratch:
    """What the programs that share a run of blocks leave for the last of them.

    Launches of one stream may share it: each leaves the arrivals as it found them.

    Attributes:
        sums: Flat float32, `MOST_SUMS` numbers.
        arrivals: `[MOST_RUNS]` int32, 0 between launches.
    """

    sums: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, device: torch.device) -> PrefillScratch:
        """Allocate it; nobody is done with a run yet."""
        return cls(
            torch.empty(MOST_SUMS, dtype=torch.float32, device=device),
            torch.zeros(MOST_RUNS, dtype=torch.int32, device=device),
        )

    @staticmethod
    def num_bytes() -> int:
        """Return the bytes that it takes."""
        return MOST_SUMS * torch.float32.itemsize + MOST_RUNS * torch.int32.itemsize
