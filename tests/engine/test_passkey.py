# SPDX-License-Identifier: Apache-2.0
"""A real model still finds a number hidden in a text four times its budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.engine.engines import Engine, running_engine
from tests.engine.passkeys import ARGUMENTS, NUM_KEYS, PEAK, keys_found, passkeys
from tests.engine.steps import audited_manager, most_held_blocks
from tests.oracle import Options

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BOUND = most_held_blocks(PEAK, 1)
FIRST_TOKEN_SECONDS = 15
"""Of one core's time, for a prompt of 2,048 tokens; three times what was measured."""


def test_both_shields_find_it_and_recent_does_not(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    keys = passkeys(tokenizer)
    with audited_engine(smollm2, PEAK) as engine:
        # not by the clock, which other programs slow down
        started = time.process_time()
        engine.generate([keys[0].token_ids], 1)
        assert time.process_time() - started <= FIRST_TOKEN_SECONDS
        peak = keys_found(engine, tokenizer, keys)
    deviation_options = replace(PEAK, shield="deviation", shield_ratio=0.3)
    with audited_engine(smollm2, deviation_options) as engine:
        deviation = keys_found(engine, tokenizer, keys)
    # a few misses are enough to know that it cannot find as many
    some = keys[4:12:2]
    with audited_engine(smollm2, replace(PEAK, policy="recent")) as engine:
        missed = len(some) - keys_found(engine, tokenizer, some)
    assert peak >= 15
    assert deviation >= 15
    assert NUM_KEYS - missed < min(peak, deviation)


@contextlib.contextmanager
def audited_engine(smollm2: Path, options: Options) -> Iterator[Engine]:
    """Run an engine with exactly the blocks that all keys may hold."""
    with (
        running_engine(
            smollm2,
            options,
            **ARGUMENTS,
            num_gpu_blocks_override=NUM_KEYS * BOUND + 1,
        ) as engine,
        audited_manager(engine) as steps,
    ):
        yield engine
        assert steps.peak_held_blocks <= BOUND
