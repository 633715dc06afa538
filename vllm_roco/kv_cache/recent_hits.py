# SPDX-License-Identifier: Apache-2.0
"""Remembers which prefixes were hit lately, and which of them more than once."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import KeysView

from vllm.v1.core.kv_cache_utils import BlockHash

NUM_HITS = 64
"""Hits that are remembered.

A prefix with two among them serves a request in 32 at least.
"""


class RecentHits:
    """The last hits; noting one takes constant time.

    Args:
        num_hits: How many are remembered.
    """

    def __init__(self, num_hits: int = NUM_HITS) -> None:
        self._hits: deque[BlockHash] = deque()
        self._num_hits = num_hits
        self._number_of: Counter[BlockHash] = Counter()
        # a dictionary, for its order
        self._repeated: dict[BlockHash, None] = {}

    @property
    def repeated(self) -> KeysView[BlockHash]:
        """Prefixes that were hit more than once."""
        return self._repeated.keys()

    def add(self, prefix: BlockHash) -> None:
        """Note that a request begins with a prefix."""
        self._hits.append(prefix)
        self._number_of[prefix] += 1
        if self._number_of[prefix] > 1:
            self._repeated[prefix] = None
        if len(self._hits) > self._num_hits:
            self._forget(self._hits.popleft())

    def _forget(self, prefix: BlockHash) -> None:
        self._number_of[prefix] -= 1
        left = self._number_of[prefix]
        if left < 2:
            self._repeated.pop(prefix, None)
        if not left:
            del self._number_of[prefix]
