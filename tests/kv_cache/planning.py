# SPDX-License-Identifier: Apache-2.0
"""The KV cache plan of one worker, made as the engine core of each release makes it."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

try:
    from vllm.v1.core.kv_cache_planning import (
        get_global_kv_cache_groups,
        get_kv_cache_configs,
        get_kv_cache_groups,
    )
# before 0.33 planning groups the layers itself
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_kv_cache_groups

    get_global_kv_cache_groups = None

__all__ = ["get_kv_cache_groups", "plan_kv_cache"]


def plan_kv_cache(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], memory: int
) -> KVCacheConfig:
    """Return the plan for layers of the given specs.

    Args:
        vllm_config: What the engine runs with; planning may change it.
        specs: Each layer's spec, by the layer's name.
        memory: Bytes for the cache.
    """
    arguments = [vllm_config, [specs], [memory]]
    if get_global_kv_cache_groups is not None:
        arguments.append(get_global_kv_cache_groups(vllm_config, [specs]))
    (planned,) = get_kv_cache_configs(*arguments)
    return planned
