# SPDX-License-Identifier: Apache-2.0
"""What a layer's attention is made with, on any platform."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata, AttentionType

from vllm_roco.attention.bound_caches import CacheViews, WhileBound
from vllm_roco.attention.current_config import remember_vllm_config
from vllm_roco.attention.layers import refuse_layer
from vllm_roco.kv_cache.page import PageShape
from vllm_roco.validation import validated_config

T = TypeVar("T", bound=AttentionMetadata)


class RocoImpl(AttentionImpl[T]):
    """One layer's attention, without the attending; arguments as in `AttentionImpl`.

    Attributes:
        vllm_config: The configuration that the layer is built under.
        config: The options.
        soft_cap: Bound of the logits' soft cap, 0 for none.
        page_shape: What a page of the layer holds.
        views: Views of the cache that vLLM has bound to the layer.

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
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.vllm_config = remember_vllm_config()
        self.config = validated_config(self.vllm_config)
        self.page_shape = PageShape(self.num_kv_heads, head_size, self.config.measures)
        self.views = WhileBound(partial(CacheViews.of, shape=self.page_shape))
