# SPDX-License-Identifier: Apache-2.0
"""What a layer's attention is made with and asked for, on any platform."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from typing_extensions import override
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata, AttentionType

from vllm_roco import fp8_cache
from vllm_roco.attention.block_copies import copy_whole_pages
from vllm_roco.attention.bound_caches import CacheViews, WhileBound
from vllm_roco.attention.current_config import remember_vllm_config
from vllm_roco.attention.layers import refuse_layer
from vllm_roco.attention.request_rows import watch_runners
from vllm_roco.kv_cache.page import PageShape
from vllm_roco.validation import validated_config

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer

T = TypeVar("T", bound=AttentionMetadata)

_turns = itertools.count(1)


class RocoImpl(AttentionImpl[T]):
    """One layer's attention, without the arithmetic; arguments as in `AttentionImpl`.

    Attributes:
        vllm_config: The configuration that the layer is built under.
        config: The options.
        soft_cap: Bound of the logits' soft cap, 0 for none.
        sinks: `[num_heads]`, a logit of each query head in the softmax's denominator
            alone, in the model's dtype; a parameter that is loaded later, to be read at
            run time. None for none.
        is_fp8: Whether the cache holds bytes, see `fp8_cache`.
        page_shape: What a page of the layer holds.
        views: Views of the cache that vLLM has bound to the layer.
        turn: Of the layer in vLLM's profiling runs, which go through the layers in the
            order of the model; larger than those of layers before it, 0 for no run yet.

    Raises:
        NotImplementedError: The layer cannot have its cache bounded.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        refuse_layer(
            alibi_slopes, sliding_window, attn_type, kv_sharing_target_layer_name, extra
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.is_fp8 = kv_cache_dtype in fp8_cache.CACHE_DTYPES
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.sinks = sinks
        self.vllm_config = remember_vllm_config()
        self.config = validated_config(self.vllm_config)
        watch_runners()
        copy_whole_pages()
        self.page_shape = PageShape(self.num_kv_heads, head_size, self.config.measures)
        self.views = WhileBound(partial(CacheViews.of, shape=self.page_shape))
        self.turn = 0

    def _scales(
        self, layer: AttentionLayer
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return by what keys and values are multiplied; None unless they are bytes."""
        return (layer._k_scale, layer._v_scale) if self.is_fp8 else (None, None)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the step's keys and values into their slots.

        Args:
            layer: The vLLM layer.
            key: `[num_tokens, num_kv_heads, head_size]`, on CUDA perhaps padded.
            value: Likewise.
            kv_cache: As vLLM binds it, see `PageShape.states_view`.
            slot_mapping: `[num_tokens]` int64, -1 for padding.
        """
        self._write(layer, key, value, self.views.of(kv_cache), slot_mapping)

    @override
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: T,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the live blocks, measure, and in the last layer evict.

        Args:
            layer: The vLLM layer.
            query: `[num_tokens, num_heads, head_size]`.
            key: Already in the cache, see `do_kv_cache_update`.
            value: Likewise.
            kv_cache: As vLLM binds it, see `PageShape.states_view`.
            attn_metadata: The step, or None in profiling runs, in which nothing is
                attended.
            output: `[num_tokens, num_heads, head_size]`, written in place.
            output_scale: Must be None: quantised outputs are not announced.
            output_block_scale: Likewise.
        """
        if attn_metadata is None:
            self.turn = next(_turns)
            self._profile(query)
            return output.fill_(0)
        views = self.views.of(kv_cache)
        self._step(layer, query, views, attn_metadata, output)
        return output

    @abstractmethod
    def _write(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        views: CacheViews,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values; see `do_kv_cache_update`."""

    @abstractmethod
    def _step(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        views: CacheViews,
        step: T,
        output: torch.Tensor,
    ) -> None:
        """Attend, measure and evict; see `forward`."""

    # not all platforms have something to do
    def _profile(self, query: torch.Tensor) -> None:  # noqa: B027
        """Take what memory the largest step will need.

        Args:
            query: `[num_tokens, num_heads, head_size]`, of the largest step.
        """
