# SPDX-License-Identifier: Apache-2.0
"""Random models of some 100,000 weights, one for each kind of decoder."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.oracle import Options

VOCABULARY = 256

SMALL_BUDGET = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.7,
    budget=96,
    stride=32,
    chunk=64,
    sink=16,
    recent=32,
    block_size=16,
)
"""Evicts first at 128 tokens."""

TINY_BUDGET = replace(SMALL_BUDGET, shield_ratio=0.5, budget=64, recent=16)
"""Evicts first at 96 tokens, with less protected and less shielded."""

# weights this large make attention sharp and the text varied; vLLM's own attention
# for CPUs wants heads of a multiple of 32
_SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.2,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2)
# as no published model with sinks is
_NO_WINDOWS: dict[str, Any] = dict(
    sliding_window=None, layer_types=["full_attention"] * _SHAPE["num_hidden_layers"]
)

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "llama-mqa": LlamaConfig(**{**_SHAPE, "num_key_value_heads": 1}),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=32),
    "mistral": MistralConfig(**_SHAPE, sliding_window=None),
    "phi3": Phi3Config(**_SHAPE, original_max_position_embeddings=1024),
    "mixtral": MixtralConfig(
        **_SHAPE, **_EXPERTS, num_local_experts=4, sliding_window=None
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **_SHAPE, **_EXPERTS, num_experts=4, moe_intermediate_size=64, head_dim=32
    ),
    # on a CPU, ranks share an expert by 32
    "gpt-oss": GptOssConfig(
        **{**_SHAPE, "intermediate_size": 64},
        **_EXPERTS,
        **_NO_WINDOWS,
        num_local_experts=4,
        head_dim=32,
    ),
    "granite-swa": GraniteSWAConfig(
        **_SHAPE, **_NO_WINDOWS, attention_multiplier=32**-0.5
    ),
}


def save_tiny_model(name: str, folder: Path, **changes: Any) -> Path:
    """Write a float32 model, the same one every time, as a Hugging Face folder.

    Args:
        name: One of `CONFIGS`.
        folder: Where to.
        changes: Attributes of its configuration.
    """
    config = copy.deepcopy(CONFIGS[name])
    config.update(changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".sinks"):
            # sinks that take all, nothing, and a share of attention
            torch.nn.init.normal_(parameter, std=2)
    model.save_pretrained(folder)
    return folder


def load_for_oracle(folder: Path) -> PreTrainedModel:
    """Load a model as the oracle wants it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Return `length` tokens that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())
