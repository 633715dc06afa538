# SPDX-License-Identifier: Apache-2.0
"""Attention over a bounded KV cache in PyTorch, for CPU builds of vLLM.

Written to be read and to be right: scores are float32, and the arithmetic of measuring
and choosing is that of `vllm_roco.policy` itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from vllm_roco import policy
from vllm_roco.attention.bound_caches import CacheViews
from vllm_roco.attention.cpu.eviction import evict
from vllm_roco.attention.cpu.metadata import Batch, RocoCpuMetadata
from vllm_roco.attention.impl import RocoImpl
from vllm_roco.attention.layers import name_of
from vllm_roco.fp8_cache import states_from_bytes, to_bytes

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer

MAX_SCORES = 1 << 24
"""Float32 scores that are held at once, 64 MiB; longer prompts go tile by tile."""


class RocoCpuImpl(RocoImpl[RocoCpuMetadata]):
    """One layer's attention in PyTorch; see `RocoImpl`."""

    @override
    def _write(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        views: CacheViews,
        slot_mapping: torch.Tensor,
    ) -> None:
        block_size = views.states.shape[2]
        used = (slot_mapping >= 0).nonzero().flatten()
        slots = slot_mapping[used]
        key, value = key[used], value[used]
        if self.is_fp8:
            key = to_bytes(key, layer._k_scale.view(-1, 1))
            value = to_bytes(value, layer._v_scale.view(-1, 1))
        new = torch.cat((key, value), -1)
        views.states[slots // block_size, :, slots % block_size] = new

    @override
    def _step(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        views: CacheViews,
        step: RocoCpuMetadata,
        output: torch.Tensor,
    ) -> None:
        for batch in step.batches:
            self._attend(layer, query, views, batch, output)
        step.num_layers_done += 1
        if name_of(layer) == step.layers.last:
            self._evict(step)

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        views: CacheViews,
        batch: Batch,
        output: torch.Tensor,
    ) -> None:
        block_size = views.states.shape[2]
        keys, values = gather(
            views.states, batch.table, batch.live_tokens, *self._scales(layer)
        )
        pages, statistics = views.statistics, None
        if (
            pages is not None
            and views.first_positions is not None
            and batch.is_measured.any()
        ):
            statistics = pages[batch.table]
            new = batch.is_new & batch.is_measured
            # what their last owners left
            statistics[new] = 0
            first_positions = batch.first_positions[new].float()
            views.first_positions[batch.table[new]] = first_positions

        num_rows, num_queries = batch.tokens.shape
        per_query = num_rows * self.num_heads * keys.shape[2]
        tile = max(1, MAX_SCORES // per_query)
        for begin in range(0, num_queries, tile):
            end = min(begin + tile, num_queries)
            tokens = batch.tokens[:, begin:end]
            # the last query of the tile sees everything up to its own token
            seen = batch.live_tokens - (num_queries - end)
            blocks = -(-int(seen.max()) // block_size)
            result, probabilities = attend(
                query[tokens].float() * self.scale,
                keys[:, :, : blocks * block_size],
                values[:, :, : blocks * block_size],
                seen,
                self.soft_cap or None,
                self.sinks,
            )
            output[tokens] = result.to(output.dtype)
            if statistics is not None:
                mass = policy.block_mass(probabilities, block_size)
                first_tokens = torch.arange(blocks) * block_size
                observers = policy.queries_that_see(
                    first_tokens, seen[:, None], end - begin
                )
                policy.accumulate(statistics[:, :blocks], mass, observers)
        if pages is not None and statistics is not None:
            pages[batch.table[batch.is_measured]] = statistics[batch.is_measured]

    def _evict(self, step: RocoCpuMetadata) -> None:
        if step.num_layers_done != len(step.layers):
            raise RuntimeError(
                f"roco: the last layer attended after {step.num_layers_done - 1} of "
                f"{len(step.layers) - 1} other layers; eviction needs all of them"
            )
        if step.evicting:
            caches = [
                self.page_shape.states_view(kv_cache)
                for kv_cache in step.layers.kv_caches()
            ]
            moved = sum(
                evict(
                    sequence,
                    caches,
                    step.block_size,
                    measured=self.config.measures,
                    any_rank=step.any_rank,
                )
                for sequence in step.evicting
            )
            if step.moved_blocks is not None:
                step.moved_blocks.add(moved)


def gather(
    kv_cache: torch.Tensor,
    table: torch.Tensor,
    live_tokens: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the live keys and values of a batch, zero behind the live tokens.

    Pages can hold anything there, and not a number times zero is not zero.

    Args:
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
        table: `[num_rows, num_row_blocks]` int64, block ids.
        live_tokens: `[num_rows]` int64.
        k_scale: Of the keys where the cache holds bytes, see `fp8_cache`.
        v_scale: Of the values, likewise.

    Returns:
        Two tensors `[num_rows, num_kv_heads, num_row_blocks * block_size, head_size]`
        float32.
    """
    states = kv_cache[table].transpose(1, 2).flatten(2, 3)
    if k_scale is None or v_scale is None:
        states = states.float()
    else:
        states = states_from_bytes(states, k_scale, v_scale)
    behind = torch.arange(states.shape[2]) >= live_tokens[:, None]
    states.masked_fill_(behind[:, None, :, None], 0)
    keys, values = states.chunk(2, -1)
    return keys, values


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of consecutive queries at the end of what is seen.

    Args:
        query: `[num_rows, num_queries, num_heads, head_size]` float32, scaled.
        keys: `[num_rows, num_kv_heads, num_keys, head_size]` float32.
        values: Likewise.
        seen: `[num_rows]` int64, keys that the row's last query sees.
        soft_cap: Bound of the scores by `tanh`, or None.
        sinks: `[num_heads]`, of any dtype: one more score, of a key without a value. Or
            None.

    Returns:
        The output, shaped as `query`, and the probabilities
        `[num_rows, num_kv_heads, group, num_queries, num_keys]`, both float32. What a
        sink takes, the probabilities of a query lack.
    """
    num_rows, num_queries, num_heads, head_size = query.shape
    num_kv_heads, num_keys = keys.shape[1], keys.shape[2]
    group = num_heads // num_kv_heads
    by_head = query.unflatten(2, (num_kv_heads, group)).permute(0, 2, 3, 1, 4)
    scores = by_head.flatten(2, 3) @ keys.transpose(2, 3)
    if soft_cap is not None:
        scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
    last_seen = seen[:, None] - num_queries + torch.arange(num_queries)
    hidden = torch.arange(num_keys) > last_seen[:, :, None]
    scores = scores.unflatten(2, (group, num_queries))
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    if sinks is not None:
        of_sinks = sinks.float().view(num_kv_heads, group, 1, 1)
        scores = torch.cat((scores, of_sinks.expand(*scores.shape[:-1], 1)), -1)
    probabilities = scores.softmax(-1)[..., :num_keys]
    result = probabilities.flatten(2, 3) @ values
    result = result.unflatten(2, (group, num_queries)).permute(0, 3, 1, 2, 4)
    return result.reshape(num_rows, num_queries, num_heads, head_size), probabilities
