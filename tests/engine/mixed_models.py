# SPDX-License-Identifier: Apache-2.0
"""Random models of which some layers have a sliding window, one for each family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Olmo3Config,
    PreTrainedConfig,
)
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    VllmConfig,
    set_current_vllm_config,
)

WINDOW = 64
"""Tokens."""

_SHAPE: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    initializer_range=0.2,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
_GEMMA = dict(query_pre_attn_scalar=32)
_UNTIED = dict(tie_word_embeddings=False)

MIXED_MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gemma2": (Gemma2Config, _GEMMA),
    "gemma3": (Gemma3TextConfig, _GEMMA),
    "cohere2": (Cohere2Config, {}),
    "exaone4": (Exaone4Config, _UNTIED),
    "olmo3": (Olmo3Config, _UNTIED),
    # on a CPU, vLLM's experts want 32 numbers of each
    "gpt-oss": (
        GptOssConfig,
        {**_UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # vLLM then makes three groups of RoCo's layers
    "mostly-full": (
        Gemma2Config,
        {**_GEMMA, "layer_types": ["sliding_attention", *["full_attention"] * 3]},
    ),
}


def save_mixed(name: str, folder: Path, **changes: Any) -> Path:
    """Write a float32 model, the same one every time, as a Hugging Face folder.

    Args:
        name: Of `MIXED_MODELS`.
        folder: Where to.
        **changes: Of its configuration.
    """
    config_class, own = MIXED_MODELS[name]
    config = config_class(**_SHAPE | own | changes)
    # once an engine of this process has served a model by Transformers' classes, vLLM
    # has changed these, and asks for a configuration, and there for the model's own
    uncompiled = VllmConfig(
        compilation_config=CompilationConfig(mode=CompilationMode.NONE)
    )
    uncompiled.model_config = SimpleNamespace(hf_config=config)  # type: ignore[assignment]
    with set_current_vllm_config(uncompiled):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.tie_word_embeddings:
        # large ones, which are the output's as well, repeat the last token for ever
        model.get_input_embeddings().weight.data *= 0.02
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".sinks"):
            # sinks that take all, nothing, and a share of attention
            torch.nn.init.normal_(parameter, std=2)
    model.save_pretrained(folder)
    return folder
