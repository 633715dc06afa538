# SPDX-License-Identifier: Apache-2.0
"""What a sequence keeps that is read alone; `PagedWorker` holds all others to it."""

from __future__ import annotations

import zlib
from itertools import chain

from vllm_roco.eviction_schedule import EvictionSchedule


class LoneRun:
    """What a sequence keeps when it is the only one, in sets and without pages.

    Args:
        num_prompt_tokens: Length of the prompt.
        ends: Where its chunks end, once it evicts.
        answers: Where answers in it begin and end.
        schedule: Its eviction arithmetic.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        ends: list[int],
        answers: list[tuple[int, int]],
        schedule: EvictionSchedule,
    ) -> None:
        self._schedule = schedule
        evicts = [
            length
            for length in range(1, num_prompt_tokens)
            if any(start <= length <= end for start, end in answers)
        ]
        self._ends = chain(
            sorted({*(end for end in ends if end < num_prompt_tokens), *evicts}),
            iter(lambda: max(self._length + 1, num_prompt_tokens), None),
        )
        self._length = 0
        self._kept: set[int] = set()
        self._after: dict[int, frozenset[int]] = {0: frozenset()}

    def after(self, num_tokens: int) -> frozenset[int]:
        """Return the full blocks kept after the step that ends at this length."""
        while self._length < num_tokens:
            self._step(next(self._ends))
        return self._after[num_tokens]

    def _step(self, end: int) -> None:
        size = self._schedule.block_size
        before = self._schedule.evicted_blocks(self._length)
        after = self._schedule.evicted_blocks(end)
        self._kept.update(range(self._length // size, end // size))
        candidates = [
            block
            for block in self._kept
            if block < self._schedule.budget_blocks + after
        ]
        self._kept.difference_update(choose(candidates, after - before, end))
        self._length = end
        self._after[end] = frozenset(self._kept)


def choose(blocks: list[int], count: int, length: int) -> set[int]:
    """Return blocks to evict: arbitrary, but the same for the same arguments."""
    return set(sorted(blocks, key=lambda block: hash_of(block, length))[:count])


def hash_of(*values: object) -> int:
    """Return a number that stands for values, the same in every process."""
    return zlib.crc32(repr(values).encode())
