# SPDX-License-Identifier: Apache-2.0
"""What stands for RoCo's layers where FlashAttention's builder looks for windows.

FlashAttention 3 can have a step's schedule worked out before its kernels are launched.
vLLM's builder has that done for the longest sequence of the step, and a captured graph
takes it for one as long as the model allows. For these two a window is not the same: a
step whose sequences are no longer than it has none. With heads of at most 64 numbers or
more than 128 the schedule then has another form, and the graph's kernels write no
output. vLLM leaves the schedule out where layers with a window and others go through
FlashAttention; of those it would see the ones with a window alone.
"""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

NO_WINDOW = (-1, -1)
"""What a layer of full attention has in FlashAttention's terms."""


class FullAttention(FlashAttentionImpl):
    """A layer without a window, to be counted and never to be called."""

    # what vLLM's would set up is for a layer that attends
    def __init__(self, **_: object) -> None:
        self.sliding_window = NO_WINDOW
