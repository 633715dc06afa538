# SPDX-License-Identifier: Apache-2.0
"""Numbers hidden in texts four times the budget, for engines on any platform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tests.engine.engines import Engine
from tests.oracle import Options
from tools.passkey import Passkey, build_passkey

NUM_KEYS = 16
NUM_TOKENS = 2048
DEFAULT = Options(
    policy="roco",
    shield="contribution",
    shield_ratio=1,
    budget=NUM_TOKENS // 4,
    stride=128,
    chunk=256,
    sink=16,
    recent=32,
    block_size=16,
)
"""What a user gets who sets a budget, but for a shorter stride and chunk."""
ARGUMENTS: dict[str, Any] = dict(
    dtype="bfloat16",
    max_model_len=NUM_TOKENS + 16,
    max_num_seqs=NUM_KEYS,
    max_num_batched_tokens=4 * DEFAULT.chunk + NUM_KEYS,
)
"""Of an engine that serves all keys at once."""


def fast_dtype() -> str:
    """Return the models' own, or float32 on a CPU where that is eight times as slow."""
    # as vLLM asks
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def passkeys(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int = NUM_TOKENS
) -> list[Passkey]:
    """Return `NUM_KEYS` keys, the first ones near the beginning of their prompts."""
    return [
        build_passkey(
            tokenizer,
            num_tokens=num_tokens,
            depth=(index + 0.5) / NUM_KEYS,
            seed=index,
        )
        for index in range(NUM_KEYS)
    ]


def keys_found(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    keys: Sequence[Passkey],
    options: Options = DEFAULT,
) -> int:
    """Return how many of the keys are told, each from a prompt of its own.

    Args:
        engine: It has these options.
        tokenizer: The model's.
        keys: Each in a prompt of four times the budget.
        options: Their budget and stride tell how much must have been evicted.
    """
    freed = engine.manager.num_freed_blocks
    answers = engine.generate([key.token_ids for key in keys], 8)
    # E at the end, less a stride for the prompt that ends a line earlier
    evicted = 3 * options.budget - options.stride
    least = len(keys) * evicted // engine.manager.block_size
    assert engine.manager.num_freed_blocks - freed >= least
    assert engine.num_lost_blocks == 0
    return sum(
        key.is_answered_by(tokenizer.decode(answer))
        for key, answer in zip(keys, answers, strict=True)
    )
