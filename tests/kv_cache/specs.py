# SPDX-License-Identifier: Apache-2.0
"""Cache specs, pools and caches as vLLM would make them, without an engine."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)

from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.spec import RocoSpec


def roco_spec(
    *,
    block_size: int = 16,
    num_kv_heads: int = 2,
    head_size: int = 16,
    dtype: torch.dtype = torch.float32,
    max_steps_in_flight: int = 1,
    **options: Any,
) -> RocoSpec:
    """Return the spec of a layer; by default a small budget of 4 blocks.

    Args:
        block_size: Tokens per block.
        num_kv_heads: KV heads of the layer.
        head_size: Of keys and values alike.
        dtype: Of the cache.
        max_steps_in_flight: Steps scheduled but not processed.
        **options: Options of RoCo.
    """
    defaults: dict[str, Any] = {
        "budget": 4 * block_size,
        "stride": 2 * block_size,
        "chunk": 4 * block_size,
        "sink": 0,
        "recent": 0,
    }
    full = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
    )
    config = RocoConfig(**{**defaults, **options})
    return RocoSpec.from_attention_spec(full, config, max_steps_in_flight)


def one_group(spec: RocoSpec, num_blocks: int, num_layers: int = 1) -> KVCacheConfig:
    """Return the plan of a model whose layers all have the given spec.

    Args:
        spec: The layers' spec.
        num_blocks: Blocks of the pool, the null block included.
        num_layers: Layers, each with its own tensor.
    """
    names = [f"model.layers.{index}.self_attn.attn" for index in range(num_layers)]
    page = spec.page_size_bytes
    tensor = KVCacheTensor(
        size=num_layers * num_blocks * page,
        layers=names,
        layer_stride=num_blocks * page,
        block_stride=page,
    )
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
    )


def bind_caches(plan: KVCacheConfig, layout: KVCacheLayout) -> list[torch.Tensor]:
    """Return each layer's cache, as vLLM lays it out, with nan in every place.

    Args:
        plan: A plan with one group.
        layout: Order of the dimensions in memory.

    Returns:
        One `[num_blocks, 1, 1, page_bytes / itemsize]` view per layer.
    """
    (group,) = plan.kv_cache_groups
    (tensor,) = plan.kv_cache_tensors
    # all bits set is not a number in every dtype
    memory = torch.full((tensor.size,), -1, dtype=torch.int8)
    return create_kv_cache_views(
        memory, group.kv_cache_spec, plan.num_blocks, layout, tensor
    )


def bind_states(plan: KVCacheConfig, layout: KVCacheLayout) -> list[torch.Tensor]:
    """Return what `bind_caches` does, as K and V.

    Returns:
        One `[num_blocks, num_kv_heads, block_size, 2 * head_size]` view per layer.
    """
    (group,) = plan.kv_cache_groups
    shape = group.kv_cache_spec.page_shape
    return [shape.states_view(cache) for cache in bind_caches(plan, layout)]
