# SPDX-License-Identifier: Apache-2.0
"""What an engine makes of a model's attention sinks, on a CPU as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch

from tests.engine.engines import Engine
from tests.engine.tiny_models import TINY_BUDGET, random_prompt
from tests.oracle import Options

NEVER = replace(TINY_BUDGET, budget=512)
PROMPTS = [random_prompt(length, seed=length) for length in (200, 30)]
NUM_NEW = 30


def check_against_stock(
    start: Callable[[Options | None], AbstractContextManager[Engine]],
) -> None:
    """Assert that an engine's sinks count as stock vLLM's do, whenever they are loaded.

    Args:
        start: Runs the model with options of RoCo, or with vLLM's own backend.
    """
    with start(None) as engine:
        expected = _log_probabilities(engine)
    with start(NEVER) as engine:
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
