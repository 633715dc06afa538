# SPDX-License-Identifier: Apache-2.0
"""Makes snapshots at places of prompts: those that others are likely to begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.prefix_keys import PrefixKeys
    from vllm_roco.kv_cache.prefix_places import PrefixPlaces
    from vllm_roco.kv_cache.prefix_readers import PrefixReaders
    from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes
    from vllm_roco.kv_cache.snapshots import SnapshotStore
    from vllm_roco.kv_cache.window_manager import WindowManager
    from vllm_roco.request_plans import RequestPlans


class SnapshotPublisher:
    """Makes a snapshot of who has read a prompt up to a place, before it reads on.

    Args:
        store: Where they are kept.
        keys: Under which keys.
        places: At which lengths.
        readers: Who stands there, and for which prefixes others wait.
        shared: Where prompts part.
        plans: What holds for each request.
        rows: The block table of each request.
        windows: Managers of the groups of layers with a window.

    Attributes:
        sources: Of snapshots that the step being scheduled makes, the blocks that they
            are copied from; who begins with one in the same step copies these.
    """

    def __init__(
        self,
        store: SnapshotStore,
        keys: PrefixKeys,
        places: PrefixPlaces,
        readers: PrefixReaders,
        shared: SharedPrefixes,
        plans: RequestPlans,
        rows: Mapping[str, Sequence[KVCacheBlock]],
        windows: Sequence[WindowManager],
    ) -> None:
        self.sources: dict[BlockHash, Sequence[KVCacheBlock]] = {}
        self._store = store
        self._keys = keys
        self._places = places
        self._readers = readers
        self._shared = shared
        self._plans = plans
        self._rows = rows
        self._windows = windows
        # to be made before the step being scheduled
        self._copies: list[tuple[KVCacheBlock, KVCacheBlock]] = []

    def is_due(self, request: Request, length: int, prefix: BlockHash) -> bool:
        """Return whether a snapshot at a place of a prompt is worth its blocks."""
        # the last place for a prompt that goes on, and for the same one once more:
        # its last token must be read to go on from
        return (
            (
                self._places.ends(request).following(length)
                >= request.num_prompt_tokens
                and not self._plans.of(request.request_id).is_read_for_later_turns
            )
            or self._shared.part_at(prefix)
            or self._readers.is_wanted(prefix)
        )

    def publish(
        self, request: Request, length: int, prefix: BlockHash, *, is_wanted: bool
    ) -> bool:
        """Make a snapshot of what a request holds, and return whether one was made.

        Args:
            request: One that has read so much, and no more.
            length: A place of its prompt.
            prefix: What stands for the prompt up to there.
            is_wanted: Whether another request waits for it.
        """
        request_id = request.request_id
        live = self._keys.live_blocks(request, self._rows[request_id], length)
        windows = [w.blocks_at(request_id, length) for w in self._windows]
        copies = self._store.publish(prefix, live, windows, is_wanted=is_wanted)
        if not copies:
            return False
        self._copies += copies
        self.sources[prefix] = live
        return True

    def publish_due(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Make what is due, when all requests of a step are chosen.

        Returns:
            Blocks to copy from and to before the step, each with a reference for that:
            of all snapshots since the last step.
        """
        # their copies become free now, behind the blocks of snapshots that were hit
        for prefix in self.sources:
            self._store.renew(prefix)
        for request, length, prefix in self._readers.arrivals():
            if self.is_due(request, length, prefix):
                is_wanted = self._readers.is_wanted(prefix)
                self.publish(request, length, prefix, is_wanted=is_wanted)
        copies, self._copies = self._copies, []
        self.sources.clear()
        return copies
