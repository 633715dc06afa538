# SPDX-License-Identifier: Apache-2.0
"""Logits in base 2, as the kernels keep them, and their soft cap."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


def logit_scale(scale: float, soft_cap: float) -> float:
    """Return by what a kernel multiplies its dot products.

    Args:
        scale: Softmax scale.
        soft_cap: Bound of the logits' soft cap; 0 for none, and then the product is in
            base 2 at once. Else `cap_logits` follows.
    """
    return scale if soft_cap else scale * math.log2(math.e)


@triton.jit
def cap_logits(
    logits,  # any shape, in base e
    soft_cap,
):
    """Return `soft_cap * tanh(logits / soft_cap)` in base 2."""
    # in a form of which neither end overflows
    growth = tl.exp2(logits * (2.0 * LOG2_E / soft_cap))
    return soft_cap * LOG2_E * (1.0 - 2.0 / (growth + 1.0))
