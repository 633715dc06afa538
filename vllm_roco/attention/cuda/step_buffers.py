# SPDX-License-Identifier: Apache-2.0
"""The memory into which the live-table kernel writes each step.

A captured graph replays the addresses it was captured with, so it never moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_roco.eviction_row import NUM_ROW_FIELDS
from vllm_roco.ops.live_table import build_live_table


@dataclass(frozen=True)
class StepBuffers:
    """What the live-table kernel reads and writes each step; rows as in vLLM's batch.

    Attributes:
        eviction_rows: `[num_rows, NUM_ROW_FIELDS]` int32, how each row evicts.
        live_table: `[num_rows, live_width]` int32, block ids.
        live_lens: `[num_rows]` int32, tokens attended.
        measured_lens: `[num_rows]` int32, the same, 0 for rows that are not measured.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        evicted_after: `[num_rows]` int32, `E` at its end.
    """

    eviction_rows: torch.Tensor
    live_table: torch.Tensor
    live_lens: torch.Tensor
    measured_lens: torch.Tensor
    evicted_before: torch.Tensor
    evicted_after: torch.Tensor

    @staticmethod
    def num_bytes(rows: int, width: int) -> int:
        """Return the bytes of at most `rows` rows of `width` live blocks."""
        return rows * (NUM_ROW_FIELDS + width + 4) * torch.int32.itemsize

    @classmethod
    def allocate(cls, rows: int, width: int, device: torch.device) -> StepBuffers:
        """Allocate for at most `rows` rows of `width` live blocks."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            zeros(rows, NUM_ROW_FIELDS),
            zeros(rows, width),
            *(zeros(rows) for _ in range(4)),
        )

    def hold(self, rows: int, width: int) -> bool:
        """Return whether there is room for so many rows of `width` live blocks."""
        most_rows, most_blocks = self.live_table.shape
        return rows <= most_rows and width <= most_blocks

    def fill(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        block_size: int,
    ) -> None:
        """Build the live tables of a step; arguments as in `build_live_table`."""
        build_live_table(
            block_table=block_table,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            rows=self.eviction_rows,
            live_table=self.live_table,
            live_lens=self.live_lens,
            measured_lens=self.measured_lens,
            evicted_before=self.evicted_before,
            evicted_after=self.evicted_after,
            block_size=block_size,
        )

    def rows(self, start: int, end: int) -> StepBuffers:
        """Return a range of rows, as views."""
        return StepBuffers(
            self.eviction_rows[start:end],
            self.live_table[start:end],
            self.live_lens[start:end],
            self.measured_lens[start:end],
            self.evicted_before[start:end],
            self.evicted_after[start:end],
        )
