# SPDX-License-Identifier: Apache-2.0
"""Evicts on CUDA: selection over all layers, then one move of whole pages.

Always launched, also inside a captured graph; the kernels return at once for rows in
which nothing is due.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_roco.attention.bound_caches import WhileBound
from vllm_roco.config import RocoConfig, blocks_of
from vllm_roco.kv_cache.page import PageShape, statistics_view
from vllm_roco.ops.move_blocks import first_pages, move_blocks
from vllm_roco.ops.select_victims import (
    SCORES,
    first_statistics,
    select_oldest,
    select_victims,
)

if TYPE_CHECKING:
    from vllm_roco.attention.cuda.step_buffers import StepBuffers
    from vllm_roco.attention.layers import LayerGroup
    from vllm_roco.kv_cache.spec import RocoSpec

MAX_SLICES = 8
"""Programs that share the layers of one evicting row."""


@dataclass(frozen=True)
class CacheAddresses:
    """Where the layers' caches lie, as the kernels need it.

    Attributes:
        first_page: `[num_layers]` int64, address of page 0 of every layer.
        first_statistics: `[num_layers]` int64, address of its statistics, or None.
        page_bytes: Bytes of a page, tail included.
    """

    first_page: torch.Tensor
    first_statistics: torch.Tensor | None
    page_bytes: int

    @classmethod
    def of(cls, *kv_caches: torch.Tensor, shape: PageShape) -> CacheAddresses:
        """Find the caches; in a warm-up run, never while a graph is captured.

        Args:
            kv_caches: The layers' caches as vLLM binds them, in the order of the model.
            shape: What their pages hold.
        """
        states = [shape.states_view(kv_cache) for kv_cache in kv_caches]
        statistics = None
        if shape.has_statistics:
            statistics = first_statistics([statistics_view(x) for x in states])
        return cls(
            first_page=first_pages(states),
            first_statistics=statistics,
            page_bytes=kv_caches[0].stride(0) * kv_caches[0].element_size(),
        )


class CudaEviction:
    """Chooses and moves for one KV cache group.

    Args:
        layers: The layers of the group.
        spec: Their KV cache spec.
        config: The options.
        max_rows: Most rows of a step, padding included.
        max_blocks: Most live blocks of a row.
        device: Where the caches lie.
    """

    def __init__(
        self,
        layers: LayerGroup,
        spec: RocoSpec,
        config: RocoConfig,
        *,
        max_rows: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        schedule = spec.schedule

        self._layers = layers
        self._config = config
        self._num_kv_heads = spec.num_kv_heads
        self._block_size = spec.block_size
        self._budget_blocks = schedule.budget_blocks
        self._shield_blocks = int(config.shield_ratio * schedule.budget_blocks)
        self._sink_blocks = blocks_of(config.sink, spec.block_size)
        # every move goes over a resident block
        self._moves = torch.zeros(
            (max_rows, schedule.budget_blocks, 2), dtype=torch.int32, device=device
        )
        self._num_moves = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._moved = torch.zeros(1, dtype=torch.int64, device=device)
        slices = min(MAX_SLICES, len(layers)) if config.measures else 0
        self._scores = torch.zeros(
            (max_rows, slices, SCORES, max_blocks), dtype=torch.float32, device=device
        )
        self._addresses = WhileBound(partial(CacheAddresses.of, shape=spec.page_shape))

    @property
    def moved(self) -> torch.Tensor:
        """`[1]` int64 on the device, blocks moved so far, each once for all layers."""
        return self._moved

    @property
    def last_layer(self) -> str:
        """Name of the layer that evicts."""
        return self._layers.last

    def evict(self, step: StepBuffers, seq_lens: torch.Tensor) -> None:
        """Choose victims for every row whose `E` grows, and move the survivors.

        Args:
            step: The step's buffers, all rows.
            seq_lens: `[num_rows]` int32, length of each row after the step.
        """
        num_rows = len(seq_lens)
        caches = self._addresses.of(*self._layers.kv_caches())
        moves, num_moves = self._moves[:num_rows], self._num_moves[:num_rows]
        if caches.first_statistics is None:
            select_oldest(
                live_table=step.live_table,
                evicted_before=step.evicted_before,
                evicted_after=step.evicted_after,
                moves=moves,
                num_moves=num_moves,
                moved=self._moved,
                budget_blocks=self._budget_blocks,
                sink_blocks=self._sink_blocks,
            )
        else:
            select_victims(
                first_statistics_of_layer=caches.first_statistics,
                stride_statistics_block=caches.page_bytes // torch.float32.itemsize,
                num_kv_heads=self._num_kv_heads,
                seq_lens=seq_lens,
                live_table=step.live_table,
                evicted_before=step.evicted_before,
                evicted_after=step.evicted_after,
                scores=self._scores[:num_rows],
                moves=moves,
                num_moves=num_moves,
                moved=self._moved,
                budget_blocks=self._budget_blocks,
                block_size=self._block_size,
                shield_by_peak=self._config.shield == "peak",
                shield_blocks=self._shield_blocks,
                sink=self._config.sink,
                recent=self._config.recent,
            )
        move_blocks(
            first_page_of_layer=caches.first_page,
            moves=moves,
            num_moves=num_moves,
            page_bytes=caches.page_bytes,
        )
