# SPDX-License-Identifier: Apache-2.0
"""A number hidden in a text four times the budget is found, with graphs on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.engine.passkeys import ARGUMENTS, DEFAULT, keys_found, passkeys
from tests.gpu.engines import gpu_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]


def test_the_default_policy_finds_it(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with gpu_engine(
        smollm2, DEFAULT, **ARGUMENTS, num_gpu_blocks_override=2048
    ) as engine:
        assert keys_found(engine, tokenizer, passkeys(tokenizer)) >= 15


def test_layers_with_a_window_are_flash_attentions(gemma_3: Path) -> None:
    """Two backends share the blocks, the steps and the graphs of decodes."""
    tokenizer = AutoTokenizer.from_pretrained(gemma_3)
    arguments = {**ARGUMENTS, "async_scheduling": True}
    with gpu_engine(gemma_3, DEFAULT, **arguments) as engine:
        backends = [layer.attn_backend.get_name() for layer in engine.layers.values()]
        assert Counter(backends) == {"FLASH_ATTN": 15, "ROCO": 3}
        config = engine.core.vllm_config
        # vLLM lowers it to what every backend can do
        assert config.compilation_config.cudagraph_mode.name == "FULL_DECODE_ONLY"
        assert config.scheduler_config.async_scheduling
        assert keys_found(engine, tokenizer, passkeys(tokenizer)) >= 15


def test_hits_change_no_answer(smollm2: Path) -> None:
    """Their texts are the same up to the number; the second time, all of them are."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [key.token_ids for key in passkeys(tokenizer)]
    arguments = {**ARGUMENTS, "dtype": "float32", "num_gpu_blocks_override": 4096}
    with gpu_engine(smollm2, DEFAULT, **arguments) as engine:
        expected = engine.generate(prompts, 8)
    with gpu_engine(
        smollm2, DEFAULT, **arguments, enable_prefix_caching=True
    ) as engine:
        assert engine.generate(prompts, 8) == expected
        cache = engine.manager.prefix_cache
        assert cache is not None
        hits = cache.store.num_hits
        assert hits > 0
        assert engine.generate(prompts, 8) == expected
        assert cache.store.num_hits == hits + len(prompts)
