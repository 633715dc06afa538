# SPDX-License-Identifier: Apache-2.0
"""How many blocks a worker moved: brought from the device, and shown as a metric."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_roco.observability.publisher import MovedBlocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig

INTERVAL_SECONDS = 0.1
"""A copy costs the host some 10 microseconds, so this is one part in ten thousand."""


class Event(Protocol):
    """What is needed of a `torch.cuda.Event`."""

    def record(self) -> None:
        """Mark this moment in the current stream."""

    def query(self) -> bool:
        """Return, without waiting, whether the stream got there."""


def moved_blocks_of(vllm_config: VllmConfig) -> MovedBlocks | None:
    """Return where this worker counts, None if another of its engine's workers does."""
    parallel = vllm_config.parallel_config
    # within the engine, tensor-parallel ranks of the first pipeline stage first
    if parallel.rank != 0:
        return None
    return MovedBlocks(vllm_config.instance_id, parallel.data_parallel_index)


class DeviceMovedBlocks:
    """Shows a counter that lies on a device, now and then and without waiting for it.

    The number is as old as the last copy, at most an interval and a step while steps
    run. Moves of the last steps before a pause show when steps run again.

    Args:
        counter: `[1]` int64 on the device, to which kernels add.
        moved_blocks: Where to count.
        event: Tells when a copy has arrived.
        clock: Seconds, for the interval.
    """

    def __init__(
        self,
        counter: torch.Tensor,
        moved_blocks: MovedBlocks,
        event: Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counter = counter
        self._moved_blocks = moved_blocks
        self._event = event
        self._clock = clock
        self._host = torch.zeros(
            counter.shape, dtype=counter.dtype, pin_memory=counter.is_cuda
        )
        self._arrived = self._host.numpy()
        self._under_way = False
        self._due = clock()
        self._shown: int | None = None

    def poll(self) -> None:
        """Show what has arrived, and start a copy if it is time.

        To be called before a step's kernels are launched, outside of graphs.
        """
        # the first copy to be started then holds warm-up runs and nothing else
        if not self._moved_blocks.connect():
            return
        if self._under_way:
            if not self._event.query():
                return
            self._under_way = False
            self._show(int(self._arrived[0]))
        now = self._clock()
        if now >= self._due:
            self._due = now + INTERVAL_SECONDS
            self._host.copy_(self._counter, non_blocking=True)
            self._event.record()
            self._under_way = True

    def _show(self, count: int) -> None:
        if self._shown is not None:
            self._moved_blocks.add(count - self._shown)
        self._shown = count
