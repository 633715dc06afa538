# SPDX-License-Identifier: Apache-2.0
"""Ranks that share the heads of layers choose as one with all of them."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.kv_cache.specs import roco_spec
from tests.ops.test_select_victims import BLOCK_SIZE, SMALL, Group, options, steps_of
from vllm_roco import reference
from vllm_roco.attention.cuda.eviction import (
    CudaEviction,
    EvictionScratch,
    EvictionScratchSize,
)
from vllm_roco.kv_cache import page
from vllm_roco.ops.merge_slices import merge_slices

NUM_RANKS = 2
KV_HEADS = 4


class Ranks:
    """Threads in the place of `TensorRanks`, of which one at a time launches."""

    def __init__(self, own: int, board: dict[int, torch.Tensor], turn: Any) -> None:
        self.own = own
        self._board = board
        self._turn = turn

    def __len__(self) -> int:
        return NUM_RANKS

    def gather(self, numbers: torch.Tensor) -> None:
        self._board[self.own] = numbers[self.own].clone()
        with self._turn:
            self._turn.notify_all()
            assert self._turn.wait_for(lambda: len(self._board) == NUM_RANKS, 60)
        for rank, its in self._board.items():
            numbers[rank] = its


class OneAtATime(threading.Condition):
    """A condition whose lock a thread holds while it launches."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())


def share_of(group: Group, rank: int) -> list[torch.Tensor]:
    """Return caches with a rank's heads of a group's."""
    heads = slice(rank * KV_HEADS // NUM_RANKS, (rank + 1) * KV_HEADS // NUM_RANKS)
    caches = []
    for whole in group.caches:
        cache = reference.paged_cache(
            num_blocks=len(whole),
            num_kv_heads=KV_HEADS // NUM_RANKS,
            block_size=BLOCK_SIZE,
            head_size=16,
            dtype=whole.dtype,
            device=whole.device,
        )
        cache.copy_(whole[:, heads])
        page.statistics_view(cache).copy_(page.statistics_view(whole)[:, heads])
        page.first_positions_view(cache).copy_(page.first_positions_view(whole))
        caches.append(cache)
    return caches


@pytest.mark.parametrize(
    ("shield", "has_prompts"),
    [
        ("contribution", True),
        ("contribution", False),
        ("peak", True),
        ("deviation", False),
    ],
)
def test_ranks_move_what_one_would(
    shield: str, has_prompts: bool, device: torch.device
) -> None:
    steps = steps_of(SMALL)
    if not has_prompts:
        steps = [(after - 1, after) for _, after in steps if after]
    group = Group.build(steps, SMALL, device, kv_heads=KV_HEADS)
    how = options(SMALL, shield=shield, shield_ratio=0.5)
    expected = group.expected(how)
    num_rows, live_blocks = group.live_table.shape
    step = SimpleNamespace(
        live_table=group.live_table,
        evicted_before=group.evicted(0),
        evicted_after=group.evicted(1),
        eviction_rows=group.int32([how] * num_rows),
    )
    seq_lens = group.int32([after for _, after in steps])
    spec = roco_spec(
        num_kv_heads=KV_HEADS // NUM_RANKS,
        head_size=16,
        budget=SMALL.budget,
        stride=SMALL.stride,
    )
    size = EvictionScratchSize.of(
        rows=num_rows + 3,
        live_blocks=live_blocks + 5,
        resident_blocks=SMALL.budget_blocks,
        num_layers=len(group.caches),
        measure=True,
        ranks=NUM_RANKS,
    )
    board: dict[int, torch.Tensor] = {}
    turn = OneAtATime()
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        with turn:
            bound = [page.page_view(x)[:, None, None] for x in share_of(group, rank)]
            scratch = EvictionScratch.over(
                torch.full((size.total,), torch.nan, device=device), size
            )
            eviction = CudaEviction(
                cast("Any", SimpleNamespace(kv_caches=lambda: bound)),
                spec,
                scratch,
                cast("Any", Ranks(rank, board, turn)),
                SMALL.budget_blocks + SMALL.stride_blocks,
            )
            eviction.evict(cast("Any", step), seq_lens, has_prompts=has_prompts)
            counts = scratch.num_moves[:num_rows].tolist()
            found[rank] = [
                [(s, t) for s, t in moves[:count]]
                for moves, count in zip(scratch.moves.tolist(), counts, strict=False)
            ]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(NUM_RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(expected)
    assert found == dict.fromkeys(range(NUM_RANKS), expected)
    # what ranks tell each other is as little as the kind of step allows
    width = live_blocks + 5
    if not has_prompts:
        width = SMALL.budget_blocks + SMALL.stride_blocks
    assert board[0].shape == (num_rows, 2, width)


def test_rows_that_are_not_due_are_left_alone(device: torch.device) -> None:
    scores = torch.rand(3, 2, 2, 40, device=device)
    merged = torch.full((3, 2, 33), -1.0, device=device)
    merge_slices(
        scores=scores,
        seq_lens=torch.tensor([500, 520, 40], dtype=torch.int32, device=device),
        evicted_before=torch.tensor([3, 0, 0], dtype=torch.int32, device=device),
        evicted_after=torch.tensor([3, 2, 1], dtype=torch.int32, device=device),
        merged=merged,
        block_size=BLOCK_SIZE,
    )
    expected = torch.full_like(merged, -1.0)
    expected[1, :, :32] = scores[1].amax(0)[:, :32]
    expected[2, :, :2] = scores[2].amax(0)[:, :2]
    assert torch.equal(merged, expected)
