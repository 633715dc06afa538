# SPDX-License-Identifier: Apache-2.0
"""Models of which some layers have a sliding window and keep no budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from tests.engine.engines import running_engine
from tests.engine.tiny_models import random_prompt
from tests.model_configs import TINY
from tests.oracle import Options
from vllm_roco.kv_cache.manager import RocoManager


def save_gemma2(folder: Path) -> Path:
    """Write a model of which every other layer has a window, with random weights."""
    torch.manual_seed(0)
    config = Gemma2Config(**TINY, sliding_window=64, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def budget_of(tokens: int) -> Options:
    return Options(
        policy="roco",
        shield="peak",
        shield_ratio=0.7,
        budget=tokens,
        stride=32,
        chunk=64,
        sink=16,
        recent=32,
        block_size=16,
    )


@pytest.mark.engine
def test_windows_are_left_to_vllm(tmp_path: Path) -> None:
    """One table is evicted, the other is not; nothing but ROCO is named."""
    model = save_gemma2(tmp_path)
    prompts = [random_prompt(length, seed=length) for length in (30, 150)]
    with running_engine(model, None, max_model_len=512) as engine:
        expected = engine.generate_one_by_one(prompts, 60)
    with running_engine(model, budget_of(512), max_model_len=512) as engine:
        assert engine.generate_one_by_one(prompts, 60) == expected
    with running_engine(model, budget_of(96), max_model_len=512) as engine:
        engine.generate(prompts, 60)
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        (roco,) = [m for m in managers if isinstance(m, RocoManager)]
        assert len(managers) == 2
        # 209 computed tokens are 3 strides over the budget
        assert roco.num_freed_blocks == 6
        assert (
            roco.block_pool.get_num_free_blocks() == roco.block_pool.num_gpu_blocks - 1
        )
