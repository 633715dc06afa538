# SPDX-License-Identifier: Apache-2.0
"""The rows of a step's requests on the device, brought there when they change."""

from __future__ import annotations

import torch

from vllm_roco.eviction_row import EvictionRow


class UploadedRows:
    """Keeps a buffer, which captured graphs read, as the step needs it.

    A server whose requests bring no options uploads nothing, but for dummy batches.

    Args:
        buffer: `[max_rows, NUM_ROW_FIELDS]` int32 on the device. Behind a step's rows
            it may hold those of former ones.
        default: The row of requests that bring no options.
    """

    def __init__(self, buffer: torch.Tensor, default: EvictionRow) -> None:
        self._buffer = buffer
        row = torch.tensor(default, dtype=torch.int32, device="cpu")
        # on the host: vLLM has planned the device's memory when a builder is made
        self._default = self._staged(row.repeat(len(buffer), 1))
        self._write(self._default)
        # what the buffer begins with; None while all of it is the default
        self._rows: torch.Tensor | None = None

    def set(self, rows: torch.Tensor | None) -> None:
        """Bring a step's rows to the device, in the order of its stream.

        Args:
            rows: `[num_rows, NUM_ROW_FIELDS]` int32 on the host, which nobody changes
                any more; None if all are the default.
        """
        if rows is None:
            if self._rows is not None:
                self._write(self._default)
        elif self._rows is None or not torch.equal(self._rows, rows):
            self._write(self._staged(rows))
        self._rows = rows

    def _staged(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows in memory that is reused when copies from it are done."""
        return rows.pin_memory() if self._buffer.is_cuda else rows

    # vLLM's profiling run, in which the buffer is made, is one of inference
    @torch.inference_mode()
    def _write(self, rows: torch.Tensor) -> None:
        self._buffer[: len(rows)].copy_(rows, non_blocking=True)
