# SPDX-License-Identifier: Apache-2.0
"""Foresees how many blocks the requests that were let in will yet take.

vLLM lets a request in when all its known tokens fit next to what is held at that
moment. A budget makes what is held go up and down: prompts are read in chunks, and a
sequence that evicts takes a stride of blocks and gives it back, again and again. Who is
let in in a valley would cost another one its cache at the next peak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_roco.eviction_schedule import EvictionSchedule


class AdmissionForecast:
    """What requests will take that are being read or have begun to evict.

    What others will generate is not foreseen: they may end before they evict, and vLLM
    lets requests in on that hope. Every update takes constant time; the answer is kept
    until an evicting sequence takes or gives blocks.

    Args:
        schedule: The eviction arithmetic.
    """

    def __init__(self, schedule: EvictionSchedule) -> None:
        self._budget_blocks = schedule.budget_blocks
        self._stride_blocks = schedule.stride_blocks
        # of requests that are being read: the most blocks they will hold
        self._most: dict[str, int] = {}
        # likewise: what they will yet take, and its sum
        self._untaken: dict[str, int] = {}
        self._untaken_blocks = 0
        # evicting sequences by the blocks held above the budget, from the first to the
        # last of a stride
        self._phase: dict[str, int] = {}
        self._num_in_phase = [0] * self._stride_blocks
        self._next_peak: int | None = 0

    def admit(self, request_id: str, most_blocks: int) -> None:
        """Note that a request is let in, which holds nothing yet.

        Args:
            request_id: The request.
            most_blocks: The most blocks that it will hold while it is read.
        """
        self._most[request_id] = most_blocks
        self._set_untaken(request_id, most_blocks)

    def finish_reading(self, request_id: str) -> None:
        """Note that all tokens known at admission have been read."""
        if self._most.pop(request_id, None) is not None:
            self._set_untaken(request_id, None)

    def update(self, request_id: str, held_blocks: int, *, evicts: bool) -> None:
        """Note what a request holds.

        Args:
            request_id: The request.
            held_blocks: Blocks that it holds now.
            evicts: Whether it has given up blocks.
        """
        most = self._most.get(request_id)
        if most is not None:
            self._set_untaken(request_id, max(0, most - held_blocks))
        elif evicts:
            above = held_blocks - self._budget_blocks
            self._set_phase(request_id, max(0, above - 1) % self._stride_blocks)

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self.finish_reading(request_id)
        self._set_phase(request_id, None)

    def blocks(self) -> int:
        """Return by how many blocks more than now will be held at most.

        Everything repeats after a stride of tokens, in which an evicting sequence takes
        a block every `block_size` steps and gives a stride of blocks back once, when it
        is next scheduled: others may have taken another block by then. All are taken to
        be at the same place within their newest blocks, which counts up to a block too
        many for each, and a stride too many where an eviction is still in flight.
        """
        if self._next_peak is None:
            num_decoding = len(self._phase)
            growth = most = 0
            for ending in reversed(self._num_in_phase):
                growth += num_decoding
                others = num_decoding - ending if ending else 0
                most = max(most, growth + others)
                growth -= self._stride_blocks * ending
            self._next_peak = most
        return self._untaken_blocks + self._next_peak

    def _set_untaken(self, request_id: str, blocks: int | None) -> None:
        self._untaken_blocks -= self._untaken.pop(request_id, 0)
        if blocks is not None:
            self._untaken[request_id] = blocks
            self._untaken_blocks += blocks

    def _set_phase(self, request_id: str, phase: int | None) -> None:
        before = self._phase.get(request_id)
        if before == phase:
            return
        if before is not None:
            self._num_in_phase[before] -= 1
            del self._phase[request_id]
        if phase is not None:
            self._num_in_phase[phase] += 1
            self._phase[request_id] = phase
        self._next_peak = None
