# SPDX-License-Identifier: Apache-2.0
"""What vLLM's KV events tell of blocks: stored, reused, and in which group they are.

Blocks without statistics are hashed under a number that no group has, so that only
requests without statistics find them. A router that follows the events knows groups by
vLLM's numbers, and wants to know what is there, not who may begin with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.block_pool import BlockPool

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent

UNMEASURED_GROUP_ID = (1 << 32) - 1
"""Stands in hashes of blocks without statistics for vLLM's number of their group."""


class ToldBlockPool(BlockPool):
    """vLLM's pool, whose events name the group that blocks without statistics are in.

    Attributes:
        told_group_id: vLLM's number of that group.
    """

    told_group_id: int

    @classmethod
    def take_over(cls, pool: BlockPool, group_id: int) -> None:
        """Make vLLM's pool one of this class; it has built it, and keeps it."""
        assert type(pool) is BlockPool
        pool.__class__ = cls
        assert isinstance(pool, cls)
        pool.told_group_id = group_id

    @override
    def take_events(self) -> list[KVCacheEvent]:
        """Return the events since the last call, in order."""
        events: list[KVCacheEvent] = super().take_events()
        for event in events:
            if (
                isinstance(event, BlockStored | BlockRemoved)
                and event.group_idx == UNMEASURED_GROUP_ID
            ):
                event.group_idx = self.told_group_id
        return events
