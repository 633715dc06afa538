# SPDX-License-Identifier: Apache-2.0
"""A thousand requests on a pool that is too small for them."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from vllm import SamplingParams

from tests.engine.steps import recorded_steps
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.gpu.engines import gpu_engine
from vllm_roco.kv_cache.integrity import check_integrity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

NUM_REQUESTS = 1000


def test_no_block_is_lost_and_no_number_is_nan(tiny_llama: Path) -> None:
    rng = random.Random(0)
    prompts = [random_prompt(rng.randint(1, 500), seed) for seed in range(NUM_REQUESTS)]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=rng.randint(1, 160),
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
        )
        for _ in prompts
    ]
    with (
        gpu_engine(
            tiny_llama,
            SMALL_BUDGET,
            max_num_seqs=64,
            max_num_batched_tokens=1024,
            # 64 sequences that keep 6 to 8 blocks each want more
            num_gpu_blocks_override=300,
            # let in on what is free at the moment, they preempt each other
            scheduler_reserve_full_isl=False,
        ) as engine,
        recorded_steps(engine) as steps,
    ):
        outputs = engine.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            sampling,
            use_tqdm=False,
        )
        assert engine.num_lost_blocks == 0
        check_integrity(engine.manager)
        assert engine.manager.num_freed_blocks > NUM_REQUESTS
    assert len(steps.preemptions) > 10
    for output, wanted in zip(outputs, sampling, strict=True):
        completion = output.outputs[0]
        assert len(completion.token_ids) == wanted.max_tokens
        assert math.isfinite(completion.cumulative_logprob)
