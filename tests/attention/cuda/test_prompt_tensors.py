# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of what a layer makes anew for a step's prompts."""

from __future__ import annotations

import pytest
import torch

from vllm_roco.attention.cuda.prompt_tensors import (
    PromptTensors,
    empty_bfloat16,
    empty_fp8,
    empty_lse,
)

MIB = 2**20
NUM_TOKENS, NUM_HEADS, HEAD_SIZE = 8192, 32, 128
"""Llama 8B, 8,192 tokens a step."""


@pytest.mark.parametrize(
    ("tensors", "taken"),
    [
        (PromptTensors(False, False, False), 1 * MIB),
        (PromptTensors(False, False, True), 2 * MIB),
        (PromptTensors(True, False, False), 33 * MIB),
        (PromptTensors(True, False, True), 34 * MIB),
        (PromptTensors(True, True, False), 97 * MIB),
    ],
    ids=["16 bit", "16 bit, sinks", "fp8", "fp8, sinks", "fp8, float16 model"],
)
def test_what_a_profiling_run_makes(tensors: PromptTensors, taken: int) -> None:
    """The queries and outputs of an fp8 cache were not in vLLM's memory plan."""
    query = torch.empty(
        NUM_TOKENS, NUM_HEADS, HEAD_SIZE, dtype=torch.bfloat16, device="meta"
    )
    assert tensors.rehearse(query) == taken


def test_each_is_contiguous() -> None:
    """A query is a part of what one projection makes, and so has gaps."""
    projected = torch.zeros(5, 3 * NUM_HEADS * HEAD_SIZE, dtype=torch.float16)
    query = projected[:, : NUM_HEADS * HEAD_SIZE].view(5, NUM_HEADS, HEAD_SIZE)
    assert not query.is_contiguous()
    made = {
        empty_fp8(query): (torch.float8_e4m3fn, query.shape),
        empty_bfloat16(query): (torch.bfloat16, query.shape),
        empty_lse(query): (torch.float32, (NUM_HEADS, 5)),
    }
    for tensor, (dtype, shape) in made.items():
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        assert tensor.is_contiguous()
