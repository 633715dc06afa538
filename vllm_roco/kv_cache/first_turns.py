# SPDX-License-Identifier: Apache-2.0
"""Tells by those before whether a conversation's first turn is likely to go on."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash

    from vllm_roco.kv_cache.snapshots import SnapshotStore

SHARE_THAT_GOES_ON = 1 / 4
"""Share of those whose lot is known that must have gone on."""
NUM_LOTS = 64
"""First turns whose lot is remembered."""
TRIES = 16
"""One in so many is taken to go on in any case, to see whether that has changed."""
MAX_KEPT = 1024
"""First turns of which it is awaited whether somebody goes on from them, at most."""


class FirstTurns:
    """What became of that which first turns have left.

    Somebody began with it, or the memory went to others first. As long as neither is
    known of any, they are taken to go on: what they leave is in nobody's way yet.

    Args:
        store: Where it is kept.
    """

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        # the oldest first
        self._kept: OrderedDict[BlockHash, None] = OrderedDict()
        self._lots: deque[bool] = deque(maxlen=NUM_LOTS)
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
            self._lots.append(True)

    def go_on(self) -> bool:
        """Return whether the next one is taken to go on; constant time in the mean."""
        while self._kept and not self._store.has(next(iter(self._kept))):
            self._kept.popitem(last=False)
            self._lots.append(False)
        self._num_asked += 1
        enough = sum(self._lots) >= SHARE_THAT_GOES_ON * len(self._lots)
        return enough or self._num_asked % TRIES == 0
