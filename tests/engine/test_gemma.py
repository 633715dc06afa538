# SPDX-License-Identifier: Apache-2.0
"""A real model of which three layers keep a budget and fifteen a window of 512."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.engine.engines import running_engine
from tests.engine.passkeys import (
    ARGUMENTS,
    DEFAULT,
    fast_dtype,
    keys_found,
    passkeys,
)
from tests.engine.steps import audited_manager, most_held_blocks
from tools.passkey import build_passkey

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# vLLM's own attention for CPUs, which has the windows, wants blocks of a multiple of 32
BUDGET = replace(DEFAULT, block_size=32, sink=32)
NOBODY_REACHES = replace(BUDGET, budget=4096)
ON_CPU: dict[str, Any] = ARGUMENTS | {
    "dtype": fast_dtype(),
    "num_gpu_blocks_override": 2048,
}
EVERY_FOURTH = slice(0, None, 4)


def test_below_the_budget_its_tokens_are_stock_vllms(gemma_3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma_3)
    prompts = [
        # the longer one leaves its windows behind
        build_passkey(tokenizer, num_tokens=length, depth=0.2, seed=length).token_ids
        for length in (100, 640)
    ]
    # of other kernels for the same layers, rounding makes other tokens
    exact = ON_CPU | {"dtype": "float32"}
    with running_engine(gemma_3, None, **exact) as engine:
        expected = engine.generate(prompts, 24)
    with running_engine(gemma_3, NOBODY_REACHES, **exact) as engine:
        backends = [layer.attn_backend.get_name() for layer in engine.layers.values()]
        assert Counter(backends) == {"CPU_ATTN": 15, "ROCO": 3}
        assert engine.generate(prompts, 24) == expected
        assert engine.manager.num_freed_blocks == 0


def test_it_finds_numbers_that_left_its_windows(gemma_3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma_3)
    keys = passkeys(tokenizer)[EVERY_FOURTH]
    with (
        running_engine(gemma_3, BUDGET, **ON_CPU) as engine,
        audited_manager(engine) as steps,
    ):
        assert keys_found(engine, tokenizer, keys) >= len(keys) - 1
        assert steps.peak_held_blocks <= most_held_blocks(BUDGET, 1)


def test_without_them_the_newest_blocks_do_not_tell(gemma_3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma_3)
    keys = passkeys(tokenizer)[EVERY_FOURTH][:3]
    with running_engine(gemma_3, replace(BUDGET, policy="recent"), **ON_CPU) as engine:
        assert keys_found(engine, tokenizer, keys) == 0
