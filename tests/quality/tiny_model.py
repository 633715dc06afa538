# SPDX-License-Identifier: Apache-2.0
"""A small random model whose attention is sharp and whose answers vary."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

VOCABULARY = 97
LENGTHS = (70, 45, 8, 64, 63)


def save_tiny_model(folder: Path, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Save a float32 Llama of 3 layers, 4 query heads and 2 kv heads; return it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # makes attention sharp and the generated tokens varied
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model.save_pretrained(folder)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Return random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        for length in lengths
    ]
