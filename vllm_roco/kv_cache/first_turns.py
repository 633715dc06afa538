# SPDX-License-Identifier: Apache-2.0
"""Tells by those before whether a conversation's first turn is likely to go on."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash

    from vllm_roco.kv_cache.snapshots import SnapshotStore

LEAST_SHARE_CONTINUED = 1 / 4
"""Share of the outcomes that must be conversations that went on."""
NUM_OUTCOMES = 64
"""First turns of which it is remembered what became of them."""
LEAST_OUTCOMES = 8
"""With fewer of them nothing is known."""
TRIES = 16
"""One in so many is taken to go on in any case, to see whether that has changed."""
MAX_KEPT = 1024
"""Ends of first turns that are watched, at most."""


class FirstTurns:
    """What became of that which first turns have left.

    Somebody began with it, or the memory went to others first. As long as little is
    known, they are taken to go on: what they leave is in nobody's way yet.

    Args:
        store: Where it is kept.
    """

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        # the oldest first
        self._kept: OrderedDict[BlockHash, None] = OrderedDict()
        self._outcomes: deque[bool] = deque(maxlen=NUM_OUTCOMES)
        self._num_asked = 0

    def keep(self, key: BlockHash) -> None:
        """Note that a first turn has left something under a key."""
        self._kept[key] = None
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def hit(self, key: BlockHash) -> None:
        """Note that a request begins with what is under a key."""
        if key in self._kept:
            del self._kept[key]
            self._outcomes.append(True)

    def forget(self) -> None:
        """Watch none of what is kept: the cache has been emptied."""
        self._kept.clear()

    def take_next(self) -> bool:
        """Return whether the next one is taken to go on, and count that it came.

        Constant time in the mean.
        """
        while self._kept and not self._store.has_ends(next(iter(self._kept))):
            self._kept.popitem(last=False)
            self._outcomes.append(False)
        self._num_asked += 1
        num_outcomes = len(self._outcomes)
        return (
            num_outcomes < LEAST_OUTCOMES
            or sum(self._outcomes) >= LEAST_SHARE_CONTINUED * num_outcomes
            or self._num_asked % TRIES == 0
        )
