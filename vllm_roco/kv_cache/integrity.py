# SPDX-License-Identifier: Apache-2.0
"""Checks the books of a block manager; for tests and tools, not for serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_roco.eviction_schedule import NEVER

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from vllm_roco.kv_cache.manager import RocoManager


def check_integrity(manager: RocoManager) -> None:
    """Raise if the books of a block manager do not agree with its block tables.

    Proportional to all rows.

    Raises:
        RuntimeError: A block stands in two places of requests that do not share it, or
            is free, a gap is not where it must be, a length at which a row changes is
            passed over, or the running counts differ from the rows.
    """
    for request_id in manager.held.requests - manager.req_to_blocks.keys():
        raise RuntimeError(
            f"request {request_id} has no row, but {manager.held.of(request_id)} "
            "blocks are on the books"
        )
    holders: dict[int, list[str]] = {}
    for request_id, row in manager.req_to_blocks.items():
        _check_row(manager, request_id, row)
        for block in row:
            if not block.is_null:
                holders.setdefault(block.block_id, []).append(request_id)
    for block_id, request_ids in holders.items():
        _check_block(manager, manager.block_pool.blocks[block_id], request_ids)


def _check_row(manager: RocoManager, request_id: str, row: list[KVCacheBlock]) -> None:
    held = manager.held_blocks(request_id)
    if held != manager.held.of(request_id):
        raise RuntimeError(
            f"request {request_id} holds {held} blocks, but "
            f"{manager.held.of(request_id)} are on the books"
        )
    nulls = [index for index, block in enumerate(row) if block.is_null]
    first = manager.plans.of(request_id).schedule.budget_blocks
    gap = list(range(first, first + len(nulls)))
    if nulls != gap:
        raise RuntimeError(
            f"request {request_id} has null blocks at {nulls}, but eviction leaves a "
            f"gap at {gap}"
        )
    schedule = manager.plans.of(request_id).schedule
    next_loss = (first + len(nulls) + schedule.stride_blocks) * manager.block_size
    if next_loss > schedule.until:
        next_loss = NEVER
    quiet_until = manager.quiet_until.get(request_id, 0)
    if quiet_until > len(row) * manager.block_size or quiet_until >= next_loss:
        raise RuntimeError(
            f"request {request_id} is taken to need nothing up to {quiet_until} "
            f"tokens, but has {len(row)} blocks in its row and loses the next at "
            f"{next_loss} tokens"
        )


def _check_block(
    manager: RocoManager, block: KVCacheBlock, request_ids: list[str]
) -> None:
    cache = None if manager.prefix_cache is None else manager.prefix_cache.blocks
    last, *others = reversed(request_ids)
    if others and not (cache and all(map(cache.is_sharer, request_ids))):
        raise RuntimeError(
            f"block {block.block_id} is held by request {last} and by request "
            f"{others[0]}, but who may evict shares no blocks"
        )
    name = f"block {block.block_id} of request {last}"
    if block.ref_cnt != len(request_ids):
        raise RuntimeError(
            f"{name} has {block.ref_cnt} references, but stands in "
            f"{len(request_ids)} rows"
        )
    if block.block_hash and not (cache and all(map(cache.is_owner, request_ids))):
        raise RuntimeError(
            f"{name} bears a hash, but who evicts writes over its blocks"
        )
