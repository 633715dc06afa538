# SPDX-License-Identifier: Apache-2.0
"""Which KV caches hold numbers of one byte, and what the bytes mean, in PyTorch.

A byte is a number of float8 e4m3, times a scale that belongs to a layer's keys or
values: one for all heads, or one for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType

CACHE_DTYPES: tuple[CacheDType, ...] = ("fp8", "fp8_e4m3")
"""Names of this format in `--kv-cache-dtype`."""

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def to_bytes(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return numbers as they are stored; those too large become the largest.

    Args:
        numbers: Floating point, any shape.
        scale: Float32, broadcast to `numbers`.

    Returns:
        uint8, shaped as `numbers`.
    """
    scaled = (numbers.float() / scale).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def from_bytes(content: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what is stored, float32.

    Args:
        content: uint8, any shape.
        scale: Float32, broadcast to `content`.
    """
    return content.view(torch.float8_e4m3fn).float() * scale


def states_from_bytes(
    states: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor
) -> torch.Tensor:
    """Return keys and values that lie beside each other, float32.

    Args:
        states: `[..., num_kv_heads, num_tokens, 2 * head_size]` uint8, K then V.
        k_scale: Float32, one number or `[num_kv_heads]`.
        v_scale: Likewise.
    """
    keys, values = states.chunk(2, -1)
    return torch.cat(
        (
            from_bytes(keys, k_scale.view(-1, 1, 1)),
            from_bytes(values, v_scale.view(-1, 1, 1)),
        ),
        -1,
    )
