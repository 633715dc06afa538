# SPDX-License-Identifier: Apache-2.0
"""Sinks that are added behind FlashAttention, on tensors of any device."""

from __future__ import annotations

import pytest
import torch

from vllm_roco import reference
from vllm_roco.attention.cuda.prompt_sinks import add_sinks, flash_has_sinks

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
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_behind_pytorchs_flash_attention(device: str, dtype: torch.dtype) -> None:
    """Which knows no sinks, and returns natural logarithms, as FlashAttention does.

    On CUDA it is FlashAttention 2. The softmax here has the sink as one more column.
    """
    generator = torch.Generator().manual_seed(0)
    num_heads, num_tokens = 6, 70
    shape = (3, 1, num_heads, num_tokens, 2 * HEAD_SIZE)
    states = torch.randn(shape, generator=generator).to(device, dtype)
    sinks = torch.tensor([0.0, 3.0, -3.0, -torch.inf, 50.0, -50.0], device=device)
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    if device == "cpu":
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse, *_ = attend(*states, 0.0, is_causal=True, scale=1.0)
    output, lse = output[0].transpose(0, 1).contiguous(), lse[0]

    query, keys, values = states[:, 0].double()
    future = torch.ones(num_tokens, num_tokens, device=device).triu(1).bool()
    scores = (query @ keys.mT).masked_fill(future, -torch.inf)
    of_sinks = sinks.double()[:, None, None].expand(-1, num_tokens, 1)
    with_sinks = torch.cat((scores, of_sinks), -1)
    expected = with_sinks.softmax(-1)[..., :-1] @ values

    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-4)
    lse_with_sinks = add_sinks(output, lse, sinks.to(dtype))
    torch.testing.assert_close(
        lse_with_sinks.double(), with_sinks.logsumexp(-1), rtol=1e-5, atol=1e-4
    )
    # rounded by attention, and once more behind it
    epsilon = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(
        output.double().transpose(0, 1), expected, rtol=2 * epsilon, atol=2 * epsilon
    )


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
