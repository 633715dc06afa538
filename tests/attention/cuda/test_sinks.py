# SPDX-License-Identifier: Apache-2.0
"""Sinks that are added behind FlashAttention, on tensors of any device."""

from __future__ import annotations

import pytest
import torch

from vllm_roco import reference
from vllm_roco.attention.cuda.sinks import add_sinks, flash_has_sinks

GROUP, NUM_KV_HEADS, HEAD_SIZE = 3, 2, 16
BLOCK_SIZE, NUM_BLOCKS = 16, 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_as_if_they_had_been_there(dtype: torch.dtype, scale: float) -> None:
    """With scores and sinks whose exponentials overflow, too."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(
        NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, generator=generator
    )
    num_heads = GROUP * NUM_KV_HEADS
    query = torch.randn(9, num_heads, HEAD_SIZE, generator=generator)
    sinks = torch.tensor([0.0, 3.0, -3.0, -torch.inf, 500.0, -500.0]).to(dtype)
    without, expected = (
        reference.attend(
            query=query,
            kv_cache=cache,
            blocks=torch.arange(NUM_BLOCKS),
            live_len=70,
            scale=scale,
            sinks=chosen,
        )
        for chosen in (None, sinks)
    )
    output = without.output.to(dtype)
    lse = add_sinks(output, without.lse, sinks)
    torch.testing.assert_close(lse, expected.lse)
    torch.testing.assert_close(output, expected.output.to(dtype))
    assert lse.stride(-1) == 1


@pytest.mark.parametrize(
    ("version", "dtype", "has_them"),
    [
        (2, torch.bfloat16, False),
        (3, torch.bfloat16, True),
        (3, torch.float16, False),
        (4, torch.float16, True),
    ],
)
def test_who_adds_them(version: int, dtype: torch.dtype, has_them: bool) -> None:
    assert flash_has_sinks(version, dtype) is has_them
