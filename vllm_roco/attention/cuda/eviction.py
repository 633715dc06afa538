# SPDX-License-Identifier: Apache-2.0
"""Evicts on CUDA: selection over all layers, then one move of whole pages.

Always launched, also inside a captured graph; the kernels return at once for rows in
which nothing is due.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_roco.attention.bound_caches import WhileBound
from vllm_roco.kv_cache.page import PageShape, statistics_view
from vllm_roco.ops.merge_slices import merge_slices
from vllm_roco.ops.move_blocks import first_pages, move_blocks
from vllm_roco.ops.score_blocks import SCORES, first_statistics
from vllm_roco.ops.scratch import carve, total
from vllm_roco.ops.select_oldest import select_oldest
from vllm_roco.ops.select_victims import select_victims

if TYPE_CHECKING:
    from vllm_roco.attention.cuda.step_buffers import StepBuffers
    from vllm_roco.attention.layers import LayerGroup
    from vllm_roco.attention.tensor_ranks import TensorRanks
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
        dtype: Of keys and values as they are stored.
    """

    first_page: torch.Tensor
    first_statistics: torch.Tensor | None
    page_bytes: int
    dtype: torch.dtype

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
            dtype=kv_caches[0].dtype,
        )


@dataclass(frozen=True)
class EvictionScratchSize:
    """What the kernels of one eviction need to tell each other.

    Attributes:
        scores: Shape of `EvictionScratch.scores`.
        moves: Shape of `EvictionScratch.moves`.
        shared: Numbers of `EvictionScratch.shared`.
    """

    scores: tuple[int, int, int, int]
    moves: tuple[int, int, int]
    shared: int

    @classmethod
    def of(
        cls,
        *,
        rows: int,
        live_blocks: int,
        resident_blocks: int,
        num_layers: int,
        measure: bool,
        ranks: int = 1,
    ) -> EvictionScratchSize:
        """Return what the largest step needs.

        Args:
            rows: Most rows of a step, padding included.
            live_blocks: Most live blocks of a row that may evict.
            resident_blocks: Most resident blocks of one.
            num_layers: Layers of the group.
            measure: Whether statistics are kept.
            ranks: Ranks that choose together.
        """
        slices = min(MAX_SLICES, num_layers) if measure else 0
        return cls(
            scores=(rows, slices, SCORES, live_blocks),
            # every move goes over a resident block
            moves=(rows, resident_blocks, 2),
            shared=ranks * rows * SCORES * live_blocks if ranks > 1 else 0,
        )

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Numbers of four bytes of scores, moves, their count, and what is shared."""
        scores, moves = math.prod(self.scores), math.prod(self.moves)
        return scores, moves, self.moves[0], self.shared

    @property
    def total(self) -> int:
        """Numbers of all parts together."""
        return total(self.counts)


@dataclass(frozen=True)
class EvictionScratch:
    """What the kernels of one eviction tell each other.

    Attributes:
        scores: `[rows, slices, SCORES, live_blocks]` float32, see `select_victims`.
        moves: `[rows, resident_blocks, 2]` int32, source and destination block.
        num_moves: `[rows]` int32.
        shared: Flat float32, the scores of all ranks that choose together.
    """

    scores: torch.Tensor
    moves: torch.Tensor
    num_moves: torch.Tensor
    shared: torch.Tensor

    @classmethod
    def over(cls, memory: torch.Tensor, size: EvictionScratchSize) -> EvictionScratch:
        """Lay the scratch over memory.

        Args:
            memory: Flat float32, at least `size.total` numbers.
            size: What the largest step needs.
        """
        scores, moves, num_moves, shared = carve(memory, size.counts)
        return cls(
            scores.view(size.scores),
            moves.view(torch.int32).view(size.moves),
            num_moves.view(torch.int32),
            shared,
        )


class CudaEviction:
    """Chooses and moves for one KV cache group.

    Args:
        layers: The layers of the group.
        spec: Their KV cache spec.
        scratch: What its kernels may overwrite; nobody else does while they run.
        ranks: Those that choose together; None if this one chooses by itself.
        decode_blocks: Most live blocks of a row with one query that is due.
    """

    def __init__(
        self,
        layers: LayerGroup,
        spec: RocoSpec,
        scratch: EvictionScratch,
        ranks: TensorRanks | None = None,
        decode_blocks: int = 0,
    ) -> None:
        self._ranks = ranks
        self._decode_blocks = decode_blocks
        self._layers = layers
        self._num_kv_heads = spec.num_kv_heads
        self._head_size = spec.head_size
        self._block_size = spec.block_size
        self._scratch = scratch
        self._moved = torch.zeros(1, dtype=torch.int64, device=scratch.moves.device)
        self._addresses = WhileBound(partial(CacheAddresses.of, shape=spec.page_shape))

    @property
    def moved(self) -> torch.Tensor:
        """`[1]` int64 on the device, blocks moved so far, each once for all layers."""
        return self._moved

    @property
    def last_layer(self) -> str:
        """Name of the layer that evicts."""
        return self._layers.last

    def evict(
        self, step: StepBuffers, seq_lens: torch.Tensor, *, has_prompts: bool = True
    ) -> None:
        """Choose victims for every row whose `E` grows, and move the survivors.

        Args:
            step: The step's buffers, all rows.
            seq_lens: `[num_rows]` int32, length of each row after the step.
            has_prompts: Whether any row has several queries.
        """
        num_rows = len(seq_lens)
        caches = self._addresses.of(*self._layers.kv_caches())
        moves = self._scratch.moves[:num_rows]
        num_moves = self._scratch.num_moves[:num_rows]
        if caches.first_statistics is None:
            select_oldest(
                live_table=step.live_table,
                evicted_before=step.evicted_before,
                evicted_after=step.evicted_after,
                rows=step.eviction_rows,
                moves=moves,
                num_moves=num_moves,
                moved=self._moved,
                block_size=self._block_size,
            )
        else:
            of_all_ranks = None
            if self._ranks is not None:
                width = self._scratch.scores.shape[3]
                if not has_prompts:
                    width = min(width, self._decode_blocks)
                of_all_ranks = partial(
                    self._of_all_ranks, self._ranks, width, step, seq_lens
                )
            select_victims(
                first_page_of_layer=caches.first_page,
                first_statistics_of_layer=caches.first_statistics,
                page_bytes=caches.page_bytes,
                num_kv_heads=self._num_kv_heads,
                head_size=self._head_size,
                dtype=caches.dtype,
                seq_lens=seq_lens,
                live_table=step.live_table,
                evicted_before=step.evicted_before,
                evicted_after=step.evicted_after,
                rows=step.eviction_rows,
                scores=self._scratch.scores[:num_rows],
                moves=moves,
                num_moves=num_moves,
                moved=self._moved,
                block_size=self._block_size,
                of_all_ranks=of_all_ranks,
            )
        move_blocks(
            first_page_of_layer=caches.first_page,
            moves=moves,
            num_moves=num_moves,
            page_bytes=caches.page_bytes,
        )

    def _of_all_ranks(
        self,
        ranks: TensorRanks,
        width: int,
        step: StepBuffers,
        seq_lens: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """Return `[num_rows, num_ranks, SCORES, width]` float32, see `select_victims`.

        Every step does so, also one in which nothing is due: that is known on the
        device alone. It is as little as the kind of step allows.
        """
        shape = len(ranks), len(scores), SCORES, width
        shared = self._scratch.shared[: math.prod(shape)].view(shape)
        merge_slices(
            scores=scores,
            seq_lens=seq_lens,
            evicted_before=step.evicted_before,
            evicted_after=step.evicted_after,
            merged=shared[ranks.own],
            block_size=self._block_size,
        )
        ranks.gather(shared)
        return shared.transpose(0, 1)
