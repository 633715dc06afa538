# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a step's end evicts in the rows that it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.kernels.eviction import Step
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache import page
from vllm_roco.ops.device import H100

MODEL = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
)


@pytest.mark.parametrize("policy", ["roco", "recent"])
def test_rows_that_are_due_move_blocks(policy: str, device: torch.device) -> None:
    step = Step(MODEL, 3, RocoConfig(policy=policy, budget=128, stride=64), device)
    step.close()
    assert step.num_moves == 0
    for due in (1, 3):
        step.restore()
        step.set_due(due)
        evicted = step.buffers.evicted_after - step.buffers.evicted_before
        assert evicted.tolist() == [4] * due + [0] * (3 - due)
        assert step.buffers.live_lens[0] == 128 + 64
        step.close()
        assert due <= step.num_moves <= 4 * due


def test_a_step_attends_and_measures(device: torch.device) -> None:
    step = Step(MODEL, 3, RocoConfig(budget=128, stride=64), device)
    # without dependent launches, which need Hopper
    step.model_step(dataclasses.replace(H100, capability=(8, 0)))()
    for cache in step.caches:
        grown = page.statistics_view(cache) - step.statistics
        assert grown[..., page.MASS_SUM].sum() > 0
