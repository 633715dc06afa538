# SPDX-License-Identifier: Apache-2.0
"""Offline, a request that is refused is an error of its call, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.engine.engines import Engine, roco_arguments, running_engine
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

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
