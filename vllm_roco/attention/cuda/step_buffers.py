# SPDX-License-Identifier: Apache-2.0
"""The memory into which the live-table kernel writes each step.

A captured graph replays the addresses it was captured with, so it never moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepBuffers:
    """What the live-table kernel writes each step; rows as in vLLM's batch.

    Attributes:
        live_table: `[num_rows, live_width]` int32, block ids.
        live_lens: `[num_rows]` int32, tokens attended.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        evicted_after: `[num_rows]` int32, `E` at its end.
    """

    live_table: torch.Tensor
    live_lens: torch.Tensor
    evicted_before: torch.Tensor
    evicted_after: torch.Tensor

    @staticmethod
    def num_bytes(rows: int, width: int) -> int:
        """Return the bytes of at most `rows` rows of `width` live blocks."""
        return rows * (width + 3) * torch.int32.itemsize

    @classmethod
    def allocate(cls, rows: int, width: int, device: torch.device) -> StepBuffers:
        """Allocate for at most `rows` rows of `width` live blocks."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(zeros(rows, width), zeros(rows), zeros(rows), zeros(rows))

    def hold(self, rows: int, width: int) -> bool:
        """Return whether there is room for so many rows of `width` live blocks."""
        most_rows, most_blocks = self.live_table.shape
        return rows <= most_rows and width <= most_blocks

    def rows(self, start: int, end: int) -> StepBuffers:
        """Return a range of rows, as views."""
        return StepBuffers(
            self.live_table[start:end],
            self.live_lens[start:end],
            self.evicted_before[start:end],
            self.evicted_after[start:end],
        )
