# SPDX-License-Identifier: Apache-2.0
"""A real model still finds a number hidden in a text four times its budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.engine.engines import running_engine
from tests.engine.steps import audited_manager, most_held_blocks
from tests.oracle import Options
from tools.passkey import build_passkey

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.usefixtures("engine_lock"),
]

NUM_KEYS = 16
NUM_TOKENS = 2048
PEAK = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.7,
    budget=NUM_TOKENS // 4,
    stride=128,
    chunk=256,
    sink=16,
    recent=32,
    block_size=16,
)
BOUND = most_held_blocks(PEAK, 1)


def test_both_shields_find_it_and_recent_does_not(smollm2: Path) -> None:
    every = range(NUM_KEYS)
    peak = keys_found(smollm2, PEAK, every)
    deviation = keys_found(
        smollm2, replace(PEAK, shield="deviation", shield_ratio=0.3), every
    )
    # a few misses are enough to know that it cannot find as many
    some = range(4, 12, 2)
    missed = len(some) - keys_found(smollm2, replace(PEAK, policy="recent"), some)
    assert peak >= 15
    assert deviation >= 15
    assert NUM_KEYS - missed < min(peak, deviation)


def keys_found(smollm2: Path, options: Options, indices: range) -> int:
    """Return how many of the keys are told, each from a prompt of its own.

    The depth of a key in its prompt grows with its index, 0 to `NUM_KEYS - 1`.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    keys = [
        build_passkey(
            tokenizer,
            num_tokens=NUM_TOKENS,
            depth=(index + 0.5) / NUM_KEYS,
            seed=index,
        )
        for index in indices
    ]
    with (
        running_engine(
            smollm2,
            options,
            dtype="bfloat16",
            max_model_len=NUM_TOKENS + 16,
            max_num_seqs=NUM_KEYS,
            max_num_batched_tokens=4 * options.chunk + NUM_KEYS,
            num_gpu_blocks_override=NUM_KEYS * BOUND + 1,
        ) as engine,
        audited_manager(engine) as steps,
    ):
        answers = engine.generate([key.token_ids for key in keys], 8)
        assert steps.peak_held_blocks <= BOUND
        # E at 2,048 tokens, less a stride for the prompt that ends a line earlier
        assert engine.manager.num_freed_blocks >= len(keys) * (96 - 8)
        assert engine.num_lost_blocks == 0
    return sum(
        key.is_answered_by(tokenizer.decode(answer))
        for key, answer in zip(keys, answers, strict=True)
    )
