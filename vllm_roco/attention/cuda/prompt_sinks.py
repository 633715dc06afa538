# SPDX-License-Identifier: Apache-2.0
"""A model's attention sinks where FlashAttention leaves them out: of prompts alone.

Those of decodes enter in `ops.decode.attend`, and where a kernel of ours attends for
prompts, in `ops.prefill_attention`.
"""

from __future__ import annotations

import torch


def flash_has_sinks(version: int, dtype: torch.dtype) -> bool:
    """Return whether vLLM's FlashAttention takes sinks.

    Args:
        version: Of FlashAttention: 2 has none, 3 takes them in bfloat16 alone.
        dtype: Of the sinks.
    """
    return version > 3 or (version == 3 and dtype == torch.bfloat16)


def add_sinks(
    output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """Put sinks into the denominator of attention that was computed without them.

    Args:
        output: `[num_queries, num_heads, head_size]`, changed in place.
        lse: `[num_heads, num_queries]` float32, natural logarithm.
        sinks: `[num_heads]`, of any dtype.

    Returns:
        The log-sum-exp with sinks, as `lse`.
    """
    sinks = sinks.float()[:, None]
    # e^lse / (e^lse + e^sink), which overflows nowhere
    output.mul_((lse - sinks).sigmoid_().T[:, :, None])
    return torch.logaddexp(lse, sinks)
