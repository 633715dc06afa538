# SPDX-License-Identifier: Apache-2.0
"""How vLLM plans the memory of models with layers of several kinds."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, SlidingWindowSpec

from tests.configs import engine_config
from tests.kv_cache.planning import get_kv_cache_groups
from tests.kv_cache.specs import roco_spec
from vllm_roco.kv_cache.page_padding import MAX_PADDING, padding_trouble
from vllm_roco.kv_cache.spec import RocoSpec

SHAPES = {
    # layers of full attention, with a window, kv heads, their size
    "gemma-3-270m": (3, 15, 1, 256),
    "gemma-3-27b": (10, 52, 16, 128),
    "gpt-oss-20b": (12, 12, 8, 64),
    "gpt-oss-120b": (18, 18, 8, 64),
    "command-r7b": (8, 24, 8, 128),
    "olmo-3-7b": (8, 24, 32, 128),
    "exaone-4-32b": (16, 48, 8, 128),
}


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    config = engine_config(tmp_path_factory.mktemp("model"), {}, max_model_len=4096)
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def plan(
    vllm_config: VllmConfig,
    num_full: int,
    num_windowed: int,
    own: tuple[int, int],
    others: tuple[int, int],
) -> KVCacheConfig:
    """Return the groups of a model, heads and their size given for each kind."""
    specs: dict[str, KVCacheSpec] = {}
    for layer in range(num_full):
        specs[f"full.{layer}"] = roco_spec(
            num_kv_heads=own[0], head_size=own[1], dtype=torch.bfloat16
        )
    for layer in range(num_windowed):
        specs[f"windowed.{layer}"] = SlidingWindowSpec(
            block_size=16,
            num_kv_heads=others[0],
            head_size=others[1],
            dtype=torch.bfloat16,
            sliding_window=512,
        )
    groups = get_kv_cache_groups(vllm_config, specs)
    return KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize("name", SHAPES)
def test_next_to_nothing_is_padded(vllm_config: VllmConfig, name: str) -> None:
    *layers, heads, size = SHAPES[name]
    config = plan(vllm_config, *layers, own=(heads, size), others=(heads, size))
    own = [
        group
        for group in config.kv_cache_groups
        if isinstance(group.kv_cache_spec, RocoSpec)
    ]
    assert len(own) == 1
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        assert spec.block_size == 16
        assert spec.page_size_bytes <= (1 + MAX_PADDING) * spec.unpadded_page_size_bytes
    assert padding_trouble(config) is None


@pytest.mark.parametrize("factor", [1, 2])
def test_lost_memory_is_told(vllm_config: VllmConfig, factor: int) -> None:
    """Twice as much in the layers with a window, or in those without."""
    own, others = (8 * factor, 64), (16 // factor, 64)
    trouble = padding_trouble(plan(vllm_config, 2, 2, own, others))
    assert trouble is not None
    assert ("SlidingWindowSpec" if factor == 2 else "RocoSpec") in trouble
