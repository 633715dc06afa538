# SPDX-License-Identifier: Apache-2.0
"""A model's attention sinks; of evictions with them, see `test_architectures`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.engines import Engine, running_engine
from tests.engine.tiny_models import TINY_BUDGET, random_prompt, save_tiny_model

pytestmark = pytest.mark.engine

NEVER = replace(TINY_BUDGET, budget=512)
PROMPTS = [random_prompt(length, seed=length) for length in (200, 30)]
NUM_NEW = 30


@pytest.fixture(scope="module")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt-oss", tmp_path_factory.mktemp("tiny-gpt-oss"))


def test_they_count_as_stock_vllms_do(tiny_gpt_oss: Path) -> None:
    """Whenever they are loaded."""
    with running_engine(tiny_gpt_oss, None) as engine:
        expected = _log_probabilities(engine)
    with running_engine(tiny_gpt_oss, NEVER) as engine:
        found = _log_probabilities(engine)
        assert engine.manager.num_freed_blocks == 0
        for layer in engine.layers.values():
            # which is as if there were none
            layer.impl.sinks.data.fill_(-torch.inf)
        without = _log_probabilities(engine)
    for tokens, log_probabilities in expected.items():
        assert found[tokens] == pytest.approx(log_probabilities, abs=1e-3)
    assert not expected.keys() & without.keys()


def _log_probabilities(engine: Engine) -> dict[tuple[int, ...], list[float]]:
    return {
        tuple(completion.token_ids): [
            position[token].logprob
            for token, position in zip(
                completion.token_ids, completion.logprobs, strict=True
            )
        ]
        for completion in engine.complete(PROMPTS, NUM_NEW, logprobs=1)
    }


@pytest.mark.usefixtures("engine_lock")
def test_each_rank_has_those_of_its_heads(tiny_gpt_oss: Path) -> None:
    # 90 tokens in the end, and the first eviction comes at 96
    prompts = [random_prompt(length, seed=length) for length in (60, 33)]
    tokens = []
    for size in (1, 2):
        with running_engine(
            tiny_gpt_oss,
            TINY_BUDGET,
            tensor_parallel_size=size,
            distributed_executor_backend="mp" if size > 1 else None,
        ) as engine:
            tokens.append(engine.generate(prompts, 30))
    assert tokens[0] == tokens[1]
