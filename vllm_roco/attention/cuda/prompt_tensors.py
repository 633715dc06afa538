# SPDX-License-Identifier: Apache-2.0
"""What a layer makes anew to attend over a step's prompts, and gives back behind it.

vLLM plans its memory by a profiling run, in which layers attend over nothing. They make
these tensors there as well, of as many tokens as a step can have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def empty_lse(query: torch.Tensor) -> torch.Tensor:
    """Return room for the log-sums-exp of queries.

    Args:
        query: `[num_queries, num_heads, head_size]`.

    Returns:
        `[num_heads, num_queries]` float32.
    """
    num_queries, num_heads, _ = query.shape
    return query.new_empty((num_heads, num_queries), dtype=torch.float32)


def empty_fp8(query: torch.Tensor) -> torch.Tensor:
    """Return room for quantised queries: float8 e4m3, contiguous, shaped as `query`."""
    return query.new_empty(query.shape, dtype=torch.float8_e4m3fn)


def empty_bfloat16(output: torch.Tensor) -> torch.Tensor:
    """Return room for what is attended: bfloat16, contiguous, shaped as `output`."""
    return output.new_empty(output.shape, dtype=torch.bfloat16)


@dataclass(frozen=True)
class PromptTensors:
    """Which of them exist at the same time.

    Attributes:
        quantises_queries: FlashAttention multiplies fp8 queries with an fp8 cache.
        converts_output: It writes bfloat16 then, which is not the model's type.
        adds_sinks: It leaves out the model's sinks, which are added behind it.
    """

    quantises_queries: bool
    converts_output: bool
    adds_sinks: bool

    def rehearse(self, query: torch.Tensor) -> int:
        """Make them all, and give them back.

        Args:
            query: `[num_queries, num_heads, head_size]`, of the largest step.

        Returns:
            The bytes that they took.
        """
        made = [empty_lse(query)]
        if self.adds_sinks:
            # of two tensors, one at a time
            made.append(empty_lse(query))
        if self.quantises_queries:
            made.append(empty_fp8(query))
        if self.converts_output:
            made.append(empty_bfloat16(query))
        return sum(tensor.nbytes for tensor in made)
