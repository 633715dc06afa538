# SPDX-License-Identifier: Apache-2.0
"""Foresees how many blocks the requests that were let in will yet take.

vLLM lets a request in when all its known tokens fit next to what is held at that
moment. A budget makes what is held go up and down: prompts are read in chunks, and a
sequence that evicts takes a stride of blocks and gives it back, again and again. Who is
let in in a valley would cost another one its cache at the next peak.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_roco.eviction_schedule import EvictionSchedule


class AdmissionForecast:
    """What requests will take that are being read or have begun to evict.

    What others will generate is not foreseen: they may end before they evict, and vLLM
    lets requests in on that hope. So are those that evict no more. Every update takes
    constant time; the answer is kept until an evicting sequence takes or gives blocks.
    """

    def __init__(self) -> None:
        # of requests that are being read: the most blocks they will hold
        self._most: dict[str, int] = {}
        # likewise: what they will yet take, and its sum
        self._untaken: dict[str, int] = {}
        self._untaken_blocks = 0
        # of requests that evict: by which arithmetic
        self._schedules: dict[str, EvictionSchedule] = {}
        # evicting sequences that are read by their stride, in blocks
        self._strides: dict[int, _Stride] = {}
        self._next_peaks: int | None = 0

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

    def evict(self, request_id: str, schedule: EvictionSchedule | None) -> None:
        """Note that a request gives up blocks.

        Args:
            request_id: The request.
            schedule: By which it goes on to evict, None if it evicts no more.
        """
        if schedule is not None:
            self._schedules[request_id] = schedule
        else:
            self._forget_phase(request_id)

    def update(self, request_id: str, held_blocks: int) -> None:
        """Note what a request holds.

        Args:
            request_id: The request.
            held_blocks: Blocks that it holds now.
        """
        most = self._most.get(request_id)
        if most is not None:
            self._set_untaken(request_id, max(0, most - held_blocks))
            return
        schedule = self._schedules.get(request_id)
        if schedule is None:
            return
        blocks = schedule.stride_blocks
        stride = self._strides.get(blocks)
        if stride is None:
            stride = self._strides[blocks] = _Stride(blocks)
        above = held_blocks - schedule.budget_blocks
        if stride.move(request_id, max(0, above - 1) % blocks):
            self._next_peaks = None

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self.finish_reading(request_id)
        self._forget_phase(request_id)

    def blocks(self) -> int:
        """Return by how many blocks more than now will be held at most.

        Sequences of different strides are taken to reach their peaks together.
        """
        if self._next_peaks is None:
            self._next_peaks = sum(
                stride.next_peak() for stride in self._strides.values()
            )
        return self._untaken_blocks + self._next_peaks

    def _set_untaken(self, request_id: str, blocks: int | None) -> None:
        self._untaken_blocks -= self._untaken.pop(request_id, 0)
        if blocks is not None:
            self._untaken[request_id] = blocks
            self._untaken_blocks += blocks

    def _forget_phase(self, request_id: str) -> None:
        schedule = self._schedules.pop(request_id, None)
        if schedule is None:
            return
        blocks = schedule.stride_blocks
        stride = self._strides.get(blocks)
        if stride is None:
            return
        if stride.drop(request_id):
            self._next_peaks = None
        if not stride:
            del self._strides[blocks]


class _Stride:
    """Evicting sequences that take and give the same number of blocks.

    Args:
        stride_blocks: The blocks evicted at a time.
    """

    def __init__(self, stride_blocks: int) -> None:
        self._stride_blocks = stride_blocks
        # the blocks held above the budget, from the first to the last of a stride
        self._phase: dict[str, int] = {}
        self._num_in_phase: Counter[int] = Counter()
        self._next_peak: int | None = 0

    def __bool__(self) -> bool:
        return bool(self._phase)

    def move(self, request_id: str, phase: int) -> bool:
        """Note a sequence's phase, and return whether it is another one than before."""
        before = self._phase.get(request_id)
        if before == phase:
            return False
        self.drop(request_id)
        self._phase[request_id] = phase
        self._num_in_phase[phase] += 1
        self._next_peak = None
        return True

    def drop(self, request_id: str) -> bool:
        """Forget a sequence, and return whether it was known."""
        phase = self._phase.pop(request_id, None)
        if phase is None:
            return False
        self._num_in_phase[phase] -= 1
        if not self._num_in_phase[phase]:
            del self._num_in_phase[phase]
        self._next_peak = None
        return True

    def next_peak(self) -> int:
        """Return by how many blocks more than now these will hold at most.

        Everything repeats after a stride of tokens, in which an evicting sequence takes
        a block every `block_size` steps and gives a stride of blocks back once, when it
        is next scheduled: others may have taken another block by then. All are taken to
        be at the same place within their newest blocks, which counts up to a block too
        many for each, and a stride too many where an eviction is still in flight.
        """
        if self._next_peak is None:
            num_decoding, stride = len(self._phase), self._stride_blocks
            given = most = 0
            # what is held is highest when some of the sequences are about to give
            for phase in sorted(self._num_in_phase, reverse=True):
                ending = self._num_in_phase[phase]
                growth = (stride - phase) * num_decoding - given
                most = max(most, growth + num_decoding - ending)
                given += stride * ending
            self._next_peak = most
        return self._next_peak
