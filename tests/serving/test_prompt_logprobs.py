# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of prompts that are read in chunks, some of which have to wait."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from tests.engine.engines import Engine, running_engine
from tests.engine.tiny_models import random_prompt, save_tiny_model
from tests.oracle import Options

pytestmark = pytest.mark.engine

NEVER_EVICTS = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.7,
    budget=1024,
    stride=64,
    chunk=64,
    sink=16,
    recent=32,
    block_size=16,
)
PROMPTS = [random_prompt(length, seed=length) for length in (1, 63, 64, 65, 200, 333)]


def prompt_logprobs(engine: Engine) -> list[torch.Tensor]:
    """Return, for each prompt, the log probability of every token but the first."""
    requests = engine.llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS],
        SamplingParams(
            temperature=0, max_tokens=20, prompt_logprobs=0, detokenize=False
        ),
        use_tqdm=False,
    )
    return [
        torch.tensor(
            [
                position[token].logprob
                for token, position in zip(
                    request.prompt_token_ids[1:],
                    request.prompt_logprobs[1:],
                    strict=True,
                )
            ]
        )
        for request in requests
    ]


def test_equal_the_stock_backends(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)
    with running_engine(model, None) as engine:
        expected = prompt_logprobs(engine)
    # room for one chunk a step beside the decodes: the others wait for theirs
    waiting = {"max_num_seqs": 6, "max_num_batched_tokens": 70}
    with running_engine(model, NEVER_EVICTS, **waiting) as engine:
        measured = prompt_logprobs(engine)
    assert [len(values) for values in expected] == [len(p) - 1 for p in PROMPTS]
    for ours, stock in zip(measured, expected, strict=True):
        # float32 sums of other chunks in another order
        torch.testing.assert_close(ours, stock, atol=1e-4, rtol=0)
