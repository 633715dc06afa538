# SPDX-License-Identifier: Apache-2.0
"""A real model still finds a number hidden in a text four times its budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.engine import passkeys
from tests.engine.engines import Engine, running_engine
from tests.engine.passkeys import keys_found
from tests.engine.steps import audited_manager, most_held_blocks
from tests.oracle import Options

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_TOKENS = passkeys.NUM_TOKENS // 2
PEAK = replace(passkeys.PEAK, budget=NUM_TOKENS // 4, stride=64, chunk=128)
"""Half of what a GPU reads, with all in proportion."""
BOUND = most_held_blocks(PEAK, 1)
EVEN_KEYS = slice(0, None, 2)
"""Half as many as on a GPU, and as well spread over all depths."""

MOST_MISSES = 1
MIDDLE_KEYS = slice(4, 12, 2)
"""Enough to miss more of them than a shield may miss of `EVEN_KEYS`."""


@pytest.mark.parametrize(
    "options",
    [PEAK, replace(PEAK, shield="deviation", shield_ratio=0.3)],
    ids=["peak", "deviation"],
)
def test_both_shields_find_it(smollm2: Path, options: Options) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    keys = passkeys.passkeys(tokenizer, NUM_TOKENS)[EVEN_KEYS]
    with audited_engine(smollm2, options, len(keys)) as engine:
        found = keys_found(engine, tokenizer, keys, PEAK)
    assert found >= len(keys) - MOST_MISSES


def test_recent_does_not(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    keys = passkeys.passkeys(tokenizer, NUM_TOKENS)[MIDDLE_KEYS]
    recent = replace(PEAK, policy="recent")
    with audited_engine(smollm2, recent, len(keys)) as engine:
        missed = len(keys) - keys_found(engine, tokenizer, keys, PEAK)
    assert missed > MOST_MISSES


@contextlib.contextmanager
def audited_engine(smollm2: Path, options: Options, num_keys: int) -> Iterator[Engine]:
    """Run an engine with exactly the blocks that so many keys may hold."""
    # bfloat16 is eight times as slow on a CPU without instructions for it
    changes = {"dtype": "float32", "num_gpu_blocks_override": num_keys * BOUND + 1}
    with (
        running_engine(smollm2, options, **passkeys.ARGUMENTS | changes) as engine,
        audited_manager(engine) as steps,
    ):
        yield engine
        assert steps.peak_held_blocks <= BOUND
