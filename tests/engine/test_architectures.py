# SPDX-License-Identifier: Apache-2.0
"""Every kind of decoder: evicting equals the oracle, not evicting equals stock vLLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.agreement import assert_agreement
from tests.engine.engines import running_engine
from tests.engine.kept_blocks import recorded_kept_blocks
from tests.engine.tiny_models import (
    CONFIGS,
    TINY_BUDGET,
    load_for_oracle,
    random_prompt,
    save_tiny_model,
)
from tests.oracle import generate

pytestmark = pytest.mark.engine

OPTIONS = replace(TINY_BUDGET, budget=128)
LONG = [random_prompt(length, seed=length) for length in (240, 90)]
NUM_NEW_LONG = 140
# 150 tokens in the end, and the first eviction comes at 160
SHORT = [random_prompt(length, seed=length) for length in (100, 30)]
NUM_NEW_SHORT = 50


@pytest.mark.parametrize("name", CONFIGS)
def test_architecture(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(name, tmp_path)
    model = load_for_oracle(folder)
    oracle = [generate(model, prompt, OPTIONS, NUM_NEW_LONG) for prompt in LONG]
    with running_engine(folder, None) as engine:
        stock = engine.generate_one_by_one(SHORT, NUM_NEW_SHORT)

    with running_engine(folder, OPTIONS) as engine:
        not_evicting = engine.generate_one_by_one(SHORT, NUM_NEW_SHORT)
        assert engine.manager.num_freed_blocks == 0
        with recorded_kept_blocks(engine) as kept:
            evicting = engine.generate(LONG, NUM_NEW_LONG)
        assert engine.num_lost_blocks == 0
    assert not_evicting == stock
    assert_agreement(LONG, evicting, kept, oracle)
