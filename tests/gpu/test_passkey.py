# SPDX-License-Identifier: Apache-2.0
"""A number hidden in a text four times the budget is found, with graphs on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.gpu.engines import gpu_engine
from tests.oracle import Options
from tools.passkey import build_passkey

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

NUM_KEYS = 16
NUM_TOKENS = 2048
# of the CPU suite, see tests/engine/test_passkey.py
OPTIONS = Options(
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


def test_the_default_policy_finds_it(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    keys = [
        build_passkey(
            tokenizer,
            num_tokens=NUM_TOKENS,
            depth=(index + 0.5) / NUM_KEYS,
            seed=index,
        )
        for index in range(NUM_KEYS)
    ]
    with gpu_engine(
        smollm2,
        OPTIONS,
        dtype="bfloat16",
        max_model_len=NUM_TOKENS + 16,
        max_num_seqs=NUM_KEYS,
        max_num_batched_tokens=4 * OPTIONS.chunk + NUM_KEYS,
        num_gpu_blocks_override=2048,
    ) as engine:
        texts = engine.generate([key.token_ids for key in keys], 8)
        # E at 2,048 tokens, less a stride for the prompt that ends a line earlier
        assert engine.manager.num_freed_blocks >= NUM_KEYS * (96 - 8)
        assert engine.num_lost_blocks == 0
    found = sum(
        key.is_answered_by(tokenizer.decode(text))
        for key, text in zip(keys, texts, strict=True)
    )
    assert found >= 15
