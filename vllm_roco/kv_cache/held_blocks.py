# SPDX-License-Identifier: Apache-2.0
"""Counts how many blocks each request holds, and the largest of those counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import KeysView


class HeldBlocks:
    """Blocks held per request, with the largest count at hand.

    A histogram of the counts makes every update constant time on average: the largest
    count only ever walks down as far as allocations have raised it.
    """

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._requests_with: Counter[int] = Counter()
        self._largest = 0

    @property
    def largest(self) -> int:
        """The most blocks that one request holds now."""
        return self._largest

    @property
    def requests(self) -> KeysView[str]:
        """The requests that have a count."""
        return self._of.keys()

    def of(self, request_id: str) -> int:
        """Return the blocks that a request holds."""
        return self._of.get(request_id, 0)

    def add(self, request_id: str, change: int) -> int:
        """Change a request's count by `change` blocks and return it."""
        before = self._of.get(request_id, 0)
        after = self._of[request_id] = before + change
        self._move(before, after)
        return after

    def drop(self, request_id: str) -> None:
        """Forget a request that holds nothing any more."""
        self._move(self._of.pop(request_id, 0), 0)

    def _move(self, before: int, after: int) -> None:
        counts = self._requests_with
        counts[after] += 1
        counts[before] -= 1
        if after > self._largest:
            self._largest = after
        while self._largest and not counts[self._largest]:
            self._largest -= 1
