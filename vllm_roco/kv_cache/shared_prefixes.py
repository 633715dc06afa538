# SPDX-License-Identifier: Apache-2.0
"""Remembers at which places the prompts of requests part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from vllm.v1.core.kv_cache_utils import BlockHash

MAX_PREFIXES = 1 << 16
"""Prefixes that are remembered; some 10 MB."""


class _Parted:
    """Stands for several ways in which prompts go on."""


_PARTED: Final = _Parted()


class SharedPrefixes:
    """Prefixes of prompts, each with the one that follows.

    A prefix behind which two prompts went on in different ways is worth keeping: others
    will go on in yet other ways. One that all prompts so far went on from in the same
    way is not, because the longer one serves them better.

    Args:
        max_prefixes: How many are remembered, the most recently seen ones.
    """

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max = max_prefixes
        self._next: OrderedDict[BlockHash, BlockHash | _Parted | None] = OrderedDict()

    def enter(self, prefixes: Sequence[BlockHash]) -> None:
        """Remember a prompt.

        Args:
            prefixes: Hashes of its prefixes at the places in question, in order.
        """
        table = self._next
        following: BlockHash | None = None
        # the longest goes first when there are too many: the others lead to it
        for prefix in reversed(prefixes):
            seen = table.get(prefix)
            if seen is None:
                table[prefix] = following
            elif following is not None and seen != following:
                table[prefix] = _PARTED
            table.move_to_end(prefix)
            following = prefix
        while len(table) > self._max:
            table.popitem(last=False)

    def part_at(self, prefix: BlockHash) -> bool:
        """Return whether prompts went on behind a prefix in different ways."""
        return self._next.get(prefix) is _PARTED
