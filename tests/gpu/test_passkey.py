# SPDX-License-Identifier: Apache-2.0
"""A number hidden in a text four times the budget is found, with graphs on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.engine.passkeys import ARGUMENTS, PEAK, keys_found, passkeys
from tests.gpu.engines import gpu_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]


def test_the_default_policy_finds_it(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with gpu_engine(smollm2, PEAK, **ARGUMENTS, num_gpu_blocks_override=2048) as engine:
        assert keys_found(engine, tokenizer, passkeys(tokenizer)) >= 15
