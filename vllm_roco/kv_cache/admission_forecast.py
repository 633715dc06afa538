# SPDX-License-Identifier: Apache-2.0
"""Foresees how many blocks the requests that were let in will yet take.

vLLM lets a request in when all its known tokens fit next to what is held at that
moment. A budget makes what is held go up and down: prompts are read in chunks, and a
sequence that evicts takes a stride of blocks and gives it back, again and again. Who is
let in in a valley would cost another one its cache at the next peak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm_roco.eviction_schedule import EvictionSchedule
    from vllm_roco.kv_cache.held_blocks import HeldBlocks


class _Reading(NamedTuple):
    num_tokens: int
    most_blocks: int


class AdmissionForecast:
    """What requests will take that are being read or have begun to evict.

    What others will generate is not foreseen: they may end before they evict, and vLLM
    lets requests in on that hope.

    Args:
        schedule: The eviction arithmetic.
        held: Blocks held per request.

    Attributes:
        reading: Requests that are being read, by name.
    """

    def __init__(self, schedule: EvictionSchedule, held: HeldBlocks) -> None:
        self._schedule = schedule
        self._held = held
        self.reading: dict[str, _Reading] = {}

    def admit(self, request_id: str, num_tokens: int, most_blocks: int) -> None:
        """Note that a request is let in.

        Args:
            request_id: The request.
            num_tokens: Tokens that it has to read.
            most_blocks: The most blocks that it will hold while it reads them.
        """
        self.reading[request_id] = _Reading(num_tokens, most_blocks)

    def process(self, request_id: str, num_processed_tokens: int) -> None:
        """Note how far a request has come."""
        reading = self.reading.get(request_id)
        if reading is not None and num_processed_tokens >= reading.num_tokens:
            del self.reading[request_id]

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self.reading.pop(request_id, None)

    def ahead(self, evicting: Collection[str]) -> int:
        """Return by how many blocks more than now will be held at most.

        Everything repeats after a stride of tokens, in which an evicting sequence takes
        a block every `block_size` steps and gives a stride of blocks back once, when it
        is next scheduled: others may have taken another block by then. All are taken to
        be at the same place within their newest blocks, which counts up to a block too
        many for each, and a stride too many where an eviction is still in flight.

        Linear in the sequences that evict: asked only while a request waits that would
        fit without this.

        Args:
            evicting: Requests that have given up blocks.
        """
        most_read = sum(
            max(0, reading.most_blocks - self._held.of(request_id))
            for request_id, reading in self.reading.items()
        )
        stride = self._schedule.stride_blocks
        # by the blocks held above the budget, from the first to the last of a stride
        phases = [0] * stride
        for request_id in evicting:
            if request_id not in self.reading:
                above = self._held.of(request_id) - self._schedule.budget_blocks
                phases[max(0, above - 1) % stride] += 1
        num_decoding = sum(phases)
        growth = most = 0
        for ending in reversed(phases):
            growth += num_decoding
            others = num_decoding - ending if ending else 0
            most = max(most, growth + others)
            growth -= stride * ending
        return most_read + most
