# SPDX-License-Identifier: Apache-2.0
"""What vLLM plans the cache of a measured model with, without RoCo and with it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PreTrainedConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from benchmarks.serving.engines import MODELS
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.spec import RocoSpec

BLOCK_SIZE = 16
STEPS_IN_FLIGHT = 2
"""Of asynchronous scheduling."""


def shape_of(model: str) -> PreTrainedConfig:
    """Return the configuration of a folder of `benchmarks/models`."""
    shape: PreTrainedConfig = AutoConfig.from_pretrained(MODELS / model)
    return shape


def layer_specs(
    shape: PreTrainedConfig, config: RocoConfig
) -> tuple[FullAttentionSpec, RocoSpec]:
    """Return both specs of a layer, in bfloat16.

    Args:
        shape: The model's configuration.
        config: The plugin's options.
    """
    head_size = getattr(shape, "head_dim", None)
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=shape.num_key_value_heads,
        head_size=head_size or shape.hidden_size // shape.num_attention_heads,
        dtype=torch.bfloat16,
    )
    return full, RocoSpec.from_attention_spec(full, config, STEPS_IN_FLIGHT)
