# SPDX-License-Identifier: Apache-2.0
"""A real model still finds a number hidden in a text four times its budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.engine.engines import Engine, running_engine
from tests.engine.passkeys import (
    ARGUMENTS,
    DEFAULT,
    fast_dtype,
    keys_found,
    passkeys,
)
from tests.engine.steps import audited_manager, most_held_blocks
from tests.oracle import Options
from vllm_roco.config import SHIELDS, RocoConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]

HALF = replace(DEFAULT, budget=DEFAULT.budget // 2, stride=64, chunk=128)
"""For texts of 1,024 tokens, four times as long as well.

Reading is nearly all that these tests do: the product's default reads 2,048.
"""
EVERY_THIRD = slice(1, None, 3)
"""Five of those of a GPU's test, spread over all depths as well.

All five are found less often by chance than all but one of eight, and read sooner.
"""
MIDDLE_KEYS = slice(5, 11, 5)
"""Two that lie before the newest quarter of the text."""


@pytest.mark.parametrize(
    "options",
    [
        DEFAULT,
        replace(HALF, shield="peak", shield_ratio=0.7),
        replace(HALF, shield="deviation", shield_ratio=0.3),
    ],
    ids=SHIELDS,
)
def test_every_shield_finds_it(smollm2: Path, options: Options) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    keys = passkeys(tokenizer, 4 * options.budget)[EVERY_THIRD]
    with audited_engine(smollm2, options, len(keys)) as engine:
        found = keys_found(engine, tokenizer, keys, options)
    assert found == len(keys)


def test_the_default_is_the_products() -> None:
    for name in ("policy", "shield", "shield_ratio", "sink", "recent"):
        assert getattr(DEFAULT, name) == getattr(RocoConfig, name)


def test_recent_does_not(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    keys = passkeys(tokenizer, 4 * HALF.budget)[MIDDLE_KEYS]
    recent = replace(HALF, policy="recent")
    with audited_engine(smollm2, recent, len(keys)) as engine:
        found = keys_found(engine, tokenizer, keys, recent)
    assert found == 0


@contextlib.contextmanager
def audited_engine(smollm2: Path, options: Options, num_keys: int) -> Iterator[Engine]:
    """Run an engine with exactly the blocks that so many keys may hold."""
    bound = most_held_blocks(options, 1)
    changes = {"dtype": fast_dtype(), "num_gpu_blocks_override": num_keys * bound + 1}
    with (
        running_engine(smollm2, options, **ARGUMENTS | changes) as engine,
        audited_manager(engine) as steps,
    ):
        yield engine
        assert steps.peak_held_blocks <= bound
