# SPDX-License-Identifier: Apache-2.0
"""Tensors that lie behind each other in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

ALIGNMENT = 64
"""Float32 numbers. Kernels are compiled for addresses that are aligned."""


def total(counts: Iterable[int]) -> int:
    """Return the float32 numbers that tensors of so many numbers take together."""
    return sum(map(_padded, counts))


def carve(memory: torch.Tensor, counts: Iterable[int]) -> list[torch.Tensor]:
    """Return flat tensors of so many numbers, in order and without overlap.

    Args:
        memory: Flat float32, at least `total(counts)` numbers.
        counts: Numbers of each tensor.
    """
    assert memory.dtype == torch.float32
    tensors = []
    start = 0
    for count in counts:
        tensors.append(memory[start : start + count])
        start += _padded(count)
    assert start <= memory.numel(), "the memory is too small for what lies in it"
    return tensors


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
