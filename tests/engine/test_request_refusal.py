# SPDX-License-Identifier: Apache-2.0
"""Offline, a request that is refused is an error of its call, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

from tests.engine.engines import Engine, roco_arguments, running_engine
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.model_configs import save_config
from vllm_roco.kv_cache.manager import RocoManager

pytestmark = pytest.mark.engine

SERVER = roco_arguments(SMALL_BUDGET)["additional_config"]["roco"]


def generate(engine: Engine, *options: dict[str, Any]) -> list[list[int]]:
    params = [
        SamplingParams(temperature=0, max_tokens=4, detokenize=False, extra_args=each)
        for each in options
    ]
    prompts: Any = [{"prompt_token_ids": list(random_prompt(20, seed=1))}] * len(params)
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_engine_goes_on(tiny_llama: Path) -> None:
    with running_engine(tiny_llama, SMALL_BUDGET) as engine:
        (expected,) = generate(engine, {})
        with pytest.raises(VLLMValidationError, match="roco: budget = 9 is") as error:
            generate(engine, {}, {"roco": {"budget": 9}}, {})
        assert (error.value.parameter, error.value.value) == ("roco_budget", 9)
        # the others of the call are gone as well
        assert not engine.llm.llm_engine.has_unfinished_requests()
        assert generate(engine, {}, {"roco": {}}) == [expected] * 2


def test_what_could_never_fit_is_refused(tiny_llama: Path) -> None:
    with running_engine(
        tiny_llama,
        SMALL_BUDGET,
        additional_config={"roco": {**SERVER, "allow_full": True}},
        num_gpu_blocks_override=20,
    ) as engine:
        (expected,) = generate(engine, {})
        prompt = {"prompt_token_ids": list(random_prompt(320, seed=1))}
        full = SamplingParams(max_tokens=4, extra_args={"roco_mode": "full"})
        with pytest.raises(VLLMValidationError, match="the KV cache has 19") as error:
            engine.llm.generate([prompt], full, use_tqdm=False)
        assert (error.value.parameter, error.value.value) == ("input_tokens", 320)
        assert not engine.llm.llm_engine.has_unfinished_requests()
        assert generate(engine, {}, {}) == [expected] * 2


def test_an_option_counts_in_the_blocks_of_layers_that_evict(tmp_path: Path) -> None:
    """Front ends counted in smaller ones, and the engine ended what they had taken.

    Gemma 4's larger models have half as much in a page of full attention as in a
    window's, and without statistics vLLM makes the blocks twice as large.
    """
    model = save_config(
        tmp_path,
        "gemma4_text",
        "Gemma4ForCausalLM",
        num_key_value_heads=4,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        global_head_dim=64,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=0,
    )
    options = replace(SMALL_BUDGET, policy="recent", budget=128, stride=64, recent=64)
    with running_engine(
        # vLLM's own attention for CPUs wants blocks of a multiple of 32
        model,
        replace(options, block_size=32),
        max_model_len=512,
        load_format="dummy",
    ) as engine:
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        sizes = {type(manager): manager.block_size for manager in managers}
        assert sizes == {RocoManager: 64, SlidingWindowManager: 32}
        own = {"roco_sink": 0, "roco_recent": 0}
        (tokens,) = generate(engine, own | {"roco_budget": 64})
        assert len(tokens) == 4
        with pytest.raises(VLLMValidationError, match=r"block size \(64 tokens\)"):
            generate(engine, own | {"roco_budget": 96})
